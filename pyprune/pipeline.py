"""Survey, plan, prune: from a checkpoint folder and a text to a smaller checkpoint folder."""

import copy
import errno
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
from .finish import finish
from .forward import LayerForward
from .methods import LayerStatistics, Method, make_method
from .ops import backends
from .options import Evaluation, Progress, PruneOptions, silent
from .plan import (
    FILE,
    FORMAT,
    kept_from_entry,
    layer_entry,
    read_plan,
)
from .rewrite import compensation_bias, rewrite_layer
from .survey import load_survey, observe_layer, save_survey, survey_key, survey_model, survey_weights
from .windows import SELF, calibration_windows, evaluation_windows


def prune(options: PruneOptions, progress: Progress = silent) -> dict[str, Any]:
    """Prune a checkpoint; returns the plan (what was written to plan.json).

    Raises InputError for anything wrong with the arguments or the input; then nothing is left behind. A run
    that was killed, or that ran out of disk space, leaves `<output>.partial`, which `resume` finishes.
    """
    if options.resume and (options.output / FILE).is_file():
        return _finished(options)
    check_free(options.output)
    run = Run(options, progress)
    fresh = not run.writer.done
    run.writer.begin()
    try:
        try:
            choice, scores = run.execute()
        except InputError:
            if fresh:  # this model cannot be pruned so: nothing to resume
                run.writer.discard()
            raise
        return finish(run, choice, scores)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"{run.writer.partial}: no space left on the device; free some and repeat with --resume"
        ) from error


def _finished(options: PruneOptions) -> dict[str, Any]:
    """The plan of an output that is already there, if it is what these options ask for."""
    plan = read_plan(options.output)
    method = make_method(options.method, options.method_options)
    text = plan["calibration"] or {}
    done = (plan["method"], plan["options"], plan["ratio"]["asked"], plan["seed"])
    asked = (method.name, method.options, options.ratio, options.seed)
    texts = (options.calibration, options.samples, options.sequence_length)
    if done != asked or (text and (text["text"], text["samples"], text["sequence_length"]) != texts):
        raise InputError(f"{options.output}: finished already, with other settings; name another output")
    return plan


class Run:
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
        # Before the first layer: a text that cannot be read must not cost the whole run.
        self.evaluation_windows = None if options.evaluation is None else self._evaluation_windows(options.evaluation)
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
            "backend": self.backend() if self.method.needs_text else None,
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

    def _evaluation_windows(self, evaluation: Evaluation) -> Tensor:
        return evaluation_windows(
            evaluation.text,
            self.reader.folder,
            self.reader.config.vocab_size,
            evaluation.sequence_length,
            evaluation.max_windows,
            self.options.seed + 1,  # sampled text must not be the text of the calibration
            self.device,
            self.dtype,
            self.options.trust_remote_code,
            lambda done, total: self.progress("sampling text", done, total),
        )

    def _bytes_to_write(self) -> int:
        outside = sum(self.reader.tensors[n].bytes for n in self.reader.outside_layers())
        kept = self.reader.bytes - self.options.ratio * (self.reader.bytes - outside)
        return max(0, int(kept) - sum(entry["bytes"] for entry in self.writer.done.values()))

    def execute(self) -> tuple[Choice, list[UnitScores]]:
        """Both passes; every layer is written afterwards. Returns the kept units and the scores of all."""
        if self.method.sequential:
            return self._prune_in_sequence()
        survey = self._survey()
        scores = self.method.scores(survey, self.reader.shapes)
        choice = self.method.choose(scores, self.reader.shapes, self.options.ratio)
        self._prune_by_choice(choice, survey)
        return choice, scores

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
            "backend": self.backend(),
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

    def backend(self) -> str:
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
                    forward.run(forward.build(pruned.items(), layer, config), layer, hidden, {})
        self._copy_head()
        return Choice(layers), scores

    def _chosen(
        self, forward: LayerForward, layer: int, hidden: Tensor, removed: dict[str, int]
    ) -> tuple[Kept, UnitScores, dict[str, Tensor]]:
        statistics = observe_layer(
            forward,
            forward.build(self.reader.stream_layer(layer), layer),
            layer,
            hidden,
            self.method.by_window,
            advance=False,
        )
        scores = self.method.unit_scores(statistics, self.reader.shapes[layer])
        kept = {module: keep_highest(scores[module], removed[module]) for module in MODULES}
        # Read again: holding the stored layer beside the one in the compute type would cost half as much more memory.
        return kept, scores, self._rewritten(layer, self.reader.read_layer(layer), kept, statistics)

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
