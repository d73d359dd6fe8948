"""Choose the backend of an operator by device, dtype and shape; explain the choice; force one.

Backends: `cuda` (compiled core), `triton`, `cpu` (compiled core), `reference` (plain PyTorch). Of the kernels that an
operator declares (declaration.py), preferred first, the first one runs whose requirements hold. `use_backend` forces
one for the code inside it, PYPRUNE_BACKEND for the whole process; an unknown or ineligible one is an InputError. When
a preferred backend is missing from the installation, that is logged once. Nothing here names an operator.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from . import requirements
from .declaration import BACKENDS, OPERATORS, Launch, Operator
from .requirements import KERNEL_DTYPES, Problem, Requirement, dtype_name
from .tuning import describe_tables

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "PYPRUNE_BACKEND"

# `pyprune backends` lists float64 beside what the compiled kernels read.
LISTED_DTYPES = (*KERNEL_DTYPES, torch.float64)

NOT_WRITTEN = Requirement(
    "a kernel of this backend",
    lambda problem: False,
    lambda problem: "the operator is not written for this backend",
)

# Of `use_backend`; None inside `use_backend(None)`. Without a value PYPRUNE_BACKEND counts.
SCOPED: ContextVar[str | None] = ContextVar("SCOPED")


@dataclass(frozen=True)
class Forced:
    """A backend that is forced, and by what, as a message names it."""

    backend: str
    source: str


@dataclass(frozen=True)
class BackendChoice:
    """The backend that runs, and why each other one in BACKENDS does not."""

    backend: str
    reasons: dict[str, str]


@dataclass(frozen=True)
class BackendRow:
    """One line of `pyprune backends`: what would run, and why the others would not."""

    operator: str
    device: str
    dtype: str
    backend: str
    reasons: dict[str, str]


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Force a backend for the operators that are called inside, which are written for it; the others run as ever.

        with use_backend("reference"):
            hessian.update(x)

    It holds for the thread or asyncio task that entered it, and not for threads that are started inside; the innermost
    one counts. Outside of it the environment variable PYPRUNE_BACKEND forces one for the whole process. An operator
    that the backend cannot run raises InputError, which names the reason and the eligible ones.

    Args:
        backend: cuda, triton, cpu or reference; None: the preferred eligible one, whatever PYPRUNE_BACKEND says.

    Raises:
        InputError: A ValueError; there is no backend of this name.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"{backend!r} is not a backend; choose {', '.join(BACKENDS)}, or None to force none")
    token = SCOPED.set(backend)
    try:
        yield
    finally:
        SCOPED.reset(token)


def forced_backend(operator: str) -> Forced | None:
    """The backend of `use_backend`, else of PYPRUNE_BACKEND; None: none is forced on this operator.

    That is where no backend is named, or one that the operator is not written for. Raises InputError where
    PYPRUNE_BACKEND is not in BACKENDS.
    """
    try:
        name = SCOPED.get() or ""
        source = f'use_backend("{name}")'
    except LookupError:
        name = os.environ.get(ENVIRONMENT_VARIABLE, "")
        source = f"{ENVIRONMENT_VARIABLE}={name}"
        if name and name not in BACKENDS:
            raise InputError(f"{source} is not a backend; choose {', '.join(BACKENDS)} or unset it") from None
    return Forced(name, source) if name in OPERATORS[operator].kernels else None


def unmet_requirement(operator: str, backend: str, problem: Problem) -> Requirement | None:
    """The first requirement of the backend that the problem does not meet; None: it is eligible."""
    kernel = OPERATORS[operator].kernels.get(backend)
    needed = (NOT_WRITTEN,) if kernel is None else kernel.requirements
    return next((item for item in needed if not item.holds(problem)), None)


def eligible_backends(operator: str, problem: Problem) -> list[str]:
    """All backends that can run it, preferred first; never empty."""
    return [item for item in OPERATORS[operator].kernels if unmet_requirement(operator, item, problem) is None]


def choose_backend(operator: str, x: Tensor, shape: tuple[int, ...] | None = None) -> str:
    """Choose the backend that runs this operator on x; `shape`: where the operator's differs from x's.

    Raises InputError where one is forced that is not known, or that cannot run this input. Logs, once for each cause,
    that a preferred backend is missing from the installation.
    """
    problem = Problem(x.device, x.dtype, tuple(x.shape) if shape is None else shape)
    forced = forced_backend(operator)
    if forced is not None:
        unmet = unmet_requirement(operator, forced.backend, problem)
        if unmet is not None:
            raise InputError(
                f"{forced.source} cannot run {operator} here: {unmet.reason(problem)}; "
                f"eligible: {', '.join(eligible_backends(operator, problem))}"
            )
        return forced.backend
    passed_over = []
    for backend in OPERATORS[operator].kernels:
        unmet = unmet_requirement(operator, backend, problem)
        if unmet is None:
            break
        if unmet.installation:
            passed_over.append(f"cannot use {backend}: {unmet.reason(problem)}")
    for reason in passed_over:
        warn_once(f"{operator} on {x.device.type} {reason}; running {backend}")
    return backend


def choose_launch(operator: Operator[Launch], x: Tensor, shape: tuple[int, ...] | None = None) -> Launch:
    """The launch of the backend that choose_backend names."""
    return operator.kernels[choose_backend(operator.name, x, shape)].launch


def choose(operator: str, x: Tensor) -> BackendChoice:
    """Choose a backend as choose_backend does, with the reason against each other backend."""
    backend = choose_backend(operator, x)
    return explain(operator, Problem(x.device, x.dtype, tuple(x.shape)), backend, forced_backend(operator))


def explain(operator: str, problem: Problem, backend: str, forced: Forced | None) -> BackendChoice:
    """The choice of `backend`, with the reason against each other one."""
    passed_over = f"{backend} is preferred" if forced is None else forced.source
    reasons = {}
    for other in BACKENDS:
        if other != backend:
            unmet = unmet_requirement(operator, other, problem)
            reasons[other] = passed_over if unmet is None else unmet.reason(problem)
    return BackendChoice(backend, reasons)


@cache
def warn_once(message: str) -> None:
    logger.warning(message)


def describe() -> list[BackendRow]:
    """Describe the backend of every operator that has kernels, by device of this machine and dtype.

    The backend is "none" where one is forced that is not eligible.
    """
    devices = [torch.device("cpu")] + [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = []
    for operator in sorted(name for name, declared in OPERATORS.items() if declared.kernels):
        forced = forced_backend(operator)
        for device in devices:
            for dtype in LISTED_DTYPES:
                problem = Problem(device, dtype, None)
                eligible = eligible_backends(operator, problem)
                backend = eligible[0] if forced is None else forced.backend
                choice = explain(operator, problem, backend if backend in eligible else "none", forced)
                rows.append(BackendRow(operator, str(device), dtype_name(dtype), choice.backend, choice.reasons))
    return rows


def describe_installation() -> dict[str, str]:
    """Versions and builds that the choice rests on: torch, CUDA, triton, the compiled core, tuned configurations.

    InputError where PYPRUNE_TUNING names a table that is not for this machine.
    """
    module, why_not = requirements.import_optional("triton")
    facts = {
        "torch": torch.__version__,
        "torch CUDA": str(torch.version.cuda),
        "triton": module.__version__ if module is not None else f"not installed ({why_not})",
    }
    if requirements.core() is None:
        facts["core"] = f"not installed ({requirements.import_optional('pyprune._core')[1]})"
    else:
        facts |= {f"core {key}": describe_value(value) for key, value in requirements.core_build_info().items()}
    return facts | describe_tables()


def describe_value(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)
