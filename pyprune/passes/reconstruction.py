"""The pass of methods that refit: layer by layer and module by module, each on the pruned output before it."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..allocation import Choice, Kept, UnitScores
from ..architectures import ATTENTION, FFN, MODULES, LayerShape
from ..checkpoint import CheckpointWriter
from ..curvature import Curvature, CurvatureObserver, alignment_of
from ..device import Meter
from ..forward import LayerForward, layer_name
from ..job import Job
from ..methods import LayerStatistics, SecondOrderMethod
from ..methods.second_order import CURVES, MOMENTS, NONE, Reconstruction
from ..plan import layer_entry
from ..residual_allocation import ErrorCurves
from ..rewrite import rewrite_layer
from .base import Passes, drain
from .curves import cached_curves
from .survey import cached_survey

logger = logging.getLogger(__name__)

# Below so many tokens for each channel of a driver the refit fits the text's noise rather than its moments.
TOKENS_A_CHANNEL = 4


@dataclass
class Streams:
    """Hidden states before the layer at hand: of the pruned model, and of the dense one where a target needs it."""

    pruned: Tensor
    dense: Tensor | None


class ReconstructionPasses(Passes):
    """Units are chosen by second moments, and the columns that stay are refitted."""

    def __init__(self, job: Job, writer: CheckpointWriter, method: SecondOrderMethod) -> None:
        super().__init__(job, writer)
        self.method = method

    @torch.no_grad()
    def execute(self) -> tuple[Choice, list[UnitScores]]:
        self._warn_of_few_tokens()
        counts = self._counts()
        meter = self.meters["prune"] = Meter(self.device)
        self.copy_embeddings()
        forward, last = self.job.forward(), self.reader.layers - 1
        hidden = forward.embed()
        streams = Streams(hidden, hidden.clone() if self.method.correction else None)
        layers: list[Kept] = []
        scores: list[UnitScores] = []
        for layer in range(self.reader.layers):
            self.job.progress("prune", layer, self.reader.layers)
            with meter.layer():
                if layer + 1 in self.writer.done:
                    kept, own = self._repeat(forward, layer, streams, layer < last)
                else:
                    kept, own = self._prune(forward, layer, streams, counts[layer], layer < last)
            layers.append(kept)
            scores.append(own)
        self.copy_head()
        return Choice(layers), scores

    def _warn_of_few_tokens(self) -> None:
        assert self.job.windows is not None
        tokens = self.job.windows.numel()
        widest = max(s.units(m) * s.unit_width(m) for s in self.reader.shapes for m in MODULES)
        if tokens < TOKENS_A_CHANNEL * widest:
            self._warn(
                f"{tokens} calibration tokens for up to {widest} channels of a driver: the refit overfits below "
                f"{TOKENS_A_CHANNEL} tokens a channel ({TOKENS_A_CHANNEL * widest}); raise --samples"
            )

    def _warn(self, message: str) -> None:
        logger.warning(message)
        self.warnings.append(message)

    def _counts(self) -> list[dict[str, int]]:
        curves: list[ErrorCurves] | None = None
        moments: list[LayerStatistics] | None = None
        if self.method.survey != NONE:
            meter = self.meters["survey"] = Meter(self.device)
            if self.method.survey == CURVES:
                curves, self.cached = cached_curves(self.job, self.method, meter)
            elif self.method.survey == MOMENTS:
                moments, self.cached = cached_survey(self.job, False, meter)
        return self.method.allocate(self.reader.shapes, self.job.options.ratio, curves, moments)

    def _prune(
        self, forward: LayerForward, layer: int, streams: Streams, counts: dict[str, int], advance: bool
    ) -> tuple[Kept, UnitScores]:
        """Choose, refit and write both modules of a layer; the streams advance past it unless it is the last."""
        shape = self.reader.shapes[layer]
        source = self.reader.read_layer(layer)
        original = block = forward.build(list(source.items()), layer)
        kept: Kept = {module: torch.arange(shape.units(module)) for module in MODULES}
        scores: UnitScores = {}
        bias: dict[str, Tensor] = {}
        weight: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for module in MODULES:
            if self.method.alignment and (layer, module) != (0, MODULES[0]):  # there both streams are the same
                self._align_inputs(forward, original, layer, module, streams, source)
                tensors = rewrite_layer(self.reader.family, source, shape, kept, bias, weight)
                block = self._build(forward, tensors, layer, shape, kept)
            chosen = self._reconstruct(forward, original, block, layer, module, streams, counts[module])
            kept[module], scores[module], weight[module] = chosen.kept, chosen.scores, chosen.weight
            if chosen.bias is not None:
                bias[module] = chosen.bias
            tensors = rewrite_layer(self.reader.family, source, shape, kept, bias, weight)
            if module == FFN:
                self.write_layer(layer, tensors, layer_entry(kept, scores))
            if advance or module == ATTENTION:
                # The next module reads what this one, as it is stored, puts out.
                block = self._build(forward, tensors, layer, shape, kept)
                self._advance(forward, block, layer, module, streams.pruned)
        return kept, scores

    def _align_inputs(
        self,
        forward: LayerForward,
        original: nn.Module,
        layer: int,
        module: str,
        streams: Streams,
        source: dict[str, Tensor],
    ) -> None:
        """W ← W (I + β D A) in `source` for the matrices that read the module's norm (`alignment_of`)."""
        assert streams.dense is not None
        name = self.reader.family.norm(module)
        where = f"layer {layer} ({name})"
        norm = original.get_submodule(name)
        hidden_size = self.reader.shapes[layer].hidden_size
        observer = CurvatureObserver(hidden_size, self.device, where, False, forward.allow_nonfinite)
        for dense, part in zip(forward.parts(streams.dense), forward.parts(streams.pruned), strict=True):
            x, goal = norm(forward.to_device(part)), norm(forward.to_device(dense))
            observer.observe_shortfall(observer.observe(x), goal.float() - x.float())
        change = alignment_of(observer.finish(), self.method.damping, where)  # [hidden, hidden]
        for matrix in self.reader.family.coupled(module):
            stored = source[matrix + ".weight"]
            weight = stored.to(self.device, torch.float32)
            source[matrix + ".weight"] = weight.addmm(weight, change, alpha=self.method.alignment).to(
                "cpu", stored.dtype
            )

    def _repeat(self, forward: LayerForward, layer: int, streams: Streams, advance: bool) -> tuple[Kept, UnitScores]:
        """Past a layer that a killed run wrote: both streams advance by what is stored, to the same bits."""
        kept, scores, tensors = self.restored(layer)
        if advance:
            shape = self.reader.shapes[layer]
            if streams.dense is not None:
                block = forward.build(self.reader.stream_layer(layer), layer)
                for module in MODULES:
                    self._advance(forward, block, layer, module, streams.dense)
            block = forward.build(drain(tensors), layer, self.layer_config(layer, shape, kept))
            for module in MODULES:
                self._advance(forward, block, layer, module, streams.pruned)
        return kept, scores

    def _build(
        self,
        forward: LayerForward,
        tensors: dict[str, Tensor],
        layer: int,
        shape: LayerShape,
        kept: Kept,
    ) -> nn.Module:
        """The layer with the modules pruned so far; a bias that is still to come is zero."""
        tensors = dict(tensors)
        if self.method.biased:
            for module in MODULES:
                tensors.setdefault(self.reader.family.driver(module) + ".bias", torch.zeros(shape.hidden_size))
        return forward.build(drain(tensors), layer, self.layer_config(layer, shape, kept))

    def _advance(self, forward: LayerForward, block: nn.Module, layer: int, module: str, hidden: Tensor) -> None:
        for part in forward.parts(hidden):
            part.copy_(forward.half(block, layer, module, forward.to_device(part)))

    def _reconstruct(
        self,
        forward: LayerForward,
        original: nn.Module,
        block: nn.Module,
        layer: int,
        module: str,
        streams: Streams,
        count: int,
    ) -> Reconstruction:
        where = layer_name(self.reader.family, layer, module)
        curvature = self._observe(forward, original, block, layer, module, streams, where)
        weight = block.get_parameter(self.reader.family.driver(module) + ".weight").data
        chosen = self.method.reconstruct(curvature, weight, count, self.reader.shapes[layer].unit_width(module), where)
        if chosen.damping != self.method.damping:
            self.warnings.append(
                f"{where}: its Hessian is not positive definite with damping {self.method.damping:g}; "
                f"{chosen.damping:g} was taken"
            )
        return chosen

    def _observe(
        self,
        forward: LayerForward,
        original: nn.Module,
        block: nn.Module,
        layer: int,
        module: str,
        streams: Streams,
        where: str,
    ) -> Curvature:
        """Curvature on the pruned stream; the dense stream, where there is one, advances past the module."""
        channels = block.get_parameter(self.reader.family.driver(module) + ".weight").shape[1]
        observer = CurvatureObserver(channels, self.device, where, self.method.centred, forward.allow_nonfinite)
        rows: list[Tensor] = []

        def observe(x: Tensor) -> None:
            rows[:] = [observer.observe(x)]

        dense_parts = forward.parts(streams.dense) if streams.dense is not None else None
        for part in forward.parts(streams.pruned):
            goal = None
            if dense_parts is not None:
                dense = next(dense_parts)
                goal = forward.half(original, layer, module, forward.to_device(dense))
                dense.copy_(goal)
            with forward.observed(block, {module: observe}):
                result = forward.half(block, layer, module, forward.to_device(part))
            if goal is not None:
                observer.observe_shortfall(rows[0], goal.float() - result.float())
        if observer.nonfinite:
            self.nonfinite[where] = observer.nonfinite
        return observer.finish()
