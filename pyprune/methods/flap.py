from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..allocation.budget import (
    KeptUnits,
    RemovedCounts,
    UnitScores,
    check_ratio,
    choose_above,
    choose_by_counts,
    choose_globally,
    counts_of,
    total_cost,
    uniform_counts,
)
from ..allocation.common_size import common_counts
from ..allocation.rounding import rounded_counts, worth_by_scores
from ..architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from ..calibration.channel_statistics import ChannelStatistics
from ..errors import InputError
from .base import LayerStatistics, ScoringMethod, compensation_option, no_scores
from .options import option
from .registry import register

METRICS = ("IFV", "WIFV", "WIFN")
STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")
MODES = ("exact", "reference")


@register
@dataclass(frozen=True)
class Flap(ScoringMethod):
    """FLAP: fluctuation of each channel, global adaptive search, bias compensation (arXiv 2312.11983).

    `metric`: IFV v_j; WIFV v_j Σ_o W_oj²; WIFN mean_o |W_oj| sqrt(s_j).
    `structure`: UL/AL uniform or adaptive over layers; UM/MM/AM the attention's share equal, manual
    (`attention_ratio`), or adaptive; with `uniform` UL-UM unless said.
    `mode`: `exact` meets the budget with the unbiased variance and true unit costs; `reference` computes what the
    authors' code computes, for comparison with published numbers (the README names the differences).
    `square_attention` squares the attention's channel scores before z-scoring: unless said, in `reference` mode only.
    """

    name = "flap"
    source = "arXiv 2312.11983 (FLAP, An et al.)"
    uniform_defaults: ClassVar[dict[str, Any]] = {"structure": "UL-UM"}
    compensation: str | None = compensation_option("bias", "none")
    metric: str = option("WIFV", choices=METRICS, help="Importance of a channel.")
    structure: str = option(
        "AL-AM", choices=STRUCTURES, help="Uniform (UL) or adaptive (AL) over layers, and the attention's share."
    )
    mode: str = option("exact", choices=MODES, help="exact meets the budget; reference computes as the authors' code.")
    square_attention: bool | None = option(
        None, help="Square attention scores, as the authors' code does.", default_text="with --mode reference"
    )
    attention_ratio: float | None = option(
        None, help="The attention's own ratio, with the structures UL-MM and AL-MM; of --layers alone, if given."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uniform and not self.sizes_known:
            raise InputError(
                f"--uniform makes all layers alike, --structure {self.structure} does not: leave one of them out, or "
                "take UL-UM or UL-MM"
            )
        if self.attention_ratio is not None and not self.structure.endswith("MM"):
            raise InputError("attention_ratio goes with the structures UL-MM and AL-MM only")
        if self.square_attention is None:
            object.__setattr__(self, "square_attention", self.mode == "reference")  # the class is frozen

    def default_multiple(self, shapes: list[LayerShape]) -> int:
        return 1 if self.mode == "reference" else super().default_multiple(shapes)

    @property
    def by_window(self) -> bool:
        return self.mode == "reference"

    @property
    def sizes_known(self) -> bool:
        return self.structure.startswith("UL")

    def channel_scores(self, statistics: ChannelStatistics, sublayer: str) -> Tensor:
        if self.metric == "WIFN":
            score = statistics.weight_mean.double() * statistics.input_squares().sqrt()
        else:
            if self.mode == "reference":
                assert statistics.reference_fluctuation is not None
                score = statistics.reference_fluctuation
            else:
                score = statistics.fluctuation()
            if self.metric == "WIFV":
                score = score * statistics.weight_squares.double()
        return score**2 if sublayer == ATTENTION and self.square_attention else score

    def unit_scores(self, layer: LayerStatistics, shape: LayerShape) -> UnitScores:
        """UL: sums over a unit's channels. AL: means of the channels' z-scores within layer and sublayer."""
        if self.sizes_known:
            return super().unit_scores(layer, shape)
        return {
            sublayer: standardise(self.channel_scores(layer[sublayer], sublayer))
            .reshape(shape.units(sublayer), shape.unit_width(sublayer))
            .mean(1)
            if sublayer in layer
            else no_scores()
            for sublayer in SUBLAYERS
        }

    def counts_within(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts:
        if self.uniform:
            return common_counts(shapes, ratio, self.multiple, self.attention_ratio)
        return super().counts_within(shapes, ratio)

    def unrounded_counts(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts:
        return uniform_counts(shapes, ratio, self.attention_ratio, self.multiple)

    def check_within(self, shapes: list[LayerShape], ratio: float) -> None:
        super().check_within(shapes, ratio)
        if self.structure == "AL-MM":
            self.unrounded_counts(shapes, ratio)

    def choose_within(self, scores: list[UnitScores], shapes: list[LayerShape], ratio: float) -> KeptUnits:
        if self.sizes_known:
            return super().choose_within(scores, shapes, ratio)
        choice = self._choose_adaptively(scores, shapes, ratio)
        if self.multiple == 1:
            return choice
        counts = rounded_counts(counts_of(choice, shapes), shapes, ratio, self.multiple, worth_by_scores(scores))
        return choose_by_counts(scores, counts)

    def _choose_adaptively(self, scores: list[UnitScores], shapes: list[LayerShape], ratio: float) -> KeptUnits:
        """The structures AL: over the whole model; at least `multiple` channels stay in every layer."""
        check_ratio(shapes, ratio, self.multiple)
        if self.structure == "AL-AM":
            if self.mode == "reference":
                return choose_above(scores, shapes, reference_threshold(scores, shapes, ratio), self.multiple)
            return choose_globally(scores, shapes, ratio * total_cost(shapes), least=self.multiple)
        # AL-MM: the same number of units of each sublayer as with uniform layers, taken from the whole model.
        counts = self.unrounded_counts(shapes, ratio)
        attention = sum(c[ATTENTION] * s.group_cost for c, s in zip(counts, shapes, strict=True))
        groups = choose_globally(scores, shapes, attention, (ATTENTION,))
        channels = choose_globally(scores, shapes, sum(c[FFN] for c in counts), (FFN,), self.multiple)
        return KeptUnits(
            [{ATTENTION: g[ATTENTION], FFN: c[FFN]} for g, c in zip(groups.layers, channels.layers, strict=True)]
        )


def standardise(scores: Tensor) -> Tensor:
    """z-scores over the channels of one output projection, unbiased standard deviation; equal scores are all 0."""
    spread = scores.std()
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def reference_threshold(scores: list[UnitScores], shapes: list[LayerShape], ratio: float) -> float:
    """The authors' threshold: a KV group costs int(head_dim (2r + 2) / 3), 170 for 128-wide heads where 512/3 was
    meant; units in descending order; the score at argmin |cumsum(cost) - (1 - ratio) total|."""
    rows, costs = [], []
    for sublayer in SUBLAYERS:
        for own, shape in zip(scores, shapes, strict=True):
            if not shape.removable(sublayer):
                continue
            rows.append(own[sublayer])
            costs.append(torch.full((len(own[sublayer]),), int(shape.unit_cost(sublayer)), dtype=torch.int64))
    score, cost = torch.cat(rows), torch.cat(costs)
    order = torch.sort(score, descending=True, stable=True).indices
    kept = torch.cumsum(cost[order], 0)
    at = int((kept - float(cost.sum()) * (1 - ratio)).abs().argmin())
    return float(score[order[at]])
