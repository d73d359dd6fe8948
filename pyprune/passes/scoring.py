"""The passes of methods that score and slice: survey and rewrite, or layer by layer on pruned inputs."""

from torch import Tensor

from ..allocation import Choice, Kept, UnitScores, keep_highest
from ..architectures import MODULES
from ..checkpoint import CheckpointWriter
from ..device import Meter
from ..forward import LayerForward, layer_name
from ..job import Job
from ..methods import LayerStatistics, ScoringMethod
from ..plan import layer_entry
from ..rewrite import compensation_bias, rewrite_layer
from .base import Passes, drain
from .survey import cached_survey, observe_layer, survey_weights


class ScoringPasses(Passes):
    """Units are chosen by scores; kept weights stay as they are."""

    def __init__(self, job: Job, writer: CheckpointWriter, method: ScoringMethod) -> None:
        super().__init__(job, writer)
        self.method = method

    def execute(self) -> tuple[Choice, list[UnitScores]]:
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
        survey, self.cached = cached_survey(self.job, self.method.by_window, meter)
        return survey

    def _prune_by_choice(self, choice: Choice, scores: list[UnitScores], survey: list[LayerStatistics]) -> None:
        """Slice every layer as chosen beforehand; no forward."""
        meter = self.meters["prune"] = Meter(self.device)
        self.copy_embeddings()
        for layer, kept in enumerate(choice.layers):
            self.job.progress("prune", layer, self.reader.layers)
            record = layer_entry(kept, scores[layer])
            # A shard of a killed run counts only if it keeps the same units as this choice.
            if self.writer.record(layer + 1) != record:
                with meter.layer():
                    tensors = self.reader.read_layer(layer)
                    self.write_layer(layer, self._rewritten(tensors, layer, kept, survey[layer]), record)
        self.copy_head()

    def _prune_in_sequence(self) -> tuple[Choice, list[UnitScores]]:
        """Score, slice and propagate layer by layer: each sees the output of the pruned layers before it."""
        meter = self.meters["prune"] = Meter(self.device)
        self.copy_embeddings()
        counts = self.method.counts(self.reader.shapes, self.job.options.ratio)
        forward, last = self.job.forward(), self.reader.layers - 1
        hidden = forward.embed()
        layers: list[Kept] = []
        scores: list[UnitScores] = []
        for layer, shape in enumerate(self.reader.shapes):
            self.job.progress("prune", layer, self.reader.layers)
            with meter.layer():
                if layer + 1 in self.writer.done:
                    kept, own, pruned = self.restored(layer)
                else:
                    kept, own, pruned = self._chosen(forward, layer, hidden, counts[layer])
                    self.write_layer(layer, pruned, layer_entry(kept, own))
                layers.append(kept)
                scores.append(own)
                if layer < last:
                    config = self.layer_config(layer, shape, kept)
                    forward.run(forward.build(drain(pruned), layer, config), layer, hidden, {})
        self.copy_head()
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
