"""Quantities of a report: KV groups and FFN channels, or the selections of a DISP model."""

from dataclasses import dataclass
from typing import Any

from ..architectures.channel_selection import ATTENTION_IN, ATTENTION_OUT, FFN_IN, FFN_MIDDLE, FFN_OUT, SELECTIONS
from .plots import ATTENTION, FFN

_TITLES = {
    ATTENTION_IN: "Channels that the attention reads",
    ATTENTION_OUT: "Channels that the attention adds to",
    FFN_IN: "Channels that the FFN reads",
    FFN_MIDDLE: "FFN channels",
    FFN_OUT: "Channels that the FFN adds to",
}


@dataclass(frozen=True)
class Kind:
    """Something of which layers keep some.

    `key` in the plan's layers; `dense`: how many a dense layer has; `unit`, `plural`, `column`: what one, several and a
    table's column are called, each once in a report; `color` of its plots.
    """

    key: str
    dense: int
    title: str
    unit: str
    plural: str
    column: str
    color: str


def is_selected(plan: dict[str, Any]) -> bool:
    """Whether blocks select channels of the residual stream, as those of a DISP model do."""
    return ATTENTION_IN in plan["layers"][0]


def kinds(plan: dict[str, Any]) -> list[Kind]:
    """Those of the plan's layers, in the order in which they are shown."""
    dense = plan["dense"]
    if is_selected(plan):
        widths = dict.fromkeys(SELECTIONS, dense["hidden_size"]) | {FFN_MIDDLE: dense["intermediate_channels"]}
        colors = {name: ATTENTION if name in (ATTENTION_IN, ATTENTION_OUT) else FFN for name in SELECTIONS}
        words = {name: name.replace("_", " ") for name in SELECTIONS}
        return [
            Kind(name, widths[name], _TITLES[name], words[name], words[name], words[name], colors[name])
            for name in SELECTIONS
        ]
    unit, size = "head", f"{dense['head_dim']} channels a head"
    if dense["heads_per_group"] > 1:
        unit, size = "KV group", f"{dense['heads_per_group']} query heads each, {size}"
    attention = f"Attention: {unit}s ({size})"
    channels = dense["intermediate_channels"]
    return [
        Kind("kv_groups", dense["kv_groups"], attention, unit, f"{unit}s", f"{unit}s", ATTENTION),
        Kind(
            "intermediate_channels",
            channels,
            "FFN: intermediate channels",
            "channel",
            "channels",
            "FFN channels",
            FFN,
        ),
    ]
