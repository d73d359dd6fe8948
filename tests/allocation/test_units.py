"""Units that may go: `--units`, sublayers that lose nothing, layers without heads, and what a unit costs."""

import pytest
import torch

from pyprune.allocation.budget import (
    UnitScores,
    check_ratio,
    choose_globally,
    counts_of,
    most_removable,
    total_cost,
    uniform_counts,
)
from pyprune.allocation.common_size import common_counts, common_sizes
from pyprune.allocation.residual import residual_counts
from pyprune.allocation.units import parse_units, with_units
from pyprune.architectures import ATTENTION, FFN, LayerShape
from pyprune.errors import InputError

FULL = LayerShape(64, 8, 4, 2, 96)
LINEAR = LayerShape(64, 8, 0, 1, 96)  # its attention has no heads
WHOLE = FULL.fixing(ATTENTION)  # its heads stay
MIXED = [LINEAR, FULL, LINEAR, FULL]


def scores(shapes: list[LayerShape], seed: int = 0) -> list[UnitScores]:
    generator = torch.Generator().manual_seed(seed)
    names = (ATTENTION, FFN)
    return [{m: torch.rand(s.units(m), generator=generator, dtype=torch.float64) for m in names} for s in shapes]


def removed_cost(counts: list[dict[str, int]], shapes: list[LayerShape]) -> float:
    pairs = zip(counts, shapes, strict=True)
    return sum(c[ATTENTION] * s.group_cost + c[FFN] for c, s in pairs)


@pytest.mark.parametrize(
    ("shape", "linears"),
    [
        (FULL, {"q": 64, "k": 32, "v": 32, "o": 64, "gate": 96, "up": 96, "down": 96}),
        (LayerShape(64, 8, 4, 2, 96, ffn_matrices=2), {"q": 64, "k": 32, "v": 32, "o": 64, "up": 96, "down": 96}),
        (LayerShape(64, 8, 4, 2, 96, query_parts=2), {"q": 128, "k": 32, "v": 32, "o": 64, "ffn": 3 * 96}),
        (LayerShape(64, 8, 8, 1, 96, shared_key_value=True), {"q": 64, "o": 64, "ffn": 3 * 96}),  # k and v stay
        (LINEAR, {"ffn": 3 * 96}),
    ],
)
def test_parameters_are_those_of_units(shape: LayerShape, linears: dict[str, int]) -> None:
    """linears: rows, or input columns of output projections, each of hidden_size parameters."""
    assert shape.parameters == shape.prunable_parameters == 64 * sum(linears.values())
    assert shape.cost * shape.ffn_matrices * shape.hidden_size == pytest.approx(shape.parameters)
    smaller = shape.kept(max(shape.kv_groups - 1, 0), 90)
    lost = (shape.parameters - smaller.parameters) / shape.ffn_matrices / shape.hidden_size
    assert lost == pytest.approx((shape.group_cost if shape.kv_groups else 0) + 6)


def test_shapes_of_layers() -> None:
    shared = LayerShape(64, 8, 8, 1, 96, shared_key_value=True)
    assert (FULL.heads, FULL.key_value_heads, FULL.key_channels, FULL.group_width) == (8, 4, 32, 16)
    assert (shared.heads, shared.key_value_heads, shared.key_channels, shared.group_width) == (8, 1, 8, 8)
    assert LINEAR.sublayers == (FFN,)
    assert LINEAR.input_widths == (64, 0, 64, 96)
    assert WHOLE.sublayers == (ATTENTION, FFN)  # it has units, of which none may go
    assert (WHOLE.removable(ATTENTION), WHOLE.units(ATTENTION), WHOLE.cost) == (0, 4, 96)
    assert WHOLE.parameters == FULL.parameters
    assert WHOLE.prunable_parameters == 3 * 64 * 96
    assert WHOLE.fixing(FFN).fixed == (ATTENTION, FFN)
    assert WHOLE.least_cost(5) == 5
    assert FULL.least_cost(5) == FULL.group_cost + 5


def test_names_of_units() -> None:
    assert parse_units("kv-groups, channels") == ["kv-groups", "channels"]
    with pytest.raises(InputError, match="'layers' is no kind of unit; they are kv-groups, heads, channels"):
        parse_units("channels,layers")
    assert with_units(MIXED, None) is MIXED
    assert with_units([FULL], "channels") == [WHOLE]
    assert with_units([FULL], "kv-groups") == [FULL.fixing(FFN)]
    assert with_units([FULL], "kv-groups,channels") == [FULL]
    shared = LayerShape(64, 8, 8, 1, 96, shared_key_value=True)
    assert with_units([shared], "heads") == with_units([shared], "kv-groups") == [shared.fixing(FFN)]


@pytest.mark.parametrize(
    ("shapes", "units", "line"),
    [
        ([WHOLE], "kv-groups", "no layer of this model can lose kv-groups"),
        ([LINEAR], "heads", "no layer of this model can lose heads"),
        ([FULL], "heads", "in this model they go with their key and value head: take kv-groups"),
    ],
)
def test_units_that_no_layer_can_lose(shapes: list[LayerShape], units: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        with_units(shapes, units)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
@pytest.mark.parametrize(
    "shapes", [[WHOLE] * 3, [FULL.fixing(FFN)] * 4, MIXED], ids=["heads stay", "channels stay", "mixed"]
)
def test_budgets_are_of_what_may_go(shapes: list[LayerShape], ratio: float) -> None:
    budget, largest = ratio * total_cost(shapes), max(1.0, FULL.group_cost)
    curves = [{m: torch.linspace(0, 1, max(own.units(m), 1)) for m in (ATTENTION, FFN)} for own in shapes]
    for counts, off in (
        (uniform_counts(shapes, ratio), len(shapes) * largest / 2),
        (residual_counts(curves, shapes, ratio), largest),
        (counts_of(choose_globally(scores(shapes), shapes, budget), shapes), largest / 2),
    ):
        assert abs(removed_cost(counts, shapes) - budget) <= off + 1e-6
        for own, shape in zip(counts, shapes, strict=True):
            for sublayer in (ATTENTION, FFN):
                most = shape.removable(sublayer)
                assert 0 <= own[sublayer] <= max(0, most - 1), (sublayer, own)


def test_one_size_for_layers_with_and_without_heads() -> None:
    counts = common_counts(MIXED, 0.3)
    kept = [(s.kv_groups - c[ATTENTION], s.intermediate_channels - c[FFN]) for s, c in zip(MIXED, counts, strict=True)]
    assert kept[0] == kept[2] == (0, kept[1][1])
    assert kept[1] == kept[3]
    assert removed_cost(counts, MIXED) == pytest.approx(0.3 * total_cost(MIXED), abs=len(MIXED) / 2)


def test_one_size_where_a_sublayer_stays() -> None:
    [size] = common_sizes([WHOLE] * 2, 0.25, 1)
    assert size.channels == 72
    assert common_counts([WHOLE] * 2, 0.25) == [{ATTENTION: 0, FFN: 24}] * 2
    assert common_counts([FULL.fixing(FFN)] * 2, 0.3) == [{ATTENTION: 1, FFN: 0}] * 2  # the nearest to 1.2 of 4
    assert common_counts([FULL.fixing(FFN)] * 2, 0.6) == [{ATTENTION: 2, FFN: 0}] * 2


def test_most_that_can_go() -> None:
    assert most_removable([WHOLE], 6) == pytest.approx(90 / 96)
    assert most_removable([FULL.fixing(FFN)]) == pytest.approx(3 / 4)
    with pytest.raises(InputError, match=r"at most 0\.7500"):
        check_ratio([FULL.fixing(FFN)], 0.8)
