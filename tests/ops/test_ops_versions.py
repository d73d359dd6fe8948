"""The public operators are what their versions say: signatures, schemas, layouts of states, and results by formulas.

A change of a line below is a change of the operator: raise its number in OPERATOR_VERSIONS and append the new line (the
same one where only results changed); the lines before stay, as the record of what callers of older versions saw.
"""

import inspect
import re

import pytest
import torch
from support.operator_cases import CASES, Case, assert_exact

from pyprune import ops

RECORD: dict[str, tuple[str, ...]] = {
    "ChannelMoments": (
        "(count: int, mean: Tensor, m2: Tensor) -> None; zeros(channels: int, device: torch.device | str | None = "
        "None) -> ChannelMoments; update(self, x: Tensor) -> None; merge(self, other: "
        "ChannelMoments) -> None; variance(self) -> Tensor; sum_of_squares(self) -> Tensor",
        "(count: int, mean: Tensor, m2: Tensor, total: Tensor | None = None) -> None; zeros(channels: int, device: "
        "torch.device | str | None = None) -> ChannelMoments; update(self, x: Tensor, weights: Tensor | None = None) "
        "-> None; merge(self, other: ChannelMoments) -> None; variance(self) -> Tensor; sum_of_squares(self) -> Tensor",
    ),
    "DampedInverse": ("(inverse: Tensor, damping: float, dead: Tensor) -> None",),
    "Elimination": (
        "(order: Tensor, errors: Tensor, factor: Tensor, width: int) -> None; removed_channels(self) -> Tensor; "
        "kept_channels(self) -> Tensor",
    ),
    "Hessian": (
        "(count: int, lower: Tensor, sums: Tensor | None) -> None; zeros(channels: int, device: torch.device | "
        "str | None = None, sums: bool = False) -> Hessian; update(self, x: Tensor) -> None; finish(self, "
        "centred: bool = False, scale: float = 1.0) -> Tensor",
        "(count: int, lower: Tensor, sums: Tensor | None, total: Tensor | None = None) -> None; zeros(channels: int, "
        "device: torch.device | str | None = None, sums: bool = False) -> Hessian; update(self, x: Tensor, weights: "
        "Tensor | None = None) -> None; mean(self) -> Tensor; finish(self, centred: bool = False, scale: float = 1.0) "
        "-> Tensor",
    ),
    "InverseFactor": ("(factor: Tensor, damping: float, dead: Tensor) -> None",),
    "add_split_product": ("(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None",),
    "channel_moments_update": (
        "(Tensor x, SymInt count, Tensor(a!) mean, Tensor(b!) m2) -> ()",
        "(Tensor x, SymInt count, Tensor(a!) mean, Tensor(b!) m2, Tensor? weights=None, Tensor? total=None) -> ()",
    ),
    "channel_moments_update_reference": (
        "(x: Tensor, count: int, mean: Tensor, m2: Tensor) -> None",
        "(x: Tensor, count: int, mean: Tensor, m2: Tensor, weights: Tensor | None = None, total: Tensor | None = None) "
        "-> None",
    ),
    "damped_inverse": ("(h: Tensor, damping: float = 0.01, where: str = 'hessian') -> DampedInverse",),
    "eliminate": (
        "(a: Tensor, g: Tensor, count: int, width: int = 1, keep_factor: bool = True, tf32: bool = False) -> "
        "Elimination; pyprune::eliminate(Tensor(a!) a, Tensor(b!) g, SymInt count, SymInt width, bool "
        "keep_factor, bool tf32=False) -> (Tensor, Tensor, Tensor)",
    ),
    "grouped_cholesky_errors": ("(Tensor a, Tensor g, SymInt width, bool diagonal=False) -> Tensor",),
    "grouped_cholesky_errors_reference": ("(a: Tensor, g: Tensor, width: int, diagonal: bool = False) -> Tensor",),
    "hessian_finish": (
        "(Tensor(a!) lower, Tensor? sums, SymInt count, float scale=1.) -> ()",
        "(Tensor(a!) lower, Tensor? sums, SymInt count, float scale=1., Tensor? total=None) -> ()",
    ),
    "hessian_update": (
        "(Tensor x, Tensor(a!) lower, Tensor(b!)? sums) -> ()",
        "(Tensor x, Tensor(a!) lower, Tensor(b!)? sums, Tensor? weights=None) -> ()",
    ),
    "inverse_factor": ("(h: Tensor, damping: float = 0.01, where: str = 'hessian') -> InverseFactor",),
    "lower_gram": ("(weight: Tensor) -> Tensor",),
    "refit": ("(weight: Tensor, elimination: Elimination) -> Tensor",),
    "rms_norm": (
        "(Tensor x, Tensor weight, float eps) -> Tensor",
        "(Tensor x, Tensor weight, float eps, bool plus_one=False) -> Tensor",
    ),
    "rms_norm_gather": ("(Tensor x, Tensor weight, float eps, Tensor index) -> Tensor",),
    "rotate_": (
        "(Tensor(a!) x, Tensor cos, Tensor sin) -> ()",
        "(Tensor(a!) x, Tensor cos, Tensor sin, bool neighbours=False) -> ()",
    ),
    "scatter_add_": ("(Tensor(a!) residual, Tensor update, Tensor index) -> ()",),
    "scatter_add_rms_norm_gather_": (
        "(Tensor(a!) residual, Tensor update, Tensor update_index, Tensor weight, float eps, Tensor index) -> Tensor",
    ),
    "sparsify_": (
        "(Tensor(a!) weight, Tensor factor, int zeros, int group, float ratio=0., int[] parts=[]) -> Tensor",
    ),
    "spd_inverse": ("(Tensor h, float shift) -> (Tensor inverse, Tensor info)",),
    "spd_inverse_factor": ("(Tensor h, float shift) -> (Tensor factor, Tensor info)",),
    "swiglu_": (
        "(Tensor(a!) gate, Tensor up) -> ()",
        '(Tensor(a!) gate, Tensor up, str activation="silu") -> ()',
    ),
}


def shown(signature: inspect.Signature) -> str:
    """Without the modules of Tensor and of the operators' own classes, which may move."""
    return re.sub(r"torch\.(?=Tensor)|pyprune\.ops\.\w+\.", "", str(signature))


def described(name: str) -> str:
    """Of an operator of torch.library its schema, of a class its fields and methods, of a function its signature."""
    public = getattr(ops, name)
    if isinstance(public, type):
        methods = [
            member + shown(inspect.signature(getattr(public, member), eval_str=True))
            for member, value in vars(public).items()
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod))
        ]
        return "; ".join([shown(inspect.signature(public, eval_str=True)), *methods])
    if isinstance(public, torch.library.CustomOpDef):
        return str(getattr(torch.ops.pyprune, name).default._schema).removeprefix(f"pyprune::{name}")
    signature = shown(inspect.signature(public, eval_str=True))
    if name in {operator.split("::")[1] for operator in registered()}:
        return f"{signature}; {getattr(torch.ops.pyprune, name).default._schema}"
    return signature


def registered() -> set[str]:
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyprune::")}


def test_every_public_name_has_a_version() -> None:
    """And every registered operator is public. Those names that are not operators have none."""
    others = {"OPERATOR_VERSIONS", "describe", "describe_installation", "use_backend"}
    assert set(ops.OPERATOR_VERSIONS) == set(ops.__all__) - others
    assert {name.removeprefix("pyprune::") for name in registered()} <= set(ops.OPERATOR_VERSIONS)


@pytest.mark.parametrize("name", RECORD)
def test_signatures_and_schemas_change_with_the_version(name: str) -> None:
    assert name in ops.__all__, f"{name} is public and has to stay"
    assert ops.OPERATOR_VERSIONS[name] == len(RECORD[name]), "a new version needs its line, a new line its version"
    assert described(name) == RECORD[name][-1], f"{name} changed: raise its version and append its line"


def test_the_record_is_complete() -> None:
    assert set(RECORD) == set(ops.OPERATOR_VERSIONS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_are_those_of_the_formulas(case: Case) -> None:
    """Version 1 of all of them; a new version brings its own formula."""
    assert_exact(case, case.run(*case.inputs()))


def test_every_operator_has_a_case() -> None:
    results = {"DampedInverse", "Elimination", "InverseFactor"}  # returned by operators of the cases
    assert {name.split(",")[0] for name in CASES} == set(ops.OPERATOR_VERSIONS) - results
