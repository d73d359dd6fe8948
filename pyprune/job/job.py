"""What a pruning works on: every argument and input checked, before anything is written."""

import dataclasses
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..calibration import text as calibration
from ..calibration.windows import SELF, calibration_windows, checked_windows, evaluation_windows, fit_length
from ..checkpoint import (
    CheckpointReader,
    LayerPrefetcher,
    begun,
    changes,
    check_cache,
    check_output_creatable,
    checkpoint_folder,
    digest,
    load_cached,
    metadata_of,
    save_cached,
)
from ..checkpoint.finite import check_finite, described_rows, nonfinite_rows
from ..checkpoint.special_ids import check_generation_config, check_special_ids, generation_fields
from ..checkpoint.writer import partial_of
from ..errors import InputError
from ..estimation.memory import MemoryPlan, plan_memory
from ..estimation.sizes import Sizes
from ..estimation.training_memory import check_fits, training_memory
from ..forward.fused import OPERATORS as FORWARD_OPERATORS
from ..forward.layer_forward import LayerForward, micro_batch
from ..methods import Method, make_method, resolve_ratio
from ..ops import dispatch as backends
from ..ops.tuning import operator_fingerprint
from ..runtime import distributed
from ..runtime.device import check_room, free_memory, release_cache, select_dtype, usable_memory
from ..runtime.environment import environment, split, take_threads
from ..runtime.progress import Progress
from .config import PruneConfig
from .record import FORMAT

# Operators that read activations, in the compute type; the others work on float32 statistics.
ACTIVATION_OPERATORS = ("channel_moments", "hessian", *FORWARD_OPERATORS)


class Job:
    """The method, the model, the windows, and what the result depends on. Raises InputError for what is wrong.

    `identity` names everything that the output's bits follow from; `biases` says which output projections of the output
    have a bias (a stock family's own ones apart).
    """

    def __init__(self, options: PruneConfig, progress: Progress) -> None:
        self.start = perf_counter()
        self.method: Method = make_method(options.method, options.method_options)
        self.ratio = resolve_ratio(self.method, options.ratio)
        self.progress = progress
        self.warnings: list[str] = []
        # Before anything is computed, since a resumed run goes on as it began.
        self.begun = distributed.broadcast_object(lambda: begun(options.output)) if options.resume else {}
        take_threads(self.begun.get("identity", {}).get("threads"))
        self.device = distributed.local_device(options.device)
        self.reader = CheckpointReader(checkpoint_folder(options.model))
        check_generation_config(self.reader.folder)
        check_special_ids(self.reader.config, generation_fields(self.reader.folder), self.reader.folder)
        self.options = options = self._fitted(options)
        if self.reader.unused:
            more = f" and {len(self.reader.unused) - 1} more" if len(self.reader.unused) > 1 else ""
            self.warnings.append(f"left out, since the model does not use it: {self.reader.unused[0]}{more}")
        self.dtype = select_dtype(options.dtype, self.reader.dtype, self.device)
        self.method.check(self.reader.shapes, self.ratio)
        self.method.check_layers(self.reader.family, self.reader.config)
        self.cache = (options.cache or options.output.absolute().parent / ".pyprune-cache").absolute()
        check_output_creatable(self.cache / "calibration")
        check_cache(self.cache, options.output)
        self.biases = {
            name: self.method.adds_bias or bool(getattr(self.reader.config, name, False))
            for name in ("o_proj_bias", "down_proj_bias")
        }
        self.memory = self._memory()
        self.recompute = self._recompute()
        self.model_fingerprint = self.reader.fingerprint()
        self.source_files = self.reader.file_states()
        bad_rows = self._check_outside()
        self.backends = self._backends() if self.method.needs_text else {}
        self.windows = self._windows() if self.method.needs_text else None
        # Before the first layer: a text that cannot be read must not cost the whole run.
        self.evaluation_windows = self._evaluation_windows()
        self._check_rows(bad_rows)
        self.text_fingerprint = None if self.windows is None else calibration.fingerprint(self.windows)
        self.identity: dict[str, Any] = {
            "format": FORMAT,
            "model": self.model_fingerprint,
            "method": self.method.name,
            "options": self.method.options,
            "ratio": self.ratio,
            "calibration": self.text_fingerprint,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "backends": self.backends,
            "allow_nonfinite": options.allow_nonfinite,
            "batch": self.memory.batch,
        } | environment(self.device)
        if distributed.world_size() > 1:  # sums over blocks of windows round otherwise than a sum over all
            self.identity["processes"] = distributed.world_size()
        self.other_bits = self._compare_with_begun()

    def _fitted(self, options: PruneConfig) -> PruneConfig:
        """The options, with windows that the model has positions for. InputError: asked-for ones are too long."""
        evaluation = options.evaluation
        if evaluation is not None:
            length = self._length(evaluation.sequence_length, not evaluation.fits)
            evaluation = dataclasses.replace(evaluation, sequence_length=length)
        if not self.method.needs_text:
            return dataclasses.replace(options, evaluation=evaluation)
        length = self._length(options.sequence_length, not options.fits)
        return dataclasses.replace(options, evaluation=evaluation, sequence_length=length)

    def _length(self, length: int, typed: bool) -> int:
        length, note = fit_length(length, typed, self.reader.config)
        if note is not None:
            self.warnings.append(note)
        return length

    def _compare_with_begun(self) -> dict[str, str]:
        """Go on under the identity that a resumed run began with; what of its environment cannot be had again.

        InputError: something cannot, and --allow-other-bits is not given. Other settings are the writer's to refuse.
        """
        if not self.begun:
            return {}
        before = self.begun["identity"]
        asked, other = split(changes(before, json.loads(json.dumps(self.identity))))
        if asked or not other:
            return {}
        said = "; ".join(other.values())
        if not self.options.allow_other_bits:
            raise InputError(
                f"{partial_of(self.options.output)}: cannot be finished to the same bits: {said}; resume it where it "
                "began, or add --allow-other-bits"
            )
        self.identity = before
        self.warnings.append(f"not to the bits of an undisturbed run: {said}")
        return other

    def _check_outside(self) -> list[int]:
        """Look at the tensors outside the layers; which rows of untied embeddings are NaN or Inf. InputError: others"""
        tensors = self.reader.read_outside()
        where = str(self.reader.folder)
        rows: list[int] = []
        for name, tensor in tensors.items():
            if name == self.reader.family.embeddings and not self.reader.tied:
                rows = nonfinite_rows(tensor)
            else:
                check_finite({name: tensor}, where)
        return rows

    def _check_rows(self, rows: list[int]) -> None:
        """Embeddings that are NaN or Inf are a warning as long as no text has their tokens."""
        if not rows:
            return
        name, bad = self.reader.family.embeddings, torch.tensor(rows)
        for windows in (self.windows, self.evaluation_windows):
            used = bad[torch.isin(bad, windows)] if windows is not None else bad[:0]
            if len(used):
                raise InputError(
                    f"{self.reader.folder}: tensor {name}: NaN or Inf weights in the rows of tokens that the text has: "
                    f"{described_rows(used.tolist())}; check the checkpoint"
                )
        self.warnings.append(f"{name}: NaN or Inf in rows of tokens that no text has: {described_rows(rows)}")

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
        """What a cache's file keeps of the checkpoint, for `accepts`; digests: all that were taken, unless given."""
        document = {"files": self.source_files, "digests": digests or self.reader.content.digests}
        return {"source": json.dumps(document, sort_keys=True)}

    def forward(self, samples: int | None = None) -> LayerForward:
        """Over all windows, or over the first `samples`; of several processes each has its block of them."""
        assert self.windows is not None
        windows = distributed.local_windows(self.windows[:samples])
        memory, nonfinite = self.memory, self.options.allow_nonfinite
        return LayerForward(self.reader, windows, self.device, self.dtype, nonfinite, memory.batch, memory.on_device)

    def loader(self) -> LayerPrefetcher:
        """What hands the stored layers over, one after the other, to a pass."""
        return LayerPrefetcher(self.reader, self.device)

    def _memory(self) -> MemoryPlan:
        """How the run is cut: within --device-memory, or what the device has free. InputError where nothing fits."""
        budget, o = self.options.device_memory, self.options
        if self.device.type != "cuda":
            if budget is not None:
                raise InputError("--device-memory is for a CUDA device; this run is on the CPU")
            return MemoryPlan(micro_batch(self.device, o.sequence_length), 2)
        total = torch.cuda.get_device_properties(self.device).total_memory
        if budget is None:
            budget = usable_memory(self.device)
        else:
            release_cache(self.device)
            free = free_memory(self.device)
            check_room(self.device, budget, torch.cuda.memory_reserved(self.device), free)
            budget = min(budget, free)
        sizes = Sizes(
            self.reader.shapes,
            self.method,
            self.ratio,
            o.samples,
            o.sequence_length,
            self.dtype.itemsize,
            self.reader.dtype.itemsize,
            distributed.world_size(),
        )
        # A resumed run has to go on with its batches: sums over others round otherwise.
        batch = self.begun.get("identity", {}).get("batch")
        return plan_memory(sizes, distributed.all_reduce_min(min(budget, total)), batch)

    def _recompute(self) -> bool:
        """Of a method that trains: whether activations are computed again going backward. InputError: it cannot."""
        training = self.method.training
        if training is None:
            return False
        if distributed.world_size() > 1:
            raise InputError(f"{self.method.name} trains in one process: start it without torchrun")
        memory = training_memory(self.reader, training, self.options.sequence_length, self.dtype)
        budget = self.options.device_memory or usable_memory(self.device)
        return check_fits(memory, budget, self.method.name)

    def cache_file(self, kind: str, operators: tuple[str, ...], **what: Any) -> tuple[Path, dict[str, Any]]:
        """Where statistics of this model and text are kept, and what their numbers follow from.

        `operators`: those that they were computed by; `what`: everything else that they depend on.
        """
        names = (
            *("model", "calibration", "dtype", "device", "allow_nonfinite", "batch", "processes"),
            *("torch", "transformers", "pyprune", "processor", "threads"),
        )
        identity = {name: self.identity[name] for name in names if name in self.identity}
        identity |= {"backends": {name: self.backends[name] for name in (*operators, *FORWARD_OPERATORS)}} | what
        return self.cache / f"{kind}-{digest(identity)}.safetensors", identity

    def _backends(self) -> dict[str, str]:
        """The backend of every operator that the forward and the method use: results follow from it to the last bit."""
        chosen = {}
        for operator in (*self.method.operators, *FORWARD_OPERATORS):
            # Which kernel runs may depend on sizes: those of the whole job are named by its shapes and this choice.
            dtype = self.dtype if operator in ACTIVATION_OPERATORS else torch.float32
            sample = torch.empty(1, 8, dtype=dtype, device=self.device)
            shape = None if operator in ACTIVATION_OPERATORS else (1, 1)
            chosen[operator] = backends.choose_backend(operator, sample, shape)
            tuned = operator_fingerprint(operator, self.device) if chosen[operator] == "triton" else None
            if tuned is not None:  # another configuration sums in another order
                chosen[operator] += f", tuned {tuned}"
        return chosen

    def _windows(self) -> Tensor:
        o, config = self.options, self.reader.config
        if o.calibration is None:
            raise InputError(
                f"method {self.method.name} looks at activations: give --calibration FILE (.txt or .jsonl), "
                f"or --calibration {SELF} for text sampled from the model itself"
            )
        distributed.check_windows(o.samples)
        return self._sampled_once(
            o.calibration,
            o.samples,
            o.sequence_length,
            o.seed,
            lambda: calibration_windows(
                o.calibration or SELF,
                self.reader.folder,
                config,
                o.samples,
                o.sequence_length,
                o.seed,
                self.device,
                self.dtype,
                o.trust_remote_code,
                lambda done, total: self.progress("sampling text", done, total),
            ),
        )

    def _evaluation_windows(self) -> Tensor | None:
        evaluation = self.options.evaluation
        if evaluation is None:
            return None
        seed = self.options.seed + 1  # sampled text must not be the text of the calibration
        return self._sampled_once(
            evaluation.text,
            evaluation.max_windows,
            evaluation.sequence_length,
            seed,
            lambda: evaluation_windows(
                evaluation.text,
                self.reader.folder,
                self.reader.config,
                evaluation.sequence_length,
                evaluation.max_windows,
                seed,
                self.device,
                self.dtype,
                self.options.trust_remote_code,
                lambda done, total: self.progress("sampling text", done, total),
            ),
        )

    def _sampled_once(self, source: str, samples: int | None, length: int, seed: int, make: Any) -> Tensor:
        """Windows by `make`; those sampled from the model are kept, so that another ratio need not load it whole."""
        if source != SELF:
            return make()
        key = {
            "model": self.model_fingerprint,
            "windows": [samples, length, seed],
            "dtype": str(self.dtype),
            "device": self.device.type,
            "environment": environment(self.device),
        }
        path = self.cache / f"text-{digest(key)}.safetensors"
        with distributed.main_process_first():  # the other processes then find the file
            if path.is_file():
                tensors, metadata = load_cached(path, "sampled text", key)
                if self.accepts(path, metadata):
                    return checked_windows(path, tensors, samples, length, self.reader.config.vocab_size)
            windows = make()
            # The whole model was read for it, so its digests cost no disk.
            digests = self.reader.all_digests()
            self.reader.content.expect(digests, str(path))
            save_cached({"windows": windows}, path, self.source(digests), key)
            return windows
