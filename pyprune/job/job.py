"""Input of a run: every argument and file, checked before anything is written."""

import dataclasses
import json
from pathlib import Path
from time import perf_counter
from typing import Any

from ..calibration.windows import fingerprint
from ..checkpoint import (
    CheckpointReader,
    LayerPrefetcher,
    LoadedLayers,
    LoadedModel,
    ModelSource,
    begun,
    check_cache,
    check_output_creatable,
    check_shard_size,
    checkpoint_folder,
    layer_loader,
    metadata_of,
)
from ..checkpoint.special_ids import check_generation_config, check_special_ids, generation_fields
from ..errors import InputError
from ..estimation.target import ratio_of
from ..forward.layer_forward import LayerForward
from ..methods import Method, make_method, resolve_ratio
from ..methods.inside import check_inside
from ..runtime import distributed
from ..runtime.device import select_dtype
from ..runtime.environment import take_threads
from ..runtime.progress import Progress
from .config import PruneConfig, check_same_config
from .identity import cache_file, operator_backends, run_identity, unrepeatable
from .memory import fit_memory, fit_training
from .outside_layers import check_rows_unused, nonfinite_embeddings
from .record import FORMAT
from .windows import check_texts, fitted_length, run_calibration_windows, run_evaluation_windows


class Job:
    """The method, the model, the windows, and what the result depends on.

    `identity` names everything that the output's bits follow from; `biases` says which output projections of the
    output have a bias (a stock family's own ones apart). `cache`: folder of statistics; None: they are not kept.

    Raises:
        InputError: for what is wrong with the arguments or the input.
    """

    def __init__(self, options: PruneConfig, progress: Progress, model: LoadedModel | None = None) -> None:
        """model: the one in memory that is pruned; None: the one that the options name."""
        self.start = perf_counter()
        check_shard_size(options.shard_size)
        check_same_config(options)
        self.method: Method = make_method(options.method, options.method_options)
        if options.target is None:
            resolve_ratio(self.method, options.ratio)  # before the model is looked at
        self.progress = progress
        self.warnings: list[str] = []
        # Before anything is computed, since a resumed run goes on as it began.
        self.begun = distributed.broadcast_object(lambda: _begun(options))
        take_threads(self.begun.get("identity", {}).get("threads"))
        self.device = distributed.local_device(options.device)
        self.reader: ModelSource = model or self._open(options)
        self.method = self.method.fitted(self.reader.shapes, self.reader.biased)
        if self.reader.wrapping is not None:
            check_inside(self.method, str(self.reader.origin), self.reader.wrapping.wrapper.name)
        if options.target is None:
            self.ratio = resolve_ratio(self.method, options.ratio)
        else:
            self.ratio = ratio_of(options.target, self.reader, self.method)
        self.options = options = self._fitted(options)
        self.dtype = select_dtype(options.dtype, self.reader.dtype, self.device)
        self.method.check(self.reader.shapes, self.ratio)
        self.method.check_layers(self.reader.family, self.reader.config)
        self.cache = self._cache_folder()
        check_texts(self)
        self.biases = {
            name: self.method.adds_bias or bool(getattr(self.reader.config, name, False))
            for name in ("o_proj_bias", "down_proj_bias")
        }
        # A resumed run has to go on with its batches: sums over others round otherwise.
        batch = self.begun.get("identity", {}).get("batch")
        self.memory = fit_memory(self.reader, self.method, self.ratio, options, self.device, self.dtype, batch)
        self.recompute = fit_training(self.reader, self.method, options, self.device, self.dtype)
        self.model_fingerprint = self.reader.fingerprint()
        self.source_files = self.reader.file_states()
        self._read_texts()
        self._identify()

    def _open(self, options: PruneConfig) -> CheckpointReader:
        reader = CheckpointReader(checkpoint_folder(options.model))
        check_generation_config(reader.folder)
        check_special_ids(reader.config, generation_fields(reader.folder), reader.folder)
        return reader

    def _cache_folder(self) -> Path | None:
        output, cache = self.options.output, self.options.cache
        if cache is None and output is None:
            return None
        folder = cache.absolute() if cache is not None else Path(output or "").absolute().parent / ".pyprune-cache"
        check_output_creatable(folder / "calibration")
        if output is not None:
            check_cache(folder, output)
        return folder

    def _fitted(self, options: PruneConfig) -> PruneConfig:
        """The options, with windows that the model has positions for. InputError: asked-for ones are too long."""
        evaluation = options.evaluation
        if evaluation is not None:
            length = fitted_length(self, evaluation.sequence_length, not evaluation.fits)
            evaluation = dataclasses.replace(evaluation, sequence_length=length)
        length = options.sequence_length
        if self.method.needs_text:
            length = fitted_length(self, length, not options.fits)
        if self.reader.unused:
            more = f" and {len(self.reader.unused) - 1} more" if len(self.reader.unused) > 1 else ""
            self.warnings.append(f"left out, since the model does not use it: {self.reader.unused[0]}{more}")
        return dataclasses.replace(options, evaluation=evaluation, sequence_length=length)

    def _read_texts(self) -> None:
        """Both texts, before the first layer: one that cannot be read must not cost the whole run."""
        bad_rows = nonfinite_embeddings(self.reader)
        self.backends = operator_backends(self.method, self.dtype, self.device) if self.method.needs_text else {}
        text = run_calibration_windows(self) if self.method.needs_text else None
        self.windows = None if text is None else text.windows
        self.sources = None if text is None else text.sources
        self.evaluation_windows = run_evaluation_windows(self)
        if bad_rows:
            self.warnings.append(check_rows_unused(self.reader, bad_rows, self.windows, self.evaluation_windows))
        self.text_fingerprint = None if self.windows is None else fingerprint(self.windows)

    def _identify(self) -> None:
        """Set `identity`; a resumed run keeps the one that it began with."""
        self.identity = run_identity(
            self.device,
            format=FORMAT,
            model=self.model_fingerprint,
            method=self.method.name,
            options=self.method.options,
            ratio=self.ratio,
            calibration=self.text_fingerprint,
            sources=None if self.sources is None else [entry["fingerprint"] for entry in self.sources],
            dtype=str(self.dtype),
            backends=self.backends,
            allow_nonfinite=self.options.allow_nonfinite,
            batch=self.memory.batch,
            shard_size=self.options.shard_size,
        )
        other = unrepeatable(self.begun, self.identity, self.options.output, self.options.allow_other_bits)
        if other:
            self.identity = self.begun["identity"]
            self.warnings.append(f"not to the bits of an undisturbed run: {'; '.join(other.values())}")

    def accepts(self, path: Path, metadata: dict[str, str]) -> bool:
        """Whether a cache's file was made of this checkpoint; if so, each tensor is compared again as it is read."""
        source = metadata_of(metadata, "source", path)
        try:
            files, digests = source["files"], source["digests"]
            if files != self.source_files and self.reader.differing(digests) is not None:
                self.warnings.append(f"{path.name} was made of other weights than the checkpoint has now; made anew")
                return False
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: its source is not that of a cache ({error!r}); delete it") from error
        self.reader.content.expect(digests, str(path))
        return True

    def source(self, digests: dict[str, str] | None = None) -> dict[str, str]:
        """Metadata of a cache file that `accepts` compares; digests: all that were taken, unless given."""
        document = {"files": self.source_files, "digests": digests or self.reader.content.digests}
        return {"source": json.dumps(document, sort_keys=True)}

    def cache_file(self, kind: str, operators: tuple[str, ...], **what: Any) -> tuple[Path | None, dict[str, Any]]:
        """`identity.cache_file` of this run."""
        return cache_file(self.cache, kind, self.identity, operators, what)

    def forward(self, samples: int | None = None) -> LayerForward:
        """Over all windows, or over the first `samples`; of several processes each has its block of them."""
        assert self.windows is not None
        windows = distributed.local_windows(self.windows[:samples])
        memory, nonfinite = self.memory, self.options.allow_nonfinite
        return LayerForward(self.reader, windows, self.device, self.dtype, nonfinite, memory.batch, memory.on_device)

    def loader(self) -> LayerPrefetcher | LoadedLayers:
        """Return what yields the stored layers in order."""
        return layer_loader(self.reader, self.device)


def _begun(options: PruneConfig) -> dict[str, Any]:
    """The first document of the run that is resumed; empty where none is."""
    return begun(options.output) if options.resume and options.output is not None else {}
