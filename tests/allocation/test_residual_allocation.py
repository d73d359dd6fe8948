"""Residual allocation: hulls, the budget, and that curves decide; incremental ratios by depth."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.allocation.budget import total_cost
from pyprune.allocation.depth_schedule import incremental_counts
from pyprune.allocation.residual import error_curve, hull_segments, residual_counts
from pyprune.architectures import ATTENTION, FFN, LayerShape
from pyprune.errors import InputError

SHAPE = LayerShape(hidden_size=64, head_dim=16, kv_groups=4, heads_per_group=2, intermediate_channels=160)


def cost_of(counts: list[dict[str, int]], shapes: list[LayerShape]) -> float:
    return sum(c[ATTENTION] * s.group_cost + c[FFN] for c, s in zip(counts, shapes, strict=True))


def test_hull_of_a_convex_curve_is_the_curve() -> None:
    errors = torch.tensor([0.0, 1.0, 3.0, 6.0], dtype=torch.float64)
    segments = hull_segments(errors, 2.0, 5, FFN)
    assert [(s.slope, s.units, s.layer, s.sublayer) for s in segments] == [
        (0.5, 1, 5, FFN),
        (1.0, 1, 5, FFN),
        (1.5, 1, 5, FFN),
    ]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
@settings(deadline=None)
def test_hull_lies_below_and_touches(steps: list[float]) -> None:
    errors = torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0)
    segments = hull_segments(errors, 1.0, 0, FFN)
    assert sum(s.units for s in segments) == len(steps)
    at, value = 0, 0.0
    for previous, segment in zip([None, *segments], segments, strict=False):
        assert previous is None or segment.slope >= previous.slope - 1e-9
        for n in range(1, segment.units + 1):
            assert value + n * segment.slope <= float(errors[at + n]) + 1e-6
        at, value = at + segment.units, value + segment.units * segment.slope
        assert value == pytest.approx(float(errors[at]), abs=1e-6)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.8])
def test_budget_is_met_to_half_a_channel(ratio: float) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [SHAPE] * 3
    curves = [
        {
            ATTENTION: torch.rand(4, generator=generator, dtype=torch.float64).cumsum(0) * 20,
            FFN: torch.rand(160, generator=generator, dtype=torch.float64).sort().values.cumsum(0),
        }
        for _ in shapes
    ]
    counts = residual_counts(curves, shapes, ratio)
    assert abs(cost_of(counts, shapes) - ratio * total_cost(shapes)) <= 0.5 + 1e-9
    assert all(0 <= c[ATTENTION] < 4 and 0 <= c[FFN] < 160 for c in counts)


def test_the_cheaper_layer_loses_more() -> None:
    ramp = torch.arange(160, dtype=torch.float64).square()
    dear = {ATTENTION: torch.tensor([0.0, 1e9, 3e9, 9e9], dtype=torch.float64), FFN: 3 * ramp}
    cheap = dear | {FFN: ramp}
    counts = residual_counts([dear, cheap], [SHAPE] * 2, 0.2)
    # Slopes are equal where 3 x n_dear = n_cheap.
    assert counts[1][FFN] == pytest.approx(3 * counts[0][FFN], abs=3)
    assert counts[0][ATTENTION] == counts[1][ATTENTION] == 0


def test_error_curve_is_cumulative_and_relative() -> None:
    curve = error_curve(torch.tensor([1.0, 2.0, 3.0]), tokens=10, energy=0.5)
    assert curve.tolist() == pytest.approx([0.0, 0.2, 0.6, 1.2])


@pytest.mark.parametrize("schedule", ["log", "linear", "uniform"])
def test_incremental_ratios(schedule: str) -> None:
    shapes = [SHAPE] * 12
    counts = incremental_counts(shapes, 0.3, schedule, 0.25)
    assert cost_of(counts, shapes) == pytest.approx(0.3 * total_cost(shapes), abs=6)  # half a channel a layer
    shares = [(c[ATTENTION] * SHAPE.group_cost + c[FFN]) / SHAPE.cost for c in counts]
    if schedule == "uniform":
        assert shares == pytest.approx([0.3] * 12, abs=0.5 / SHAPE.cost)
        return
    rise = [math.log(i + 1) / math.log(12) if schedule == "log" else i / 11 for i in range(12)]
    last = 0.075 + (0.3 - 0.075) / (sum(rise) / 12)  # ALGORITHMS: r_last = r_0 + (rho - r_0) / mean(rise)
    expected = [0.075 + (last - 0.075) * f for f in rise]
    assert shares == pytest.approx(expected, abs=0.5 / SHAPE.cost + 1e-9)


def test_ratios_out_of_reach() -> None:
    with pytest.raises(InputError, match="of layer 1, and"):
        incremental_counts([SHAPE] * 2, 0.6, "log", 0.0)
    by_itself = incremental_counts([SHAPE] * 4, 0.6, "linear", None)
    assert cost_of(by_itself, [SHAPE] * 4) == pytest.approx(0.6 * 4 * SHAPE.cost, abs=2)
    assert by_itself[-1] == {ATTENTION: 3, FFN: 159}
    with pytest.raises(InputError, match="outside"):
        incremental_counts([SHAPE] * 2, 0.3, "log", 1.5)
    assert incremental_counts([SHAPE], 0.3, "log", 0.0) == incremental_counts([SHAPE], 0.3, "uniform", 0.0)
