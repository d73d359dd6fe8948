"""Options of methods are declared once; --layers; a method in a file of its own."""

import itertools
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import run
from support.extension import Extension

from pyprune.allocation.layers import layer_subset, parse_layers
from pyprune.architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from pyprune.errors import InputError
from pyprune.job.config import PruneConfig
from pyprune.job.record import read_plan
from pyprune.methods import METHODS, UnitMethod, describe, make_method
from pyprune.methods.options import option, options_of
from pyprune.methods.registry import register
from pyprune.pipeline.run import prune

UNIT_METHODS = [name for name, method in METHODS.items() if issubclass(method, UnitMethod)]
SHAPES = [LayerShape(64, 16, 4, 2, 160) for _ in range(6)]


def test_what_a_method_says_of_itself() -> None:
    for name, method in METHODS.items():
        described = describe(method)
        assert described["name"] == name
        assert described["summary"]
        assert list(described["options"]) == [field.name for field in fields(method)]
        assert make_method(name, {}).options.keys() == described["options"].keys()
        for own in described["options"].values():
            assert own["help"]
            assert own["choices"] is None or own["default"] in own["choices"] or own["default_text"]
    json.dumps([describe(method) for method in METHODS.values()])
    assert describe(METHODS["flap"])["options"]["metric"] == {
        "default_text": None,
        "default": "WIFV", "choices": ["IFV", "WIFV", "WIFN"], "help": "Importance of a channel.", "type": "str",
    }  # fmt: skip
    assert describe(METHODS["obs"])["options"]["first_share"]["type"] == "float or null"


def test_only_unit_methods_have_the_options_of_units() -> None:
    assert UNIT_METHODS == ["magnitude", "wanda-sp", "flap", "slimgpt", "obs"]
    for name, method in METHODS.items():
        assert ("uniform" in options_of(method)) == ("layers" in options_of(method)) == (name in UNIT_METHODS)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("flap", {"metric": 3}, "--metric 3 is not a text"),
        ("flap", {"uniform": 1}, "--uniform 1 is not true or false"),
        ("flap", {"round_to": 2.5}, "--round-to 2.5 is not a whole number"),
        ("flap", {"round_to": True}, "--round-to True is not a whole number"),
        ("obs", {"damping": "much"}, "--damping 'much' is not a number"),
        ("obs", {"damping": 2}, "damping 2 is outside [0, 1]: it is a share of the mean of H's diagonal"),
        ("sparsegpt", {"damping": float("nan")}, "damping nan is outside [0, 1]"),
        ("obs", {"target_share": 0}, "target share 0 is outside (0, 1]: it is a share of the stream error"),
        ("obs", {"input_share": 1.5}, "input share 1.5 is outside [0, 1]"),
        ("obs", {"allocation_samples": 0}, "--allocation-samples 0 is less than 1"),
        ("obs", {"allocation_samples": 3, "survey_samples": 3}, "--allocation-samples is given twice"),
        ("disp", {"steps": 0}, "--steps 0 is less than 1"),
        ("disp", {"learning_rate": float("inf")}, "--learning-rate inf is not positive and finite"),
        ("disp", {"layers": "1-2"}, "method disp has no option --layers"),
    ],
)
def test_values_that_an_option_does_not_take(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        make_method(method, options)
    assert said in str(refused.value)


def test_an_old_name_of_an_option(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_method("obs", {"survey_samples": 3}).options["allocation_samples"] == 3
    asked = ("plan", demo_model, "--ratio", 0.3, "--method", "obs", "--json")
    assert run(capsys, *asked, "--survey-samples", 3).json["options"]["allocation_samples"] == 3
    assert "--survey-samples" not in run(capsys, "plan", "--help").out


def test_each_methods_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for name, method in METHODS.items():
        shown = " ".join(run(capsys, "methods", name).out.split()).replace("- ", "-")  # lines break at hyphens
        for own in options_of(method).values():
            assert own.flag in shown
            assert " ".join(own.help.split()).replace("- ", "-") in shown
        assert f"Source {method.source}" in shown
        assert "Cost Llama-2-7B" in shown
    assert "unknown method 'wandas'" in run(capsys, "methods", "wandas").err
    listed = run(capsys, "methods", "--json").json
    assert listed["flap"]["options"]["metric"] == "WIFV"
    assert listed["flap"]["option_details"]["metric"]["choices"] == ["IFV", "WIFV", "WIFN"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("2-4", [2, 3, 4]), ("0,2-3,5-", [0, 2, 3, 5]), ("4-", [4, 5]), (" 1 , 1-2", [1, 2]), ("0-5", list(range(6)))],
)
def test_layers_that_are_named(text: str, layers: list[int]) -> None:
    assert layer_subset(text, 6).layers == layers
    assert layer_subset(None, 6).whole


@pytest.mark.parametrize("text", ["", "a", "-3", "3-1", "1,,2", "1.5", "1-2-3", "²"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--layers "):
        parse_layers(text)
    with pytest.raises(InputError, match="--layers "):
        make_method("magnitude", {"layers": text})


@pytest.mark.parametrize("method", UNIT_METHODS)
def test_layers_and_ratios_that_do_not_go_together(method: str) -> None:
    with pytest.raises(InputError, match="there is no layer 6; the model has layers 0 to 5"):
        make_method(method, {"layers": "2-6"}).check(SHAPES, 0.2)
    with pytest.raises(InputError, match=r"ratio 0.4 is impossible with --layers 2-3: .* at most 0.2951"):
        make_method(method, {"layers": "2-3"}).check(SHAPES, 0.4)
    with pytest.raises(InputError, match=r"ratio 2 is outside \(0, 1\)"):
        make_method(method, {"layers": "2-3"}).check(SHAPES, 2)
    with pytest.raises(InputError, match="--uniform makes all layers alike, --layers 2-3 does not"):
        make_method(method, {"layers": "2-3", "uniform": True})


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in UNIT_METHODS),
    *((name, {"round_to": 8}) for name in ("flap", "obs")),
    *(("flap", {"structure": structure}) for structure in ("UL-UM", "AL-MM")),
    ("slimgpt", {"schedule": "linear"}),
    *(("obs", {"allocation": allocation}) for allocation in ("log", "uniform", "fluctuation")),
]


@pytest.mark.parametrize(
    ("method", "options"),
    [pytest.param(*variant, marks=pytest.mark.slow if variant[1] else ()) for variant in VARIANTS],
)
def test_other_layers_keep_every_unit(
    method: str,
    options: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    demo_model: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    """And the ratio, of all layers, is met within a unit; the plan has the option."""
    model = demo_model
    if options.get("allocation") != "fluctuation":  # which comes within a unit of the ratio where scores are a model's
        model = tiny_checkpoint(family="llama", layers=6, heads=8, kv_heads=4, tokenizer=demo_model)
    layers, allowed = "1-2,4-", {1, 2, 4, 5}
    config = PruneConfig(
        str(model), tmp_path / "out", method, 0.3, {"layers": layers, **options}, str(text), samples=8,
        sequence_length=64, device="cpu",
    )  # fmt: skip
    prune(config)
    plan = read_plan(tmp_path / "out")
    assert plan["options"]["layers"] == layers
    dense = plan["dense"]
    shape = LayerShape(*(dense[key] for key in ("hidden_size", "head_dim", "kv_groups", "heads_per_group",
                                                "intermediate_channels")))  # fmt: skip
    units = (shape.kv_groups, shape.intermediate_channels)
    for layer, own in enumerate(plan["layers"]):
        if layer not in allowed:
            assert (len(own["kv_groups"]), len(own["intermediate_channels"])) == units, layer
    # A unit of the whole model; where each layer is rounded by itself, half a channel of each.
    unit = max(options.get("round_to", 1) / 2, len(allowed) / 2)
    if options.get("structure", "AL-AM") == "AL-AM" and method == "flap":
        unit = max(unit, shape.group_cost / 2)
    assert abs(plan["ratio"]["met"] - 0.3) <= unit / (6 * shape.cost) + 1e-9


def test_a_choice_in_some_layers() -> None:
    method = METHODS["magnitude"](layers="1,3-4")
    assert isinstance(method, UnitMethod)
    counts = method.removed_counts(SHAPES, 0.2)
    assert [bool(sum(own.values())) for own in counts] == [False, True, False, True, True, False]
    removed = sum(own[m] * SHAPES[0].unit_cost(m) for own, m in itertools.product(counts, SUBLAYERS))
    assert abs(removed - 0.2 * 6 * SHAPES[0].cost) <= 1.5
    scores = [{ATTENTION: torch.rand(4).double(), FFN: torch.rand(160).double()} for _ in SHAPES]
    choice = method.choose(scores, SHAPES, 0.2)  # type: ignore[attr-defined]
    for shape, kept, own in zip(SHAPES, choice.layers, counts, strict=True):
        assert {m: shape.units(m) - len(kept[m]) for m in SUBLAYERS} == own


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="there is a method 'flap' already"):
        register(type("Flap", (METHODS["magnitude"],), {"name": "flap"}))
    with pytest.raises(TypeError, match="depth is of no type"):
        options_of(_with_field("depth", list, option(None, help="x")))
    with pytest.raises(TypeError, match="depth is not an option"):
        options_of(_with_field("depth", int, 3))


def _with_field(name: str, kind: type, default: Any) -> type:
    from dataclasses import make_dataclass

    return make_dataclass("Toy", [(name, kind, default)])


TOY = '''
"""A method in one file: a statistic, passes and costs of its own for one, those of scoring methods for the other."""

from dataclasses import dataclass
from typing import ClassVar

from pyprune.estimation.procedures import PROCEDURES, slice_costs
from pyprune.methods import ScoringMethod, register
from pyprune.methods.options import option
from pyprune.passes import PASSES
from pyprune.passes.slice import ScoringPasses


@register
@dataclass(frozen=True)
class Toy(ScoringMethod):
    """Toy: the norm of each column to a power.

    Nothing more.
    """

    name = "toy"
    needs_text = False
    power: float = option(2.0, above=0, maximum=9, help="Of the norm.", meaning="it is an exponent")
    order: str = option("low", choices=("low", "high"), help="Which go first.")

    def channel_scores(self, statistics, sublayer):
        scores = statistics.weight_squares.double() ** (self.power / 2)
        return scores if self.order == "low" else -scores


@register
@dataclass(frozen=True)
class Passing(Toy):
    """Toy with passes of its own."""

    name = "toy-passes"
    procedure: ClassVar[str] = "toy"


class ToyPasses(ScoringPasses):
    def _calibrate(self, by_window):
        statistics = super()._calibrate(by_window)
        spread = max(float(layer["ffn"].weight_squares.std()) for layer in statistics)
        self.warn(f"a statistic of our own: {spread >= 0}")
        return statistics


PASSES["toy"] = ToyPasses
PROCEDURES["toy"] = slice_costs
'''


def test_a_method_in_a_file_of_its_own(demo_model: Path, tmp_path: Path) -> None:
    toy = Extension(tmp_path, "pyprune_toy", "pyprune.methods", TOY).forked
    assert "dass, toy, toy-passes;" in " ".join(toy("prune", "--help").out.read_text().split())
    shown = " ".join(toy("methods", "toy").out.read_text().split())
    assert "Of the norm. [default: 2.0]" in shown
    assert "Which go first. One of low, high. [default: low]" in shown
    listed = json.loads(toy("methods", "--json").out.read_text())
    assert listed["toy"]["summary"] == "Toy: the norm of each column to a power."
    assert listed["toy"]["options"]["power"] == 2.0
    out = tmp_path / "out"
    asked = ("prune", demo_model, out, "--ratio", 0.3, "--no-verify", "--method")
    assert "power 0 is outside (0, 9]: it is an exponent" in toy(*asked, "toy", "--power", 0).err.read_text()
    pruned = toy(*asked, "toy-passes", "--order", "high", "--layers", "3-")
    assert pruned.status == 0, pruned.err.read_text()
    plan = read_plan(out)
    assert plan["options"]["order"] == "high"
    assert "a statistic of our own: True" in plan["warnings"]
    assert plan["ratio"]["met"] == pytest.approx(0.3, abs=0.01)
