"""Survey, plan, prune: from a checkpoint folder and a text to a smaller checkpoint folder."""

import copy
import errno
import json
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .allocation import Choice, Kept, UnitScores, keep_highest
from .architectures import ATTENTION, FFN, MODULES, LayerShape
from .checkpoint import JOURNAL, CheckpointWriter, check_free, check_space, differences
from .device import Meter
from .errors import InputError
from .finish import finish
from .forward import LayerForward, layer_name
from .job import Job
from .methods import LayerStatistics
from .options import Progress, PruneOptions, silent
from .plan import FILE, kept_from_entry, layer_entry, read_plan
from .rewrite import compensation_bias, rewrite_layer
from .survey import load_survey, observe_layer, save_survey, survey_model, survey_weights


def prune(options: PruneOptions, progress: Progress = silent) -> dict[str, Any]:
    """Prune a checkpoint; returns the plan (what was written to plan.json).

    Raises InputError for anything wrong with the arguments or the input; then nothing is left behind. A run
    that was killed, or that ran out of disk space, leaves `<output>.partial`, which `resume` finishes.
    """
    finished = options.resume and (options.output / FILE).is_file()
    if not finished:
        check_free(options.output)  # before the windows, which may cost a whole model's sampling
    job = Job(options, progress)
    if finished:
        return _finished(job)
    # The first shard holds the embeddings, the last the final norm and the head, one each a layer.
    writer = CheckpointWriter(options.output, job.reader.layers + 2, job.identity, options.resume)
    check_space(writer.output, _bytes_to_write(job, writer))
    fresh = not writer.done
    passes = Passes(job, writer)
    try:
        writer.begin()
        try:
            choice, scores = passes.execute()
        except InputError:
            if fresh:  # this model cannot be pruned so: nothing to resume
                writer.discard()
            raise
        return finish(job, writer, passes.meters, passes.cached, passes.nonfinite, choice, scores)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"{writer.partial}: no space left on the device; free some and repeat with --resume"
        ) from error


def _finished(job: Job) -> dict[str, Any]:
    """The plan of an output that is already there, if it is what the job would make."""
    output = job.options.output
    try:
        plan = read_plan(output)
        changed = differences(plan["identity"], json.loads(json.dumps(job.identity)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{output / FILE}: not a plan of pyprune ({error!r}); name another output") from error
    if changed:
        raise InputError(f"{output}: finished already, with other settings: {changed}; name another output")
    if job.options.evaluation is not None and "evaluation" not in plan:
        raise InputError(f"{output}: finished already, without an evaluation; use `pyprune evaluate` on it")
    (output / JOURNAL).unlink(missing_ok=True)
    return plan


def _bytes_to_write(job: Job, writer: CheckpointWriter) -> int:
    outside = sum(job.reader.tensors[n].bytes for n in job.reader.outside_layers())
    kept = job.reader.bytes - job.options.ratio * (job.reader.bytes - outside)
    return max(0, int(kept) - sum(entry["bytes"] for entry in writer.done.values()))


def _drain(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The entries of a dictionary, each gone from it as it is handed over: the layer is never there twice."""
    while tensors:
        yield tensors.popitem()


class Passes:
    """The survey and the prune pass of one job, which write every shard."""

    def __init__(self, job: Job, writer: CheckpointWriter) -> None:
        self.job, self.writer = job, writer
        self.reader, self.method, self.device = job.reader, job.method, job.device
        self.meters: dict[str, Meter] = {}
        self.cached = False
        self.nonfinite: dict[str, int] = {}  # driver, as in messages -> NaN and Inf counted as zero

    def execute(self) -> tuple[Choice, list[UnitScores]]:
        """Both passes. Returns the kept units and the scores of all."""
        if self.method.sequential:
            return self._prune_in_sequence()
        survey = self._survey()
        for layer, statistics in enumerate(survey):
            self._count_nonfinite(layer, statistics)
        scores = self.method.scores(survey, self.reader.shapes)
        choice = self.method.choose(scores, self.reader.shapes, self.job.options.ratio)
        self._prune_by_choice(choice, scores, survey)
        return choice, scores

    def _count_nonfinite(self, layer: int, statistics: LayerStatistics) -> None:
        for module in MODULES:
            if statistics[module].nonfinite:
                self.nonfinite[layer_name(self.reader.family, layer, module)] = statistics[module].nonfinite

    def _survey(self) -> list[LayerStatistics]:
        meter = self.meters["survey"] = Meter(self.device)
        if self.job.windows is None:
            return survey_weights(self.reader, self.device, meter, self.job.progress)
        path, identity = self.job.survey_file()
        if path.is_file():
            self.cached = True
            return load_survey(path, self.reader.layers)
        survey = survey_model(self.job.forward(), self.method.by_window, meter, self.job.progress)
        save_survey(path, survey, identity)
        return survey

    def _prune_by_choice(self, choice: Choice, scores: list[UnitScores], survey: list[LayerStatistics]) -> None:
        """Slice every layer as chosen beforehand; no forward."""
        meter = self.meters["prune"] = Meter(self.device)
        self._copy_embeddings()
        for layer, kept in enumerate(choice.layers):
            self.job.progress("prune", layer, self.reader.layers)
            record = layer_entry(kept, scores[layer])
            # A shard of a killed run counts only if it keeps the same units as this choice.
            if self.writer.record(layer + 1) != record:
                with meter.layer():
                    tensors = self.reader.read_layer(layer)
                    self._write_layer(layer, self._rewritten(tensors, layer, kept, survey[layer]), record)
        self._copy_head()

    def _prune_in_sequence(self) -> tuple[Choice, list[UnitScores]]:
        """Score, slice and propagate layer by layer: each sees the output of the pruned layers before it."""
        meter = self.meters["prune"] = Meter(self.device)
        self._copy_embeddings()
        counts = self.method.counts(self.reader.shapes, self.job.options.ratio)
        forward, last = self.job.forward(), self.reader.layers - 1
        hidden = forward.embed()
        layers: list[Kept] = []
        scores: list[UnitScores] = []
        for layer, shape in enumerate(self.reader.shapes):
            self.job.progress("prune", layer, self.reader.layers)
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
                    forward.run(forward.build(_drain(pruned), layer, config), layer, hidden, {})
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
        self._count_nonfinite(layer, statistics)
        scores = self.method.unit_scores(statistics, self.reader.shapes[layer])
        kept = {module: keep_highest(scores[module], removed[module]) for module in MODULES}
        # Read again: holding the stored layer beside the one in the compute type would cost half as much more memory.
        return kept, scores, self._rewritten(self.reader.read_layer(layer), layer, kept, statistics)

    def _restored(self, layer: int) -> tuple[Kept, UnitScores, dict[str, Tensor]]:
        """What a killed run already wrote of a layer; its output is computed again, which gives the same bits."""
        record = self.writer.record(layer + 1)
        prefix = self.reader.layer_prefix(layer)
        with safe_open(self.writer.file(layer + 1), framework="pt") as f:
            tensors = {name.removeprefix(prefix): f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        scores = {
            ATTENTION: torch.tensor(record["scores"]["kv_groups"], dtype=torch.float64),
            FFN: torch.tensor(record["scores"]["intermediate_channels"], dtype=torch.float64),
        }
        return kept_from_entry(record), scores, tensors

    def _rewritten(
        self, tensors: dict[str, Tensor], layer: int, kept: Kept, statistics: LayerStatistics
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
        sizes = {
            "num_attention_heads": len(kept[ATTENTION]) * shape.heads_per_group,
            "num_key_value_heads": len(kept[ATTENTION]),
            "intermediate_size": len(kept[FFN]),
        }
        for name, value in (sizes | self.job.biases).items():
            setattr(config, name, value)
        return config

    def _write_layer(self, layer: int, tensors: dict[str, Tensor], record: Any) -> None:
        prefix = self.reader.layer_prefix(layer)
        self.writer.write(layer + 1, {prefix + name: t for name, t in tensors.items()}, record)

    def _copy_embeddings(self) -> None:
        if 0 not in self.writer.done:
            self.writer.write(0, self.reader.read([self.reader.family.embeddings]))

    def _copy_head(self) -> None:
        self.job.progress("prune", self.reader.layers, self.reader.layers)
        last = self.reader.layers + 1
        if last not in self.writer.done:
            self.writer.write(last, self.reader.read(self.reader.outside_layers()[1:]))
