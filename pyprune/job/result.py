"""Result of a pruning: units removed by layer, channels that blocks select, or zeros."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation.budget import KeptUnits, UnitScores
from ..architectures import ATTENTION, FFN, LayerShape
from ..architectures.channel_selection import (
    ATTENTION_OUT,
    FFN_MIDDLE,
    FFN_OUT,
    ChannelSelection,
    selected_parameters,
)
from ..checkpoint import ModelSource
from ..checkpoint.headers import load_stored, read_headers, weight_files
from ..errors import InputError
from ..evaluation.roundtrip import Change
from ..mask_training.masked_model import hook_points, selection_masks
from ..modeling.config import registered_config
from ..modeling.selected import selected_config
from ..modeling.stock import find_stock
from .entries import LayerEntry, SparseEntry, kept_shapes, layer_entry, selection_entry


class PruneResult(ABC):
    """`threshold` is the score that separates kept from removed over the model, where one does."""

    threshold: float | None = None

    @abstractmethod
    def parameters(self, shapes: list[LayerShape]) -> int:
        """Count the decoder linears' parameters after the pruning; shapes: of the dense layers."""

    @abstractmethod
    def layers(self) -> list[LayerEntry]:
        """The record's entry of each layer."""

    @abstractmethod
    def config(self, reader: ModelSource, biases: dict[str, bool]) -> tuple[Any, dict[str, Tensor]]:
        """Configuration of the pruned model, and what tensors its class needs beside the written ones."""

    def proof(self, reader: ModelSource, partial: Path) -> tuple[Path | ModelSource, Change | None]:
        """What the output's logits have to be those of: a model, and what to make of each of its layers.

        Unless said otherwise its own tensors, layer by layer.
        """
        return partial, None


@dataclass
class UnitResult(PruneResult):
    """KV groups and FFN channels that each layer keeps, and the scores of all."""

    choice: KeptUnits
    scores: list[UnitScores]

    def __post_init__(self) -> None:
        self.threshold = self.choice.threshold

    def parameters(self, shapes: list[LayerShape]) -> int:
        return sum(shape.parameters for shape in kept_shapes(shapes, self.choice))

    def layers(self) -> list[LayerEntry]:
        return [layer_entry(kept, own) for kept, own in zip(self.choice.layers, self.scores, strict=True)]

    def config(self, reader: ModelSource, biases: dict[str, bool]) -> tuple[Any, dict[str, Tensor]]:
        return config_of(reader, kept_shapes(reader.shapes, self.choice), biases)


def config_of(reader: ModelSource, shapes: list[LayerShape], biases: dict[str, bool]) -> tuple[Any, dict[str, Tensor]]:
    """A stock class's configuration where one holds layers of these shapes, with the zero biases that it asks for."""
    stock = find_stock(reader.family, reader.config, shapes, **biases)
    if reader.wrapping is not None:
        if stock is None or stock.family is not reader.family or stock.zero_biases:
            raise InputError(
                f"{reader.origin}: the text model inside of {reader.wrapping.wrapper.name} cannot have these sizes in "
                "transformers' class; take another ratio, or --units channels"
            )
        return stock.config, {}
    if stock is None:
        return registered_config(reader.family, reader.config, shapes, **biases), {}
    zeros = {
        reader.layer_prefix(layer) + name: torch.zeros(stock.tensors_of(own)[name], dtype=reader.dtype)
        for layer, own in enumerate(reader.layer_state_shapes)
        for name in stock.zero_biases
        if name in stock.tensors_of(own)
    }
    return stock.config, zeros


@dataclass
class SparseResult(PruneResult):
    """Zeros in the linears of layers whose shapes stay. entries: the record's, of each layer."""

    entries: list[SparseEntry]

    def parameters(self, shapes: list[LayerShape]) -> int:
        zeros = sum(own["zeros"] for entry in self.entries for own in entry["linears"].values())
        return sum(shape.parameters for shape in shapes) - zeros

    def layers(self) -> list[LayerEntry]:
        return [*self.entries]

    def config(self, reader: ModelSource, biases: dict[str, bool]) -> tuple[Any, dict[str, Tensor]]:
        return config_of(reader, reader.shapes, biases)


@dataclass
class SelectionResult(PruneResult):
    """Channels that each block reads and writes, and the logits of all."""

    selections: list[ChannelSelection]
    logits: list[dict[str, Tensor]]

    def counts(self) -> list[dict[str, int]]:
        return [{name: len(kept) for name, kept in own.items()} for own in self.selections]

    def parameters(self, shapes: list[LayerShape]) -> int:
        return sum(round(selected_parameters(*pair)) for pair in zip(shapes, self.counts(), strict=True))

    def layers(self) -> list[LayerEntry]:
        return [selection_entry(own, logits) for own, logits in zip(self.selections, self.logits, strict=True)]

    def config(self, reader: ModelSource, biases: dict[str, bool]) -> tuple[Any, dict[str, Tensor]]:
        return selected_config(reader.family, reader.config, self.counts(), **biases), {}

    def proof(self, reader: ModelSource, partial: Path) -> tuple[Path | ModelSource, Change | None]:
        """The dense model under masks, with its output projections' kept entries as they were written."""
        family = reader.family

        def change(layer: int, block: nn.Module) -> None:
            selection = self.selections[layer]
            for sublayer, rows in ((ATTENTION, ATTENTION_OUT), (FFN, FFN_OUT)):
                name = family.output_proj(sublayer) + ".weight"
                weight = block.get_parameter(name).data
                columns = selection[FFN_MIDDLE] if sublayer == FFN else torch.arange(weight.shape[1])
                full = reader.layer_prefix(layer) + name
                written = load_stored({full: stored[full]})[full]
                weight[selection[rows][:, None], columns] = written.to(weight.dtype)
            masks = selection_masks(reader.shapes[layer], selection, torch.device("cpu"), torch.float32)
            hook_points(
                block, family, lambda hook_point, value: value * masks[hook_point] if hook_point in masks else value
            )

        stored = read_headers(weight_files(partial, {}))
        return reader, change
