"""Survey, plan, prune: from a checkpoint folder and a text to a smaller checkpoint folder."""

import copy
import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import calibration
from .allocation import Choice, Kept, UnitScores, check_ratio, keep_highest
from .architectures import ATTENTION, FFN, MODULES, LayerShape
from .checkpoint import CheckpointReader, CheckpointWriter, check_free, check_space, checkpoint_folder
from .device import Meter, select_device, select_dtype
from .errors import InputError
from .evaluate import evaluate
from .forward import LayerForward
from .methods import LayerStatistics, Method, make_method
from .modeling import pruned_config
from .ops import backends
from .plan import (
    FILE,
    FORMAT,
    dense_summary,
    kept_from_entry,
    kept_shapes,
    layer_entry,
    parameter_counts,
    ratio_summary,
    read_plan,
    versions,
    write_plan,
)
from .report import write_report
from .rewrite import compensation_bias, rewrite_layer
from .survey import load_survey, observe_layer, save_survey, survey_key, survey_model, survey_weights
from .windows import SELF, calibration_windows, evaluation_windows

Progress = Callable[[str, int, int], None]  # what is under way, units done, units in all
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def silent(what: str, done: int, total: int) -> None:
    """The progress of a caller that shows none."""


@dataclass(frozen=True)
class Evaluation:
    """Perplexity before and after, for the report: a text (or `self`) in consecutive windows."""

    text: str
    sequence_length: int = 1024
    max_windows: int | None = None


@dataclass(frozen=True)
class PruneOptions:
    """What `pyprune prune` is told. Sizes in windows and tokens; `ratio` of the decoder linears' parameters."""

    model: str
    output: Path
    method: str
    ratio: float
    method_options: dict[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    cache: Path | None = None
    resume: bool = False
    allow_nonfinite: bool = False
    trust_remote_code: bool = False
    evaluation: Evaluation | None = None


def prune(options: PruneOptions, progress: Progress = silent) -> dict[str, Any]:
    """Prune a checkpoint; returns the plan (what was written to plan.json).

    Raises InputError for anything wrong with the arguments or the input; then nothing is left behind. A run
    that was killed, or that ran out of disk space, leaves `<output>.partial`, which `resume` finishes.
    """
    if options.resume and (options.output / FILE).is_file():
        return _finished(options)
    check_free(options.output)
    run = _Run(options, progress)
    run.writer.begin()
    try:
        return run.execute()
    except InputError:
        run.writer.discard()
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"{run.writer.partial}: no space left on the device; free some and repeat with --resume"
        ) from error


def _finished(options: PruneOptions) -> dict[str, Any]:
    """The plan of an output that is already there, if it is what these options ask for."""
    plan = read_plan(options.output)
    asked = make_method(options.method, options.method_options)
    if (plan["method"], plan["options"], plan["ratio"]["asked"], plan["seed"]) != (
        asked.name,
        asked.options,
        options.ratio,
        options.seed,
    ):
        raise InputError(f"{options.output}: finished already, with other settings; name another output")
    return plan


class _Run:
    """One pruning from arguments to finished folder."""

    def __init__(self, options: PruneOptions, progress: Progress) -> None:
        self.start = perf_counter()
        self.options, self.progress = options, progress
        self.method: Method = make_method(options.method, options.method_options)
        self.device = select_device(options.device)
        self.reader = CheckpointReader(checkpoint_folder(options.model))
        self.dtype = select_dtype(options.dtype, self.reader.dtype, self.device)
        check_ratio(self.reader.shapes, options.ratio)
        self.windows = self._windows() if self.method.needs_text else None
        self.meters: dict[str, Meter] = {}
        self.cached = False
        self.model_fingerprint = self.reader.fingerprint()
        self.text_fingerprint = None if self.windows is None else calibration.fingerprint(self.windows)
        identity = {
            "format": FORMAT,
            "model": self.model_fingerprint,
            "method": self.method.name,
            "options": self.method.options,
            "ratio": options.ratio,
            "calibration": self.text_fingerprint,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "allow_nonfinite": options.allow_nonfinite,
        }
        # The first shard holds the embeddings, the last the final norm and the head, one each a layer.
        self.writer = CheckpointWriter(options.output, self.reader.layers + 2, identity, options.resume)
        check_space(options.output, self._bytes_to_write())

    def _windows(self) -> Tensor:
        o = self.options
        if o.calibration is None:
            raise InputError(
                f"method {self.method.name} looks at activations: give --calibration FILE (.txt or .jsonl), "
                f"or --calibration {SELF} for text sampled from the model itself"
            )
        limit = self.reader.config.max_position_embeddings
        if o.sequence_length > limit:
            raise InputError(f"sequence length {o.sequence_length} exceeds the model's max_position_embeddings {limit}")
        return calibration_windows(
            o.calibration,
            self.reader.folder,
            self.reader.config.vocab_size,
            o.samples,
            o.sequence_length,
            o.seed,
            self.device,
            self.dtype,
            o.trust_remote_code,
            lambda done, total: self.progress("sampling text", done, total),
        )

    def _bytes_to_write(self) -> int:
        outside = sum(self.reader.tensors[n].bytes for n in self.reader.outside_layers())
        kept = self.reader.bytes - self.options.ratio * (self.reader.bytes - outside)
        return max(0, int(kept) - sum(entry["bytes"] for entry in self.writer.done.values()))

    def execute(self) -> dict[str, Any]:
        if self.method.sequential:
            choice, scores = self._prune_in_sequence()
        else:
            scores_survey = self._survey()
            scores = self.method.scores(scores_survey, self.reader.shapes)
            choice = self.method.choose(scores, self.reader.shapes, self.options.ratio)
            self._prune_by_choice(choice, scores_survey)
        return self._finish(choice, scores)

    # --- survey ---

    def _survey(self) -> list[LayerStatistics]:
        meter = self.meters["survey"] = Meter(self.device)
        if self.windows is None:
            return survey_weights(self.reader, self.device, meter, self.progress)
        identity = {
            "model": self.model_fingerprint,
            "calibration": self.text_fingerprint,
            "by_window": self.method.by_window,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "backend": self._backend(),
            "allow_nonfinite": self.options.allow_nonfinite,
            "torch": torch.__version__,
        }
        cache = self.options.cache or self.options.output.absolute().parent / ".pyprune-cache"
        path = cache / f"survey-{survey_key(identity)}.safetensors"
        if path.is_file():
            self.cached = True
            try:
                return load_survey(path, self.reader.layers)
            except (SafetensorError, KeyError, ValueError) as error:
                raise InputError(f"{path}: a damaged survey ({error}); delete it") from error
        forward = self._forward()
        survey = survey_model(forward, self.method.by_window, meter, self.progress)
        save_survey(path, survey, identity)
        return survey

    def _forward(self) -> LayerForward:
        assert self.windows is not None
        return LayerForward(self.reader, self.windows, self.device, self.dtype, self.options.allow_nonfinite)

    def _backend(self) -> str:
        sample = torch.empty(1, 8, dtype=self.dtype, device=self.device)
        return backends.choose("channel_moments", sample).backend

    # --- prune ---

    def _prune_by_choice(self, choice: Choice, survey: list[LayerStatistics]) -> None:
        """Slice every layer as chosen beforehand; no forward."""
        meter = self.meters["prune"] = Meter(self.device)
        self._copy_embeddings()
        for layer, kept in enumerate(choice.layers):
            self.progress("prune", layer, self.reader.layers)
            if layer + 1 not in self.writer.done:
                with meter.layer():
                    tensors = self.reader.read_layer(layer)
                    self._write_layer(layer, self._rewritten(layer, tensors, kept, survey[layer]), None)
        self._copy_head()

    def _prune_in_sequence(self) -> tuple[Choice, list[UnitScores]]:
        """Score, slice and propagate layer by layer: each sees the output of the pruned layers before it."""
        meter = self.meters["prune"] = Meter(self.device)
        self._copy_embeddings()
        counts = self.method.counts(self.reader.shapes, self.options.ratio)
        forward, last = self._forward(), self.reader.layers - 1
        hidden = forward.embed()
        layers: list[Kept] = []
        scores: list[UnitScores] = []
        for layer, shape in enumerate(self.reader.shapes):
            self.progress("prune", layer, self.reader.layers)
            with meter.layer():
                if layer + 1 in self.writer.done:
                    kept, own, pruned = self._restored(layer)
                else:
                    kept, own, pruned = self._chosen(forward, layer, hidden, counts[layer])
                    self._write_layer(layer, pruned, layer_entry(kept, own))
                layers.append(kept)
                scores.append(own)
                if layer < last:
                    config = self._layer_config(layer, shape, kept)
                    forward.run(forward.build(pruned, layer, config), layer, hidden, {})
        self._copy_head()
        return Choice(layers), scores

    def _chosen(
        self, forward: LayerForward, layer: int, hidden: Tensor, removed: dict[str, int]
    ) -> tuple[Kept, UnitScores, dict[str, Tensor]]:
        tensors = self.reader.read_layer(layer)
        statistics = observe_layer(
            forward, forward.build(tensors, layer), layer, hidden, self.method.by_window, advance=False
        )
        scores = self.method.unit_scores(statistics, self.reader.shapes[layer])
        kept = {module: keep_highest(scores[module], removed[module]) for module in MODULES}
        return kept, scores, self._rewritten(layer, tensors, kept, statistics)

    def _restored(self, layer: int) -> tuple[Kept, UnitScores, dict[str, Tensor]]:
        """What a killed run already wrote of a layer; its output is computed again, which gives the same bits."""
        record = self.writer.done[layer + 1]["record"]
        prefix = self.reader.layer_prefix(layer)
        with safe_open(self.writer.file(layer + 1), framework="pt") as f:
            tensors = {name.removeprefix(prefix): f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        scores = {
            ATTENTION: torch.tensor(record["scores"]["kv_groups"], dtype=torch.float64),
            FFN: torch.tensor(record["scores"]["intermediate_channels"], dtype=torch.float64),
        }
        return kept_from_entry(record), scores, tensors

    def _rewritten(
        self, layer: int, tensors: dict[str, Tensor], kept: Kept, statistics: LayerStatistics
    ) -> dict[str, Tensor]:
        shape, family = self.reader.shapes[layer], self.reader.family
        bias = {}
        if self.method.biased:
            for module in MODULES:
                weight = tensors[family.driver(module) + ".weight"].to(self.device)
                mean = statistics[module].mean
                assert mean is not None
                bias[module] = compensation_bias(weight, mean, kept[module], shape.unit_width(module))
        return rewrite_layer(family, tensors, shape, kept, bias)

    def _layer_config(self, layer: int, shape: LayerShape, kept: Kept) -> Any:
        """The dense configuration with one layer's pruned sizes, to build just that layer."""
        config = copy.copy(self.reader.config.per_layer_config[layer])
        config.num_attention_heads = len(kept[ATTENTION]) * shape.heads_per_group
        config.num_key_value_heads = len(kept[ATTENTION])
        config.intermediate_size = len(kept[FFN])
        config.o_proj_bias = config.down_proj_bias = self.method.biased
        return config

    def _write_layer(self, layer: int, tensors: dict[str, Tensor], record: Any) -> None:
        prefix = self.reader.layer_prefix(layer)
        self.writer.write(layer + 1, {prefix + name: t for name, t in tensors.items()}, record)

    def _copy_embeddings(self) -> None:
        if 0 not in self.writer.done:
            self.writer.write(0, self.reader.read([self.reader.family.embeddings]))

    def _copy_head(self) -> None:
        self.progress("prune", self.reader.layers, self.reader.layers)
        last = self.reader.layers + 1
        if last not in self.writer.done:
            self.writer.write(last, self.reader.read(self.reader.outside_layers()[1:]))

    # --- finish ---

    def _finish(self, choice: Choice, scores: list[UnitScores]) -> dict[str, Any]:
        partial = self.writer.partial
        shapes = kept_shapes(self.reader.shapes, choice)
        biased = self.method.biased
        own = self.reader.config
        config = pruned_config(
            self.reader.family,
            own,
            shapes,
            biased or getattr(own, "o_proj_bias", False),
            biased or getattr(own, "down_proj_bias", False),
        )
        config.save_pretrained(partial)
        for pattern in _COPIED:
            for file in self.reader.folder.glob(pattern):
                shutil.copyfile(file, partial / file.name)
        self.writer.write_index()
        plan = self._plan(choice, scores, shapes)
        if self.options.evaluation is not None:
            plan["evaluation"] = self._evaluate(self.options.evaluation, partial)
        plan["seconds"] = round(perf_counter() - self.start, 3)
        write_plan(plan, partial)
        write_report(plan, partial / "report.html")
        self.writer.finish()
        return plan

    def _plan(self, choice: Choice, scores: list[UnitScores], shapes: list[LayerShape]) -> dict[str, Any]:
        o = self.options
        parameters = parameter_counts(self.reader, shapes)
        passes = {
            name: meter.summary() | {"cached": name == "survey" and self.cached} for name, meter in self.meters.items()
        }
        return {
            "format": FORMAT,
            "model": o.model,
            "model_fingerprint": self.model_fingerprint,
            "method": self.method.name,
            "options": self.method.options,
            "seed": o.seed,
            "calibration": None
            if self.windows is None
            else {
                "text": o.calibration,
                "samples": o.samples,
                "sequence_length": o.sequence_length,
                "fingerprint": self.text_fingerprint,
            },
            "ratio": ratio_summary(o.ratio, parameters, self.reader.shapes),
            "parameters": {name: list(counts) for name, counts in parameters.items()},
            "bytes": [self.reader.bytes, self.writer.tensor_bytes],
            "dense": dense_summary(self.reader.shapes),
            "layers": [layer_entry(k, s) for k, s in zip(choice.layers, scores, strict=True)],
            "threshold": choice.threshold,
            "passes": passes,
            "peak_memory_bytes": max(meter.peak_memory_bytes for meter in self.meters.values()),
            "versions": versions(),
            "device": self._device_name(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backends": {"channel_moments": self._backend()} if self.windows is not None else {},
        }

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu, {torch.get_num_threads()} threads"

    def _evaluate(self, evaluation: Evaluation, pruned: Path) -> dict[str, Any]:
        o, dense = self.options, self.reader.folder
        windows = evaluation_windows(
            evaluation.text,
            dense,
            self.reader.config.vocab_size,
            evaluation.sequence_length,
            evaluation.max_windows,
            # Sampled text must not be the text of the calibration.
            o.seed + 1,
            self.device,
            self.dtype,
            o.trust_remote_code,
            lambda done, total: self.progress("sampling text", done, total),
        )
        result = evaluate(
            pruned,
            windows,
            reference_folder=dense,
            device=self.device,
            dtype=self.dtype,
            progress=lambda done, total: self.progress("evaluate", done, total),
        )
        same = {name: result[name] for name in ("windows", "sequence_length")}
        return {
            "text": evaluation.text,
            "dense": {"perplexity": result["reference_perplexity"], **same},
            "pruned": result,
        }
