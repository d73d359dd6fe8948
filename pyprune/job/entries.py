"""Entries of a record by layer: units that stay, channels that blocks select, or zeros."""

from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from ..allocation.budget import KeptUnits, UnitScores
from ..architectures import ATTENTION, FFN, LayerShape
from ..architectures.channel_selection import (
    ATTENTION_IN,
    ATTENTION_OUT,
    FFN_IN,
    FFN_MIDDLE,
    FFN_OUT,
    ChannelSelection,
)


class UnitScoresEntry(TypedDict):
    """Score of every unit of a dense layer."""

    kv_groups: list[float]
    intermediate_channels: list[float]


class UnitEntry(TypedDict):
    """Indices of the units that a layer keeps, and the scores of all."""

    kv_groups: list[int]
    intermediate_channels: list[int]
    scores: UnitScoresEntry


class SelectionEntry(TypedDict):
    """Indices of the channels in each selection of a DISP model's layer, and the logits of all channels."""

    attention_in: list[int]
    attention_out: list[int]
    ffn_in: list[int]
    ffn_middle: list[int]
    ffn_out: list[int]
    scores: dict[str, list[float]]


class LinearEntry(TypedDict):
    """Weights of a linear, how many of them are zero, and the share of its output's energy that the zeros cost."""

    weights: int
    zeros: int
    loss: NotRequired[float]


class SparseEntry(TypedDict):
    """Linears of a layer with zeros, by their names within it."""

    linears: dict[str, LinearEntry]


# Names of the kinds of units in a record.
UNIT_NAMES = {ATTENTION: "kv_groups", FFN: "intermediate_channels"}

LayerEntry = UnitEntry | SelectionEntry | SparseEntry


def kept_shapes(shapes: list[LayerShape], choice: KeptUnits) -> list[LayerShape]:
    return [s.kept(len(k[ATTENTION]), len(k[FFN])) for s, k in zip(shapes, choice.layers, strict=True)]


def layer_entry(kept: dict[str, Tensor], scores: UnitScores) -> UnitEntry:
    """Entry of a layer that loses units; scores have six significant digits."""
    return {
        "kv_groups": kept[ATTENTION].tolist(),
        "intermediate_channels": kept[FFN].tolist(),
        "scores": {
            "kv_groups": _six_digits(scores[ATTENTION]),
            "intermediate_channels": _six_digits(scores[FFN]),
        },
    }


def kept_from_entry(entry: UnitEntry) -> dict[str, Tensor]:
    kept = {ATTENTION: entry["kv_groups"], FFN: entry["intermediate_channels"]}
    return {sublayer: torch.tensor(indices, dtype=torch.int64) for sublayer, indices in kept.items()}


def scores_from_entry(entry: UnitEntry) -> UnitScores:
    scores = {ATTENTION: entry["scores"]["kv_groups"], FFN: entry["scores"]["intermediate_channels"]}
    return {sublayer: torch.tensor(own, dtype=torch.float64) for sublayer, own in scores.items()}


def selection_entry(selection: ChannelSelection, logits: dict[str, Tensor]) -> SelectionEntry:
    """Entry of a layer of a DISP model; logits have six significant digits."""
    return {
        "attention_in": selection[ATTENTION_IN].tolist(),
        "attention_out": selection[ATTENTION_OUT].tolist(),
        "ffn_in": selection[FFN_IN].tolist(),
        "ffn_middle": selection[FFN_MIDDLE].tolist(),
        "ffn_out": selection[FFN_OUT].tolist(),
        "scores": {name: _six_digits(own) for name, own in logits.items()},
    }


def sparse_entry(linears: dict[str, tuple[int, int, float | None]]) -> SparseEntry:
    """Entry of a layer with zeros, from each linear's weights, zeros, and loss where it is known."""
    entry: SparseEntry = {"linears": {}}
    for name, (weights, zeros, loss) in linears.items():
        entry["linears"][name] = {"weights": weights, "zeros": zeros}
        if loss is not None:
            entry["linears"][name]["loss"] = float(f"{loss:.6g}")
    return entry


def _six_digits(numbers: Tensor) -> list[float]:
    return [float(f"{number:.6g}") for number in numbers.tolist()]
