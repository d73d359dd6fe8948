"""The passes of methods that score and slice: calibration pass and rewrite, or layer by layer on pruned inputs."""

from torch import Tensor

from ..allocation.budget import Kept, KeptUnits, UnitScores, keep_highest
from ..architectures import SUBLAYERS
from ..checkpoint import CheckpointWriter
from ..forward.hidden_states import HiddenStates
from ..forward.layer_forward import LayerForward, layer_name
from ..job.entries import layer_entry
from ..job.job import Job
from ..job.result import PruneResult, UnitResult
from ..methods import LayerStatistics, ScoringMethod
from ..runtime import distributed
from ..runtime.device import Meter
from .base import Passes, build_dense, stored_layers
from .calibrate import cached_statistics, observe_layer, weight_statistics
from .rewrite import compensation_bias, rewrite_layer


class SlicingPasses(Passes):
    """Statistics of output projections, and slices with compensation biases; subclasses choose the units.

    Nothing here asks who scores: `by_window` is an argument, and whether biases are written is the job's method's to
    say.
    """

    def _count_nonfinite(self, layer: int, statistics: LayerStatistics) -> None:
        for sublayer, own in statistics.items():
            if own.nonfinite:
                self.nonfinite[layer_name(self.reader.family, layer, sublayer)] = own.nonfinite

    def _calibrate(self, by_window: bool) -> list[LayerStatistics]:
        meter = self.meters["calibration"] = Meter(self.device)
        if self.job.windows is None:
            return weight_statistics(self.reader, self.device, meter, self.job.progress)
        statistics_by_layer, self.cached = cached_statistics(self.job, by_window, meter)
        for layer, statistics in enumerate(statistics_by_layer):
            self._count_nonfinite(layer, statistics)
        return statistics_by_layer

    def _prune_by_choice(
        self, choice: KeptUnits, scores: list[UnitScores], statistics_by_layer: list[LayerStatistics]
    ) -> None:
        """Slice every layer as chosen beforehand; no forward."""
        meter = self.meters["prune"] = Meter(self.device)
        if self.device.type == "cuda":  # where the layers are on the device, with room: no forward runs
            self.writer.in_flight = self.writer.MOST_IN_FLIGHT
        self.lay_out_kept(choice.layers)
        self.copy_embeddings()
        records = [layer_entry(kept, own) for kept, own in zip(choice.layers, scores, strict=True)]
        # A layer of a killed run counts only if it keeps the same units as this choice.
        missing = [layer for layer, record in enumerate(records) if self.writer.record(layer + 1) != record]
        first = missing[0] if missing else len(records)
        for layer, source in stored_layers(self.job, "prune", meter, first):
            if layer in missing:
                with meter.stage("rewrite"):
                    pruned = self._rewritten(source, layer, choice.layers[layer], statistics_by_layer[layer])
                    self.write_layer(layer, pruned, records[layer])
        self.copy_head()

    def _rewritten(
        self, tensors: dict[str, Tensor], layer: int, kept: Kept, statistics: LayerStatistics
    ) -> dict[str, Tensor]:
        shape, family = self.reader.shapes[layer], self.reader.family
        bias = {}
        if self.job.method.adds_bias:
            for sublayer in shape.sublayers:
                weight = tensors[family.output_proj(sublayer) + ".weight"].to(self.device)
                mean = statistics[sublayer].mean
                assert mean is not None
                bias[sublayer] = compensation_bias(weight, mean, kept[sublayer], shape.unit_width(sublayer))
        return rewrite_layer(family, tensors, shape, kept, bias)


class ScoringPasses(SlicingPasses):
    """Units are chosen by scores; kept weights stay as they are."""

    def __init__(self, job: Job, writer: CheckpointWriter, method: ScoringMethod) -> None:
        super().__init__(job, writer)
        self.method = method

    def decide(self) -> PruneResult:
        if self.method.sequential:
            return UnitResult(*self._prune_in_sequence())
        statistics_by_layer = self._calibrate(self.method.by_window)
        scores = self.method.scores(statistics_by_layer, self.reader.shapes)
        choice = distributed.broadcast_object(lambda: self.method.choose(scores, self.reader.shapes, self.job.ratio))
        self._prune_by_choice(choice, scores, statistics_by_layer)
        return UnitResult(choice, scores)

    def _prune_in_sequence(self) -> tuple[KeptUnits, list[UnitScores]]:
        """Score, slice and propagate layer by layer: each sees the output of the pruned layers before it."""
        meter = self.meters["prune"] = Meter(self.device)
        counts = self.method.removed_counts(self.reader.shapes, self.job.ratio)
        self.lay_out_counts(counts)
        self.copy_embeddings()
        forward, last = self.job.forward(), self.reader.layers - 1
        hidden = forward.embed()
        layers: list[Kept] = []
        scores: list[UnitScores] = []
        for layer, source in stored_layers(self.job, "prune", meter):
            if layer + 1 in self.writer.done:
                kept, own, pruned = self.restored(layer)
            else:
                kept, own, pruned = self._chosen(forward, layer, source, hidden, counts[layer], meter)
                self.write_layer(layer, pruned, layer_entry(kept, own))
            layers.append(kept)
            scores.append(own)
            if layer < last:
                with meter.stage("second forward"):
                    forward.run(self.build_pruned(forward, pruned, layer, kept), layer, hidden, {})
            del pruned  # before the next one is made
        self.copy_head()
        return KeptUnits(layers), scores

    def _chosen(
        self,
        forward: LayerForward,
        layer: int,
        source: dict[str, Tensor],
        hidden: HiddenStates,
        removed: dict[str, int],
        meter: Meter,
    ) -> tuple[Kept, UnitScores, dict[str, Tensor]]:
        with meter.stage("forward"):
            block = build_dense(self.job, forward, source, layer)
            statistics = observe_layer(forward, block, layer, hidden, self.method.by_window, advance=False)
        del block
        self._count_nonfinite(layer, statistics)
        scores = self.method.unit_scores(statistics, self.reader.shapes[layer])
        kept = distributed.broadcast_object(
            lambda: {sublayer: keep_highest(scores[sublayer], removed[sublayer]) for sublayer in SUBLAYERS}
        )
        return kept, scores, self._rewritten(source, layer, kept, statistics)
