"""Base class of passes: reading, building, writing and counting the layers of one job."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation.budget import Kept, KeptUnits, UnitScores
from ..allocation.residual import ErrorCurves
from ..architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from ..checkpoint import CheckpointWriter
from ..checkpoint.finite import check_finite
from ..checkpoint.headers import on_meta
from ..errors import InputError
from ..forward.forward_check import check_forward
from ..forward.layer_forward import LayerForward
from ..job.entries import LayerEntry, kept_from_entry, kept_shapes, scores_from_entry
from ..job.job import Job
from ..job.result import PruneResult, config_of
from ..mask_training.training import History
from ..runtime import distributed
from ..runtime.device import Meter
from .rewrite import pad_channels, rewrite_layer

# On a GPU a pruned layer's forward has an FFN in multiples of this: a whole tile of every type.
ROUND_CHANNELS = 64
# Tokens for each channel of an input below which a refit fits the text's noise rather than its moments.
TOKENS_A_CHANNEL = 4

logger = logging.getLogger(__name__)


def widest_output_proj(shapes: Sequence[LayerShape]) -> int:
    """The most channels that an output projection reads."""
    return max(shape.units(sublayer) * shape.unit_width(sublayer) for shape in shapes for sublayer in shape.sublayers)


def build_dense(job: Job, forward: LayerForward, stored: Mapping[str, Tensor], layer: int) -> nn.Module:
    """Load a layer as it is stored.

    On a CPU each tensor is mapped, converted and let go: pages of the file that were looked at count as memory as long
    as anything of that mapping lives.
    """
    items = job.reader.stream_layer(layer) if job.device.type == "cpu" else stored.items()
    return forward.build(items, layer)


def stored_layers(job: Job, what: str, meter: Meter, first: int = 0) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield layers in order with their tensors, which are freed at the next; shown and metered as pass `what`."""
    stored = job.loader().layers(first)
    for layer in range(first, job.reader.layers):
        job.progress(what, layer, job.reader.layers)
        with meter.layer():
            tensors = next(stored)
            check_finite(tensors, f"{job.reader.origin}: layer {layer}")
            yield layer, tensors
            del tensors  # the loader empties it, and what was taken out of it is its taker's
    job.progress(what, job.reader.layers, job.reader.layers)


class Passes(ABC):
    """Passes of one job. They write every part: embeddings, the layers, final norm and head.

    After `execute`: `meters` by pass; `cached`, whether the calibration pass came from the cache; `nonfinite`, by
    output projection, the NaN and Inf counted as zero; `warnings`, what the user should know of the result; `history`,
    of training; `curves`, by layer, the error curves that the allocation went by.
    """

    def __init__(self, job: Job, writer: CheckpointWriter) -> None:
        self.job, self.writer = job, writer
        self.reader, self.device = job.reader, job.device
        self.meters: dict[str, Meter] = {}
        self.cached = False
        self.nonfinite: dict[str, int] = {}
        self.warnings = job.warnings  # those of the start, and what comes
        self.history: History = []
        self.curves: list[ErrorCurves] = []

    def execute(self) -> PruneResult:
        """Run all passes. InputError, before anything is written: our forward differs from the model's.

        Without windows no pass runs a layer: what is stored is measured and sliced.
        """
        if self.job.windows is not None:
            check_forward(self.reader, self.job.windows, self.device, self.job.dtype)
        return self.decide()

    @abstractmethod
    def decide(self) -> PruneResult:
        """Run the passes, once the forward is known to be the model's."""

    def warn(self, message: str) -> None:
        """Log a warning, and put it in the record."""
        logger.warning(message)
        self.warnings.append(message)

    def warn_of_few_tokens(self, widest: int, what: str = "an output projection") -> None:
        """`widest`: the most channels of an input that weights are refitted to."""
        assert self.job.windows is not None
        tokens = self.job.windows.numel()
        if tokens < TOKENS_A_CHANNEL * widest:
            self.warn(
                f"{tokens} calibration tokens for up to {widest} channels of {what}: the refit overfits below "
                f"{TOKENS_A_CHANNEL} tokens a channel ({TOKENS_A_CHANNEL * widest}); raise --samples"
            )

    def written(self, layer: int) -> tuple[Any, dict[str, Tensor]]:
        """The entry, of whatever method's, and the tensors, named within the layer, of one that a killed run wrote."""
        prefix = self.reader.stored_name(self.reader.layer_prefix(layer))
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self.writer.read(layer + 1).items()}
        return self.writer.record(layer + 1), tensors

    def restored(self, layer: int) -> tuple[Kept, UnitScores, dict[str, Tensor]]:
        """Read a layer that a killed run already wrote; its output is recomputed, which gives the same bits."""
        record, tensors = self.written(layer)
        try:
            return kept_from_entry(record), scores_from_entry(record), tensors
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self.writer.partial}: layer {layer} was not written by {self.job.method.name} ({error!r}); delete "
                "that folder"
            ) from error

    def layer_config(self, layer: int, shape: LayerShape, kept: Kept) -> Any:
        """The dense configuration with one layer's pruned sizes, to build just that layer."""
        config = copy.copy(self.reader.config.per_layer_config[layer])
        sizes = self.reader.family.layer_sizes(shape.kept(len(kept[ATTENTION]), len(kept[FFN])))
        for name, value in (sizes | self.job.biases).items():
            setattr(config, name, value)
        return config

    def build_pruned(self, forward: LayerForward, tensors: dict[str, Tensor], layer: int, kept: Kept) -> nn.Module:
        """Load a pruned layer as a module. On a GPU a cut FFN is padded to a round size, for forwards only.

        A compensation bias that is still to come is zero.
        """
        shape, family = self.reader.shapes[layer], self.reader.family
        config = self.layer_config(layer, shape, kept)
        if self.device.type == "cuda" and len(kept[FFN]) < shape.intermediate_channels:
            channels = -(-len(kept[FFN]) // ROUND_CHANNELS) * ROUND_CHANNELS
            setattr(config, family.sizes[2], channels)
            tensors = pad_channels(family, tensors, channels)
        if self.job.method.adds_bias:
            zeros = torch.zeros(shape.hidden_size)
            tensors = {family.output_proj(sublayer) + ".bias": zeros for sublayer in shape.sublayers} | tensors
        return forward.build(tensors.items(), layer, config)

    def lay_out(self, layers: Sequence[Mapping[str, Tensor]], more: Mapping[str, Tensor]) -> None:
        """Plan the output's files, before the first layer is written.

        layers: the tensors that will be written of each, named within it; only shapes and types matter. more: those
        that the output's class needs beside them, `PruneResult.config`'s.
        """
        reader, outside = self.reader, self.reader.outside_layers()
        parts = [
            on_meta({name: reader.tensors[name] for name in outside[:1]}),
            *({reader.layer_prefix(k) + name: t for name, t in own.items()} for k, own in enumerate(layers)),
            on_meta({name: reader.tensors[name] for name in outside[1:]}),
        ]
        stored = [{reader.stored_name(name): t for name, t in part.items()} for part in parts]
        beside = [on_meta({name: reader.tensors[name] for name in reader.beside})] if reader.beside else []
        self.writer.lay_out([*stored, *beside, *([more] if more else [])], self.job.options.shard_size)
        self.writer.done = distributed.broadcast_object(lambda: self.writer.done)

    def lay_out_kept(self, layers: Sequence[Kept]) -> None:
        """As `lay_out`, from the units that each layer keeps, of which the numbers matter."""
        reader, job = self.reader, self.job
        written = []
        for layer, (shape, kept) in enumerate(zip(reader.shapes, layers, strict=True)):
            sublayers = shape.sublayers if job.method.adds_bias else ()
            bias = {sublayer: torch.empty(shape.hidden_size, device="meta") for sublayer in sublayers}
            written.append(rewrite_layer(reader.family, on_meta(reader.layer_tensors(layer)), shape, kept, bias))
        _, more = config_of(reader, kept_shapes(reader.shapes, KeptUnits(list(layers))), job.biases)
        self.lay_out(written, more)

    def lay_out_counts(self, counts: Sequence[Mapping[str, int]]) -> None:
        """As `lay_out`, from the number of units that are removed of each layer."""
        pairs = zip(self.reader.shapes, counts, strict=True)
        self.lay_out_kept([{m: torch.arange(shape.units(m) - own[m]) for m in SUBLAYERS} for shape, own in pairs])

    def write_layer(self, layer: int, tensors: dict[str, Tensor], entry: LayerEntry) -> None:
        check_finite({name: t for name, t in tensors.items() if t.is_floating_point()}, f"layer {layer} as pruned")
        prefix = self.reader.layer_prefix(layer)
        sources = [prefix + name for name in self.reader.layer_tensors(layer)]
        self._write(layer + 1, {prefix + name: t for name, t in tensors.items()}, sources, entry)

    def copy_embeddings(self) -> None:
        self._copy(0, [self.reader.family.embeddings])

    def copy_head(self) -> None:
        """Copy the final norm and the head, and what a vision-language checkpoint has beside its text model."""
        self._copy(self.reader.layers + 1, self.reader.outside_layers()[1:])
        self._copy_beside(self.reader.layers + 2)

    def _copy_beside(self, part: int) -> None:
        names = self.reader.beside
        if names and part not in self.writer.done:
            digests = self.reader.digests(names)
            for name, digest in digests.items():
                self.reader.content.saw(name, digest)
            self.writer.write(part, self.reader.read(names), None, digests)

    def _copy(self, part: int, names: list[str]) -> None:
        if part not in self.writer.done:
            self._write(part, self.reader.read(names), names)

    def _write(self, part: int, tensors: dict[str, Tensor], sources: list[str], record: Any = None) -> None:
        digests = self.reader.content.digests
        stored = {self.reader.stored_name(name): tensor for name, tensor in tensors.items()}
        self.writer.write(part, stored, record, {name: digests[name] for name in sources})
