"""Layers of one size, channels in multiples, compensations: budgets and bounds, what is chosen, what is refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from support.command_line import run
from torch import Tensor
from transformers import AutoModelForCausalLM

from pyprune.allocation.budget import total_cost, uniform_counts
from pyprune.allocation.common_size import cheapest_counts, common_counts
from pyprune.allocation.depth_schedule import incremental_counts
from pyprune.allocation.residual import ErrorCurves, residual_counts
from pyprune.allocation.rounding import above, below, nearest, rounded_counts, worth_by_errors
from pyprune.architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError
from pyprune.job.config import PruneConfig
from pyprune.job.record import read_plan
from pyprune.methods import METHODS, make_method
from pyprune.methods.registry import methods_of_choice, methods_with
from pyprune.pipeline.run import prune

RemovedCounts = list[dict[str, int]]


def kept_cost(shapes: list[LayerShape], counts: RemovedCounts) -> float:
    return total_cost(shapes) - sum(c[ATTENTION] * s.group_cost + c[FFN] for c, s in zip(counts, shapes, strict=True))


def kept_channels(shapes: list[LayerShape], counts: RemovedCounts) -> list[int]:
    return [s.intermediate_channels - c[FFN] for s, c in zip(shapes, counts, strict=True)]


@st.composite
def models(draw: st.DrawFn, alike: bool = False) -> list[LayerShape]:
    r, head_dim = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([8, 16]))
    layers = draw(st.integers(1, 6))
    sizes = [(draw(st.integers(1, 8)), draw(st.integers(80, 300))) for _ in range(1 if alike else layers)]
    return [LayerShape(64, head_dim, groups, r, channels) for groups, channels in sizes] * (layers if alike else 1)


def random_curves(shapes: list[LayerShape], seed: int) -> list[ErrorCurves]:
    """Convex for the FFN, as eliminations are nearly; any for the KV groups."""
    generator = torch.Generator().manual_seed(seed)

    def curve(units: int, ordered: bool) -> Tensor:
        steps = torch.rand(units, generator=generator, dtype=torch.float64)
        return (steps.sort().values if ordered else 20 * steps).cumsum(0)

    return [{ATTENTION: curve(s.kv_groups, False), FFN: curve(s.intermediate_channels, True)} for s in shapes]


ratios, multiples, seeds = st.floats(0.02, 0.9), st.sampled_from([1, 2, 7, 16, 32, 80]), st.integers(0, 2**31)


@given(st.integers(1, 300), st.integers(1, 80), st.floats(0, 400))
@settings(deadline=None)
def test_the_nearest_multiple(whole: int, multiple: int, channels: float) -> None:
    assume(multiple <= whole)
    possible = [n for n in range(multiple, whole + 1) if n % multiple == 0 or n == whole]
    assert abs(nearest(channels, whole, multiple) - channels) == min(abs(n - channels) for n in possible)
    assert below(channels, whole, multiple) == max([n for n in possible if n <= channels], default=0)
    for n in possible[:-1]:
        assert above(n, whole, multiple) == min(m for m in possible if m > n)


@settings(max_examples=80, deadline=None)
@given(models(), ratios, multiples, seeds, st.sampled_from(["uniform", "log", "residual", "AL-AM", "AL-MM"]))
def test_rounded_channels_meet_the_budget(
    shapes: list[LayerShape], ratio: float, multiple: int, seed: int, how: str
) -> None:
    curves = random_curves(shapes, seed)
    scores = [{m: own[m].diff(prepend=torch.zeros(1, dtype=torch.float64)) for m in SUBLAYERS} for own in curves]
    try:
        if how == "residual":
            counts = residual_counts(curves, shapes, ratio, multiple)
        elif how in ("uniform", "log"):
            unrounded = incremental_counts(shapes, ratio, how, None, multiple)
            counts = rounded_counts(unrounded, shapes, ratio, multiple)
        else:
            manual = {"attention_ratio": ratio / 2} if how == "AL-MM" else {}
            method = make_method("flap", {"structure": how, "round_to": multiple, **manual})
            method.check(shapes, ratio)
            choice = method.choose(scores, shapes, ratio)
            counts = [
                {m: s.units(m) - len(k[m]) for m in SUBLAYERS} for s, k in zip(shapes, choice.layers, strict=True)
            ]
            for own, kept in zip(scores, choice.layers, strict=True):  # the lowest of each layer went
                for module in SUBLAYERS:
                    removed = torch.ones(len(own[module]), dtype=torch.bool)
                    removed[kept[module]] = False
                    assert not removed.any() or own[module][removed].max() <= own[module][kept[module]].min()
    except InputError:
        reject()
    channels = kept_channels(shapes, counts)
    for shape, count, own in zip(shapes, counts, channels, strict=True):
        assert 0 <= count[ATTENTION] < shape.kv_groups
        assert own == shape.intermediate_channels or own % multiple == 0
        assert own >= multiple
    missing = (1 - ratio) * total_cost(shapes) - kept_cost(shapes, counts)
    step = float(multiple)
    if multiple == 1:  # a unit of the whole model, or a channel of each layer
        step = max(s.group_cost for s in shapes) if how.startswith("AL") else float(len(shapes))
    if any(own < s.intermediate_channels for own, s in zip(channels, shapes, strict=True)):  # something could be added
        assert missing <= step / 2 + 1e-6
    if any(own > multiple for own in channels):  # something could be removed
        assert missing >= -step / 2 - 1e-6


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0.1, 0.5))
def test_layers_round_where_it_costs_least(seed: int, ratio: float) -> None:
    """Of all ways to round each layer up or down that meet the budget as well, the error curves' cheapest."""
    shapes = [LayerShape(64, 8, 4, 1, 128)] * 5
    curves = [own[FFN] for own in random_curves(shapes, seed)]
    # The curves are drawn apart, or all roundings would cost nearly the same.
    curves = [curve * 3.0**layer for layer, curve in enumerate(curves)]
    counts = uniform_counts(shapes, ratio, least=16)
    found = rounded_counts(counts, shapes, ratio, 16, worth_by_errors(curves, shapes))
    low = below(kept_channels(shapes, counts)[0], 128, 16)
    ups = (sum(kept_channels(shapes, found)) - 5 * low) // 16

    def error(channels: tuple[int, ...]) -> float:
        return sum(float(curve[128 - n]) for curve, n in zip(curves, channels, strict=True))

    ways = (way for way in itertools.product((low, low + 16), repeat=5) if sum(way) == 5 * low + 16 * ups)
    # Going up twice where it is worth more is cheaper still.
    assert error(tuple(kept_channels(shapes, found))) <= min(map(error, ways)) + 1e-9


@settings(max_examples=80, deadline=None)
@given(models(), ratios, multiples, seeds, st.booleans())
def test_layers_of_one_size(shapes: list[LayerShape], ratio: float, multiple: int, seed: int, by_curves: bool) -> None:
    assume(multiple <= min(s.intermediate_channels for s in shapes))
    try:
        if by_curves:
            counts = cheapest_counts(random_curves(shapes, seed), shapes, ratio, multiple)
        else:
            counts = common_counts(shapes, ratio, multiple)
    except InputError:
        reject()
    channels = set(kept_channels(shapes, counts))
    groups = {s.kv_groups - c[ATTENTION] for s, c in zip(shapes, counts, strict=True)}
    assert len(channels) == len(groups) == 1
    assert all(n >= 0 for count in counts for n in count.values())
    (own,) = channels
    assert own % multiple == 0 or {s.intermediate_channels for s in shapes} == {own}
    assert own >= multiple
    assert groups.pop() >= 1
    missing = (1 - ratio) * total_cost(shapes) - kept_cost(shapes, counts)
    assert abs(missing) <= len(shapes) * multiple / 2 + 1e-6


@settings(max_examples=60, deadline=None)
@given(models(alike=True), ratios)
def test_the_same_share_of_groups_and_channels(shapes: list[LayerShape], ratio: float) -> None:
    """Where layers are alike already, the split is that of methods that are uniform by themselves."""
    try:
        expected = uniform_counts(shapes, ratio)
    except InputError:
        reject()
    for count, other in zip(common_counts(shapes, ratio), expected, strict=True):
        assert count[ATTENTION] == other[ATTENTION]
        assert abs(count[FFN] - other[FFN]) <= 1  # a half is rounded either way


@settings(max_examples=60, deadline=None)
@given(models(alike=True), st.floats(0.05, 0.6), seeds)
def test_the_split_with_the_smallest_error(shapes: list[LayerShape], ratio: float, seed: int) -> None:
    curves, shape = random_curves(shapes, seed), shapes[0]
    errors = {}
    for groups in range(shape.kv_groups):
        exact = ratio * shape.cost - groups * shape.group_cost
        assume(abs(exact % 1 - 0.5) > 1e-6)  # which could be rounded either way
        if 0 <= round(exact) < shape.intermediate_channels:
            removed = round(exact)
            errors[groups, removed] = sum(float(own[ATTENTION][groups] + own[FFN][removed]) for own in curves)
    try:
        count = cheapest_counts(curves, shapes, ratio)[0]
    except InputError:
        assert not errors
        return
    assert errors[count[ATTENTION], count[FFN]] <= min(errors.values()) * (1 + 1e-9)


def test_beyond_a_curve_only_if_there_is_no_other() -> None:
    shapes = [LayerShape(64, 30, 4, 1, 160)] * 2  # a KV group costs 40 channels
    free = torch.zeros(160, dtype=torch.float64)
    dear = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)

    def split(known: int) -> dict[str, int]:
        return cheapest_counts([{ATTENTION: dear, FFN: free[: known + 1]}] * 2, shapes, 0.25)[0]

    assert split(80) == {ATTENTION: 0, FFN: 80}
    assert split(79) == {ATTENTION: 1, FFN: 40}
    assert split(1) == {ATTENTION: 2, FFN: 0}
    whole = [LayerShape(64, 30, 1, 1, 160)] * 2
    assert cheapest_counts([{ATTENTION: dear[:1], FFN: free[:10]}] * 2, whole, 0.25)[0] == {ATTENTION: 0, FFN: 50}


def test_what_is_impossible_says_what_would_be() -> None:
    shapes = [LayerShape(64, 8, 4, 1, 100), LayerShape(64, 8, 2, 1, 40)]
    with pytest.raises(
        InputError, match=r"at most 2 KV groups and 40 FFN channels; the nearest ratio possible is 0\.3"
    ):
        make_method("magnitude", {"uniform": True}).check(shapes, 0.1)
    make_method("magnitude", {"uniform": True}).check(shapes, 0.4)
    with pytest.raises(InputError, match="more than the 40 FFN channels of the smallest layer"):
        make_method("flap", {"round_to": 41}).check(shapes, 0.2)
    with pytest.raises(InputError, match="one KV group and 40 FFN channels stay in every layer, so at most"):
        make_method("obs", {"round_to": 40}).check(shapes, 0.6)
    with pytest.raises(InputError, match="of several widths"):
        make_method("obs", {"uniform": True}).check([*shapes, LayerShape(64, 16, 4, 1, 100)], 0.4)
    with pytest.raises(InputError, match=r"attention ratio 0\.9 with ratio 0\.1"):
        make_method("flap", {"uniform": True, "structure": "UL-MM", "attention_ratio": 0.9}).check(
            [LayerShape(64, 8, 10, 1, 60)], 0.1
        )
    with pytest.raises(InputError, match="--round-to 0 is less than 1"):
        make_method("flap", {"round_to": 0})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("flap", {"structure": "AL-AM"}),
        ("flap", {"structure": "AL-MM"}),
        ("slimgpt", {"schedule": "log"}),
        ("obs", {"allocation": "linear"}),
        ("obs", {"allocation": "fluctuation"}),
    ],
)
def test_layers_cannot_be_alike_and_differ(method: str, options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"--{name} {value} does not: leave one of them out"):
        make_method(method, {"uniform": True, **options})


def test_uniform_by_default_takes_what_fits_it() -> None:
    assert make_method("flap", {"uniform": True}).options["structure"] == "UL-UM"
    assert make_method("flap", {}).options["structure"] == "AL-AM"
    assert make_method("slimgpt", {"uniform": True}).options["schedule"] == "uniform"
    assert make_method("obs", {"uniform": True}).options["allocation"] == "residual"


def test_compensations() -> None:
    having = dict(methods_with("compensation"))
    assert METHODS.keys() - having.keys() == {"wanda", "sparsegpt", "dass"}
    for name, option in having.items():
        choices = option.choices or ()
        # obs looks at the model's biases first.
        assert make_method(name, {}).options["compensation"] == (None if name == "obs" else choices[0])
        for kind in choices:
            assert name in methods_of_choice("compensation", kind)
            assert make_method(name, {"compensation": kind}).adds_bias == (kind == "bias")
        for kind in {"bias", "weights", "none"} - set(choices):
            with pytest.raises(InputError, match=f"{name} has no compensation '{kind}'.*a method that has it: "):
                make_method(name, {"compensation": kind})
    with pytest.raises(InputError, match=r"flap has no compensation 'weights'; one of bias, none, .*: slimgpt, obs"):
        make_method("flap", {"compensation": "weights"})
    with pytest.raises(InputError, match=r"obs has no compensation 'x'; one of weights, bias, none$"):
        make_method("obs", {"compensation": "x"})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tiny_checkpoint: Callable[..., Path], demo_model: Path) -> Path:
    return tiny_checkpoint(family="llama", dtype="float32", layers=4, heads=8, kv_heads=4, tokenizer=demo_model)


Pruned = Callable[..., dict[str, Any]]


@pytest.fixture
def pruned(tiny: Path, text: Path, cache: Path, tmp_path: Path) -> Pruned:
    """`pruned("obs", 0.5, uniform=True)`: the plan of a run into tmp_path / "out" or the folder named by `output`."""

    def run_it(
        method: str, ratio: float, model: Path = tiny, output: str = "out", resume: bool = False, **options: Any
    ) -> dict[str, Any]:
        return prune(
            PruneConfig(
                str(model), tmp_path / output, method, ratio, options, str(text), 16, 64, device="cpu", cache=cache,
                resume=resume,
            )
        ).to_json()  # fmt: skip

    return run_it


def sizes(plan: dict[str, Any]) -> set[tuple[int, int]]:
    return {(len(layer["kv_groups"]), len(layer["intermediate_channels"])) for layer in plan["layers"]}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude", {}),
        ("wanda-sp", {"round_to": 32}),
        ("flap", {"compensation": "none"}),
        ("slimgpt", {}),
        ("obs", {}),
        ("obs", {"allocation": "uniform", "round_to": 32, "compensation": "none"}),
    ],
)
def test_a_uniform_model_is_a_stock_one(
    pruned: Pruned, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Path, method: str, options: Any
) -> None:
    plan = pruned(method, 0.5, uniform=True, **options)
    ((groups, channels),) = sizes(plan)
    assert channels % options.get("round_to", 1) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (groups, channels)
    assert "per_layer_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__module__.startswith("transformers.models.")
    with torch.no_grad():
        assert model(torch.arange(2, 14)[None]).logits.isfinite().all()
    # What `pyprune plan` says beforehand.
    flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
    said = run(capsys, "plan", tiny, "--method", method, "--ratio", 0.5, "--uniform", "--json", *flags).json
    if method == "obs" and not options:
        assert said["layers"] is None
    else:
        assert said["layers"] == [{"kv_groups": groups, "intermediate_channels": channels}] * 4
        assert said["parameters"]["decoder_linears"] == plan["parameters"]["decoder_linears"]


def test_a_survey_serves_all_sizes(pruned: Pruned) -> None:
    """Sizes differ, statistics do not: they are taken once."""
    for method in ("obs", "flap"):
        free = pruned(method, 0.4, output=method)
        assert len(sizes(free)) > 1
        alike = pruned(method, 0.4, output=f"{method}-uniform", uniform=True)
        assert alike["passes"]["calibration"]["cached"]
        assert len(sizes(alike)) == 1
        multiple = pruned(method, 0.4, output=f"{method}-32", round_to=32)
        assert multiple["passes"]["calibration"]["cached"]
        assert len(sizes(multiple)) > 1
        assert all(channels % 32 == 0 for _, channels in sizes(multiple))
        before = multiple["parameters"]["decoder_linears"][0]
        assert abs(multiple["ratio"]["met"] - 0.4) * before <= 32 * 3 * 64


def test_a_smaller_model_is_made_uniform(pruned: Pruned, tmp_path: Path) -> None:
    """Layers that differ can be cut to one size, if enough of them goes; the ratio is counted over the model."""
    first = pruned("flap", 0.2, output="first", compensation="none")
    assert len(sizes(first)) > 1
    with pytest.raises(InputError, match=r"ratio 0\.01 is impossible with --uniform"):
        pruned("magnitude", 0.01, model=tmp_path / "first", uniform=True)
    second = pruned("magnitude", 0.5, model=tmp_path / "first", uniform=True)
    assert len(sizes(second)) == 1
    shapes = CheckpointReader(tmp_path / "first").shapes
    assert second["ratio"]["met"] == pytest.approx(0.5, abs=0.5 * len(shapes) / total_cost(shapes))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__module__.startswith("transformers.models.")


def test_without_compensation_weights_are_as_they_were(pruned: Pruned, tiny: Path, tmp_path: Path) -> None:
    plan = pruned("obs", 0.4, compensation="none")
    dense, result = CheckpointReader(tiny), CheckpointReader(tmp_path / "out")
    assert dense.tensors.keys() == result.tensors.keys()
    family = dense.family
    for layer, own in enumerate(plan["layers"]):
        before, after = dense.read_layer(layer), result.read_layer(layer)
        kept = {ATTENTION: torch.tensor(own["kv_groups"]), FFN: torch.tensor(own["intermediate_channels"])}
        for module in SUBLAYERS:
            for name, (dimension, index) in family.unit_slices(dense.shapes[layer], module, kept[module]).items():
                expected = before[name + ".weight"].index_select(dimension, index)
                assert torch.equal(after[name + ".weight"], expected), name
    refitted = pruned("obs", 0.4, output="refitted")
    assert refitted["passes"]["calibration"]["cached"]
    assert sizes(refitted) == sizes(plan)
    # The dense layer before layer 0 is the same for both: the choice there is, too.
    assert refitted["layers"][0]["kv_groups"] == plan["layers"][0]["kv_groups"]


def test_other_sizes_are_another_run(pruned: Pruned, tmp_path: Path) -> None:
    pruned("magnitude", 0.4, uniform=True)
    assert read_plan(tmp_path / "out")["identity"]["options"]["uniform"] is True
    for changed in ({}, {"uniform": True, "round_to": 32}):
        with pytest.raises(InputError, match="finished already, with other settings: options"):
            pruned("magnitude", 0.4, resume=True, **changed)
    assert sizes(pruned("magnitude", 0.4, resume=True, uniform=True)) == sizes(read_plan(tmp_path / "out"))


def test_refused_on_the_command_line(
    demo_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "prune",
        demo_model,
        tmp_path / "out",
        "--method",
        "flap",
        "--ratio",
        0.3,
        "--calibration",
        text,
        "--device",
        "cpu",
    )
    for words, message in (
        (("--uniform", "--structure", "AL-AM"), "leave one of them out"),
        (("--round-to", 705), "--round-to 705 is more than the 704 FFN channels"),
        (("--round-to", 0), "0 is not in the range x>=1"),
        (("--compensation", "weights"), "a method that has it: slimgpt, obs"),
        (("--uniform", "--method", "obs", "--allocation", "log"), "--allocation log does not"),
        (("--round-to", 704, "--ratio", 0.9), "one KV group and 704 FFN channels stay"),
    ):
        outcome = run(capsys, *command, *words)
        assert (outcome.status, message in outcome.err) == (2, True), outcome.err
    assert not list(tmp_path.iterdir())
