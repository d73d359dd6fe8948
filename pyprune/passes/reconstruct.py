"""The pass of methods that refit: layer by layer and sublayer by sublayer, each on the pruned output before it."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor, nn

from ..allocation.budget import Kept, KeptUnits, UnitScores
from ..allocation.residual import ErrorCurves
from ..architectures import ATTENTION, FFN, SUBLAYERS
from ..calibration.second_moments import HessianObserver, SecondMoments, alignment_of
from ..checkpoint import CheckpointWriter
from ..forward.hidden_states import HiddenStates, MicroBatch
from ..forward.layer_forward import LayerForward, layer_name
from ..forward.token_weights import TokenWeights
from ..job.entries import layer_entry
from ..job.job import Job
from ..job.result import PruneResult, UnitResult
from ..methods import LayerStatistics, SecondOrderMethod
from ..methods.base import no_scores
from ..methods.second_order import CURVES, MOMENTS, NONE, Reconstruction
from ..ops.precision import tf32_products
from ..runtime import distributed
from ..runtime.device import Meter
from .base import Passes, build_dense, stored_layers, widest_output_proj
from .calibrate import cached_statistics
from .error_curves import cached_curves
from .rewrite import rewrite_layer


@dataclass
class Streams:
    """Hidden states before the layer at hand: of the pruned model, and of the dense one where a target needs it."""

    pruned: HiddenStates
    dense: HiddenStates | None

    def pairs(self) -> Iterator[tuple[MicroBatch, MicroBatch | None]]:
        """Micro-batches of both, (pruned, dense or None)."""
        dense = self.dense.micro_batches() if self.dense is not None else repeat(None)
        return zip(self.pruned.micro_batches(), dense, strict=False)


class ReconstructionPasses(Passes):
    """Units are chosen by second moments, and the columns that stay are refitted."""

    def __init__(self, job: Job, writer: CheckpointWriter, method: SecondOrderMethod) -> None:
        super().__init__(job, writer)
        self.method = method
        self.wiring = self.reader.family.wiring_of(self.reader.config)
        self.changes: dict[str, Tensor] = {}  # by sublayer that reads the stream next: D A [hidden, hidden]

    @torch.no_grad()
    def decide(self) -> PruneResult:
        self.warn_of_few_tokens(widest_output_proj(self.reader.shapes))
        counts = self._counts()
        self.meter = self.meters["prune"] = Meter(self.device)
        self.lay_out_counts(counts)
        self.copy_embeddings()
        forward, last = self.job.forward(), self.reader.layers - 1
        hidden = forward.embed()
        streams = Streams(hidden, forward.copy(hidden) if self.method.effective_target_share else None)
        layers: list[Kept] = []
        scores: list[UnitScores] = []
        for layer, stored in stored_layers(self.job, "prune", self.meter):
            if layer + 1 in self.writer.done:
                kept, own = self._repeat(forward, layer, stored, streams, layer < last)
            else:
                kept, own = self._prune(forward, layer, stored, streams, counts[layer], layer < last)
            layers.append(kept)
            scores.append(own)
        self.copy_head()
        return UnitResult(KeptUnits(layers), scores)

    def _counts(self) -> list[dict[str, int]]:
        curves: list[ErrorCurves] | None = None
        moments: list[LayerStatistics] | None = None
        if self.method.dense_statistics != NONE:
            meter = self.meters["calibration"] = Meter(self.device)
            if self.method.dense_statistics == CURVES:
                curves, self.cached = cached_curves(self.job, self.method, meter)
                self.curves = curves
            elif self.method.dense_statistics == MOMENTS:
                moments, self.cached = cached_statistics(self.job, False, meter)
        return distributed.broadcast_object(
            lambda: self.method.allocate(self.reader.shapes, self.job.ratio, curves, moments)
        )

    def _prune(
        self,
        forward: LayerForward,
        layer: int,
        stored: dict[str, Tensor],
        streams: Streams,
        counts: dict[str, int],
        advance: bool,
    ) -> tuple[Kept, UnitScores]:
        """Choose, refit and write both sublayers of a layer; the streams advance past it unless it is the last."""
        shape, family = self.reader.shapes[layer], self.reader.family
        source = dict(stored)
        stored.clear()  # the loader holds it too: what is replaced in `source` is free at once
        dense = build_dense(self.job, forward, source, layer)
        norms = self._next_norms(dense, layer)
        original: nn.Module | None = dense
        del dense
        kept: Kept = {sublayer: torch.arange(shape.units(sublayer)) for sublayer in SUBLAYERS}
        scores: UnitScores = {}
        bias: dict[str, Tensor] = {}
        weight: dict[str, Tensor] = {}
        block: nn.Module | None = original
        for sublayer in SUBLAYERS:
            assert original is not None
            if sublayer in self.changes:
                with self.meter.stage("alignment"):
                    self._align(sublayer, source)
                block = None
            if block is None:
                tensors = rewrite_layer(family, source, shape, kept, bias, weight)
                block = self.build_pruned(forward, tensors, layer, kept)
                del tensors
            if sublayer not in shape.sublayers:
                scores[sublayer] = no_scores()
                self._pass(forward, original, block, layer, sublayer, streams)
                continue
            second_moments = self._observe(forward, original, block, layer, sublayer, streams)
            own = block.get_parameter(family.output_proj(sublayer) + ".weight").data
            gain = forward.gain(block, sublayer)
            block = None
            if sublayer == FFN:
                original = None  # the dense layer is through; what follows takes its memory
            chosen = self._reconstruct(second_moments, own, gain, layer, sublayer, counts[sublayer])
            del second_moments, own, gain
            kept[sublayer], scores[sublayer] = chosen.kept, chosen.scores
            if self.method.refits:  # else the stored columns are sliced, whatever the compute type
                weight[sublayer] = chosen.weight
            if chosen.bias is not None:
                bias[sublayer] = chosen.bias
            del chosen
            tensors = rewrite_layer(family, source, shape, kept, bias, weight)
            if sublayer == FFN:
                source.clear()
                self.write_layer(layer, tensors, layer_entry(kept, scores))
            if advance or sublayer == ATTENTION:
                # The next sublayer reads what this one, as it is stored, puts out.
                block = self.build_pruned(forward, tensors, layer, kept)
                with self.meter.stage("second forward"):
                    self._advance(forward, block, layer, sublayer, streams, norms.get(sublayer, {}))
            del tensors
        return kept, scores

    def _next_norms(self, block: nn.Module, layer: int) -> dict[str, dict[str, nn.Module]]:
        """By sublayer, the norms that read the stream after it, by the sublayers that read these; none without input
        share. Those after the FFN are the next layer's: of the attention, and of an FFN parallel to it with its own.
        """
        if not self.method.effective_input_share:
            return {}
        wiring = self.wiring
        if not wiring.before:  # the sublayers read the stream itself
            return {ATTENTION: {FFN: nn.Identity()}, FFN: {ATTENTION: nn.Identity()}}
        norms: dict[str, dict[str, nn.Module]] = {}
        if not wiring.parallel:
            norms[ATTENTION] = {FFN: block.get_submodule(str(wiring.norm_before(FFN)))}
        if layer + 1 < self.reader.layers:
            readers = SUBLAYERS if wiring.parallel and not wiring.shares_norm else (ATTENTION,)
            norms[FFN] = {
                reader: self._norm_of_next(block, layer, str(wiring.norm_before(reader))) for reader in readers
            }
        return norms

    def _norm_of_next(self, block: nn.Module, layer: int, norm: str) -> nn.Module:
        """A norm of the next layer, as stored; `block` has the same."""
        own = copy.deepcopy(block.get_submodule(norm))
        prefix = f"{self.reader.layer_prefix(layer + 1)}{norm}."
        stored = self.reader.read([prefix + name for name in own.state_dict()])
        state = {name.removeprefix(prefix): t.to(self.device, self.job.dtype) for name, t in stored.items()}
        own.load_state_dict(state, assign=True)
        return own

    def _align(self, sublayer: str, source: dict[str, Tensor]) -> None:
        """W ← W (I + β D A) in `source` for the matrices that read the sublayer's norm (`alignment_of`).

        In TF32: what it adds is small, and W is rounded to the stored type in the end.
        """
        change = self.changes.pop(sublayer)  # D A [hidden, hidden]
        family = self.reader.family
        matrices = family.input_projs(sublayer)
        if sublayer == ATTENTION and self.wiring.shares_norm:
            matrices += family.input_projs(FFN)
        for matrix in matrices:
            if matrix + ".weight" not in source:  # a layer of another kind
                continue
            stored = source[matrix + ".weight"]
            weight = stored.to(self.device, torch.float32)
            with tf32_products() if stored.dtype != torch.float32 else nullcontext():
                aligned = weight.addmm(weight, change, alpha=self.method.effective_input_share)
            source[matrix + ".weight"] = aligned.to(stored.device, stored.dtype)

    def _pass(
        self,
        forward: LayerForward,
        original: nn.Module,
        block: nn.Module,
        layer: int,
        sublayer: str,
        streams: Streams,
    ) -> None:
        """Advance both streams past a sublayer without units; the pruned one by the layer as it is by now."""
        for part, dense in streams.pairs():
            if dense is not None:
                forward.step(original, layer, sublayer, dense)
            forward.step(block, layer, sublayer, part)

    def _repeat(
        self, forward: LayerForward, layer: int, stored: Mapping[str, Tensor], streams: Streams, advance: bool
    ) -> tuple[Kept, UnitScores]:
        """Advance both streams past a layer that a killed run wrote: by the stored tensors, to the same bits."""
        kept, scores, tensors = self.restored(layer)
        if advance:
            if streams.dense is not None:
                block = build_dense(self.job, forward, stored, layer)
                for sublayer in SUBLAYERS:
                    for part in streams.dense.micro_batches():
                        forward.step(block, layer, sublayer, part)
            block = self.build_pruned(forward, tensors, layer, kept)
            self._advance(forward, block, layer, ATTENTION, streams)
            self._advance(forward, block, layer, FFN, streams, self._next_norms(block, layer).get(FFN, {}))
        return kept, scores

    def _advance(
        self,
        forward: LayerForward,
        block: nn.Module,
        layer: int,
        sublayer: str,
        streams: Streams,
        norms: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Advance the pruned stream past a sublayer; the dense one is past it already.

        `norms`: those that read the stream next, by their sublayers. Sets `self.changes` of these to D A
        (`alignment_of`) from the norms' outputs on the dense and pruned streams.
        """
        if not norms:
            for part in streams.pruned.micro_batches():
                forward.step(block, layer, sublayer, part)
            return
        where = f"layer {layer} (after {self.reader.family.output_proj(sublayer)})"
        hidden_size = self.reader.shapes[layer].hidden_size
        observers = {
            reader: HessianObserver(hidden_size, self.device, where, False, forward.allow_nonfinite) for reader in norms
        }
        for part, dense in streams.pairs():
            assert dense is not None
            result = forward.run_sublayer(block, layer, sublayer, part.value)
            part.write_back(result)
            for reader, norm in norms.items():
                x = norm(result)
                observers[reader].observe_stream_error(observers[reader].observe(x), norm(dense.value) - x)
        for reader in norms:
            change = alignment_of(observers.pop(reader).result(), self.method.damping, where)
            distributed.broadcast_(change)
            self.changes[reader] = change

    def _reconstruct(
        self,
        second_moments: SecondMoments,
        weight: Tensor,
        gain: Tensor | None,
        layer: int,
        sublayer: str,
        count: int,
    ) -> Reconstruction:
        """gain: of the norm behind the output projection; errors and targets are those behind it."""
        where = layer_name(self.reader.family, layer, sublayer)
        with self.meter.stage("choice and refit"):
            width = self.reader.shapes[layer].unit_width(sublayer)
            seen = weight if gain is None else weight * gain[:, None]
            chosen = self.method.reconstruct(second_moments, seen, count, width, where)
            if gain is not None:
                bias = None if chosen.bias is None else chosen.bias / gain
                chosen = replace(chosen, weight=chosen.weight / gain[:, None], bias=bias)
            # Devices of two kinds would round, and in a close call choose, in their own ways.
            distributed.broadcast_(chosen.kept, chosen.weight, chosen.bias, chosen.scores)
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
        sublayer: str,
        streams: Streams,
    ) -> SecondMoments:
        """Second moments on the pruned stream; the dense stream, where there is one, advances past the sublayer."""
        where = layer_name(self.reader.family, layer, sublayer)
        output_proj = self.reader.family.output_proj(sublayer)
        channels = block.get_parameter(output_proj + ".weight").shape[1]
        observer = HessianObserver(channels, self.device, where, self.method.centred, forward.allow_nonfinite)
        rows: list[Tensor] = []

        def observe(x: Tensor, weights: TokenWeights | None = None) -> None:
            with self.meter.stage("hessian"):
                rows[:] = [observer.observe(x, weights)]
                token_weights[:] = [weights]

        token_weights: list[TokenWeights | None] = []

        for part, dense in streams.pairs():
            goal = None
            if dense is not None:
                with self.meter.stage("dense forward"):
                    goal = forward.step(original, layer, sublayer, dense)
            with self.meter.stage("forward and hessian"), forward.observed(block, {output_proj: observe}):
                result = forward.run_sublayer(block, layer, sublayer, part.value)
            if goal is not None:
                with self.meter.stage("stream error"):
                    observer.observe_stream_error(rows.pop(), goal - result, token_weights.pop())
            rows.clear()
        second_moments = observer.result()
        if observer.nonfinite:
            self.nonfinite[where] = observer.nonfinite
        return second_moments
