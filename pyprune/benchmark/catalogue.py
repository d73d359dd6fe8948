"""Catalogue of rows: every operator on the sizes of a model or of a sweep, in full or small."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence

import torch

from ..errors import InputError
from .case import FULL, SMALL, Case, Scale
from .cases import channel_moments, eliminate, grouped_cholesky, hessian, inverse, layer_steps, selection, sparsify
from .models import SHAPES, Model, model_of

OPERATORS: dict[str, Callable[[Model, Scale], Iterator[Case]]] = {
    "channel_moments": channel_moments.cases,
    "hessian": hessian.cases,
    "hessian_finish": hessian.finish_cases,
    "spd_inverse": inverse.cases,
    "spd_inverse_factor": inverse.factor_cases,
    "grouped_cholesky_errors": grouped_cholesky.cases,
    "eliminate": eliminate.cases,
    "sparsify": sparsify.cases,
    "rms_norm": layer_steps.norm_cases,
    "rotary": layer_steps.rotary_cases,
    "swiglu": layer_steps.swiglu_cases,
    "rms_norm_gather": selection.gather_cases,
    "scatter_add": selection.scatter_cases,
    "scatter_add_rms_norm_gather": selection.whole_cases,
}
# Sizes that no model has, from small to large, of the operators whose speed or accuracy hangs on them.
SWEEPS: dict[str, Callable[[Scale], Iterator[Case]]] = {
    "channel_moments": channel_moments.sweep,
    "hessian": hessian.sweep,
    "spd_inverse": inverse.sweep,
    "spd_inverse_factor": inverse.factor_sweep,
    "grouped_cholesky_errors": grouped_cholesky.sweep,
    "eliminate": eliminate.sweep,
    "rms_norm_gather": selection.gather_sweep,
    "scatter_add": selection.scatter_sweep,
    "scatter_add_rms_norm_gather": selection.whole_sweep,
}
MODELS = ("llama-2-7b", "llama-3.1-8b", "llama-2-13b", "llama-3.3-70b")
# A published model whose matrices a CPU factors in a fraction of a second: all rows take half a minute on one core.
SMALL_MODELS = ("smollm2-135m",)


def operators_named(names: Sequence[str]) -> list[str]:
    """InputError for a name that is no operator."""
    for name in names:
        if name not in OPERATORS:
            raise InputError(f"unknown operator {name!r}; one of {', '.join(OPERATORS)}")
    return list(names) or list(OPERATORS)


def catalogue(models: Sequence[str], scale: Scale, operators: Sequence[str]) -> list[Case]:
    """Cases by operator, then model; one that an earlier model has alike is left out."""
    cases: dict[object, Case] = {}
    for operator in operators:
        for name in models:
            for case in OPERATORS[operator](model_of(name), scale):
                cases.setdefault(case.measures, case)
    return list(cases.values())


def choose_cases(
    device: torch.device,
    operators: Sequence[str] = (),
    models: Sequence[str] = (),
    quick: bool = False,
    sweep: bool = False,
) -> list[Case]:
    """The rows of a run. A CPU gets small sizes; so does `quick`. `sweep`: those of SWEEPS, of no model."""
    small = quick or device.type == "cpu"
    if sweep:
        return swept_cases(operators, SMALL if small else FULL)
    chosen = models or (SMALL_MODELS if small else MODELS)
    return catalogue(chosen, SMALL if small else FULL, operators_named(operators))


def swept_cases(operators: Sequence[str], scale: Scale) -> list[Case]:
    """InputError where none of the operators has a sweep."""
    named = [name for name in operators_named(operators) if name in SWEEPS]
    if not named:
        raise InputError(f"{', '.join(operators)}: no sweep; there are sweeps of {', '.join(SWEEPS)}")
    return [case for name in named for case in SWEEPS[name](scale)]


def case_named(row: str) -> Case:
    """The case of this id, of any model and scale. InputError: there is none."""
    cases: dict[str, Case] = {}
    for model in SHAPES:
        for scale in (FULL, SMALL):
            for operator in OPERATORS.values():
                cases |= {case.id: case for case in operator(model_of(model), scale)}
    for scale in (FULL, SMALL):
        cases |= {case.id: case for case in swept_cases((), scale)}
    if row not in cases:
        near = difflib.get_close_matches(row, cases, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"there is no row {row!r}{hint} (pyprune benchmark --list shows them)")
    return cases[row]
