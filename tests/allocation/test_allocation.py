"""Ratio to units: budgets met, nothing emptied, the lowest scores removed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.allocation.budget import (
    check_ratio,
    choose_above,
    choose_by_counts,
    choose_globally,
    keep_highest,
    total_cost,
    uniform_counts,
)
from pyprune.architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from pyprune.errors import InputError

LLAMA_7B = LayerShape(4096, 128, 32, 1, 11008)
LLAMA_70B = LayerShape(8192, 128, 8, 8, 28672)


def test_cost_of_a_kv_group_is_its_parameters_in_ffn_channels() -> None:
    assert LLAMA_7B.group_cost == 512 / 3
    assert LLAMA_70B.group_cost == 128 * 18 / 3
    for shape in (LLAMA_7B, LLAMA_70B):
        per_channel = 3 * shape.hidden_size
        by_cost = (shape.kv_groups * shape.group_cost + shape.intermediate_channels) * per_channel
        assert by_cost == pytest.approx(shape.parameters, rel=1e-12)
    # Llama-2-7B's decoder linears: 32 x (4 x 4096² + 3 x 4096 x 11008).
    assert 32 * LLAMA_7B.parameters == 6_476_005_376


@st.composite
def models(draw: st.DrawFn) -> tuple[list[LayerShape], list[dict[str, torch.Tensor]]]:
    r, head_dim = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([8, 32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = [
        LayerShape(64, head_dim, draw(st.integers(2, 8)), r, draw(st.integers(16, 96)))
        for _ in range(draw(st.integers(1, 6)))
    ]
    scores = [{m: torch.randn(s.units(m), generator=generator, dtype=torch.float64) for m in SUBLAYERS} for s in shapes]
    return shapes, scores


def removed_cost(shapes: list[LayerShape], layers: list[dict[str, torch.Tensor]]) -> float:
    return sum(
        (s.units(m) - len(kept[m])) * s.unit_cost(m) for s, kept in zip(shapes, layers, strict=True) for m in SUBLAYERS
    )


@settings(max_examples=60, deadline=None)
@given(models(), st.floats(0.02, 0.98))
def test_global_choice_meets_the_budget_and_keeps_the_best(
    model: tuple[list[LayerShape], list[dict[str, torch.Tensor]]], ratio: float
) -> None:
    shapes, scores = model
    try:
        check_ratio(shapes, ratio)
    except InputError:
        return
    budget = ratio * total_cost(shapes)
    choice = choose_globally(scores, shapes, budget)
    coarsest = max(s.unit_cost(m) for s in shapes for m in SUBLAYERS)
    assert abs(removed_cost(shapes, choice.layers) - budget) <= coarsest / 2 + 1e-9
    kept_scores, removed_scores = [], []
    for own, kept in zip(scores, choice.layers, strict=True):
        for module in SUBLAYERS:
            assert len(kept[module]) >= 1
            assert torch.equal(kept[module], kept[module].sort().values)
            mask = torch.zeros(len(own[module]), dtype=torch.bool)
            mask[kept[module]] = True
            removed_scores.append(own[module][~mask])
            best = own[module].argmax()
            assert mask[best]
            mask[best] = False
            kept_scores.append(own[module][mask])
    if sum(map(len, kept_scores)) and sum(map(len, removed_scores)):
        assert torch.cat(kept_scores).min() >= torch.cat(removed_scores).max()


@settings(max_examples=60, deadline=None)
@given(models(), st.floats(0.02, 0.9))
def test_uniform_counts_meet_the_budget_in_every_layer(
    model: tuple[list[LayerShape], list[dict[str, torch.Tensor]]], ratio: float
) -> None:
    shapes, scores = model
    try:
        counts = uniform_counts(shapes, ratio)
    except InputError:
        return
    choice = choose_by_counts(scores, counts)
    for shape, kept, count in zip(shapes, choice.layers, counts, strict=True):
        own_budget = ratio * (shape.kv_groups * shape.group_cost + shape.intermediate_channels)
        assert abs(removed_cost([shape], [kept]) - own_budget) <= 0.5 + 1e-9
        assert count[ATTENTION] >= min(int(ratio * shape.kv_groups), shape.kv_groups - 1)
        assert len(kept[ATTENTION]) >= 1
        assert len(kept[FFN]) >= 1


def test_uniform_counts_follow_the_published_rule_where_heads_divide() -> None:
    # LLaMA-7B at 25 %: 8 of 32 heads and a quarter of the channels, with nothing left to make up.
    assert uniform_counts([LLAMA_7B], 0.25) == [{ATTENTION: 8, FFN: 2752}]


def test_manual_attention_ratio() -> None:
    (count,) = uniform_counts([LLAMA_7B], 0.2, attention_ratio=0.0)
    assert count[ATTENTION] == 0
    assert count[FFN] == round(0.2 * (32 * 512 / 3 + 11008))
    with pytest.raises(InputError, match=r"attention ratio 0\.9"):
        uniform_counts([LLAMA_7B], 0.2, attention_ratio=0.9)


def test_ties_and_thresholds() -> None:
    scores = torch.tensor([1.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    assert keep_highest(scores, 2).tolist() == [1, 3]
    assert keep_highest(scores, 0).tolist() == [0, 1, 2, 3]
    shape = LayerShape(64, 8, 2, 1, 4)
    own = {ATTENTION: torch.tensor([0.0, 1.0], dtype=torch.float64), FFN: scores}
    kept = choose_above([own], [shape], threshold=1.0).layers[0]
    assert kept[ATTENTION].tolist() == [1]  # at the threshold, but the last of its module
    assert kept[FFN].tolist() == [3]  # strictly above


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratio_outside_the_unit_interval(ratio: float) -> None:
    with pytest.raises(InputError, match="outside"):
        check_ratio([LLAMA_7B], ratio)


def test_impossible_ratio_says_how_far_one_can_go() -> None:
    shape = LayerShape(64, 32, 2, 1, 8)  # half of all attention must stay
    with pytest.raises(InputError, match=r"at most 0\.5321"):
        check_ratio([shape], 0.6)
    check_ratio([shape], 0.53)
