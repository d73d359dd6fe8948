"""Parts of a benchmark row. Nothing here knows an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.dispatch import eligible_backends
from ..ops.requirements import Problem as BackendProblem
from .rates import Work
from .timing import nothing

OURS, PYTORCH, OTHER = "pyprune", "pytorch", "other"
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Errors = dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """One way to solve a problem.

    run() gives what the problem's `errors` judges, None where it computes something else. prepare() sets the state
    that run changes; it is not timed. kind: OURS, PYTORCH or OTHER; source: of OTHER, whose way it is and where it
    stands. compilable: torch.compile takes `run` as it is.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], object] = nothing
    kind: str = PYTORCH
    source: str = ""
    compilable: bool = False


@dataclass(frozen=True)
class Problem:
    """The tensors of a case on a device, and who competes on them.

    own: our operator, on the backend that is chosen outside. errors: a result's errors against float64, by name.
    accuracy_reference: the baseline whose errors set the limit; allowed: the largest errors of a correct result, from
    those of the accuracy reference.
    """

    own: Candidate
    baselines: tuple[Candidate, ...]
    errors: Callable[[Any], Errors]
    accuracy_reference: str
    allowed: Callable[[Errors], Errors]


@dataclass(frozen=True)
class Scale:
    """statistics: rows of activations that statistics are taken of at a time; activations: tokens of a micro-batch."""

    name: str
    statistics: int
    activations: int


FULL, SMALL = Scale("full", 32768, 16384), Scale("small", 2048, 1024)
# `where` of a row whose size is no model's.
SWEEP = "sweep"


@dataclass(frozen=True)
class Case:
    """A problem of one size: a row. Tensors are made by `make` only.

    where: the model and the place in it. table: the operator's name in the table of backends, None where it has one
    implementation on every device; shape: what that table looks at.
    """

    operator: str
    where: str
    size: str
    dtype: torch.dtype
    work: Work
    make: Callable[[torch.device], Problem]
    table: str | None = None
    shape: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.operator}/{self.where}/{self.size}/{DTYPE_NAMES[self.dtype]}"

    @property
    def measures(self) -> tuple[str, str, torch.dtype, Work]:
        """Equal in cases of models that differ in the model's name alone."""
        return self.operator, self.size, self.dtype, self.work

    def backends(self, device: torch.device, wanted: tuple[str, ...] = ()) -> list[str]:
        """The eligible ones among `wanted`; unless told, all but the reference, and that where there is no other.

        An operator of one implementation has it under the name `pyprune`, whatever is wanted.
        """
        if self.table is None:
            return [OURS]
        eligible = eligible_backends(self.table, BackendProblem(device, self.dtype, self.shape))
        if wanted:
            return [name for name in eligible if name in wanted]
        return [name for name in eligible if name != "reference"] or ["reference"]


def row_weights(device: torch.device, rows: int) -> Tensor:
    """Square roots of weights, 1/4 to 4 in powers of two: float32 [rows]. bfloat16 rows times them are exact."""
    generator = torch.Generator(device).manual_seed(2)
    return 2.0 ** torch.randint(-2, 3, (rows,), generator=generator, device=device)


def on_backends(own: Candidate, names: list[str]) -> list[Candidate]:
    return [replace(own, name=name, kind=OURS) for name in names]


def normal(device: torch.device, dtype: torch.dtype, *size: int, seed: int = 0) -> Tensor:
    """Random normal numbers, the same ones on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*size, dtype=dtype, generator=generator, device=device)


def relative_distance(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, Frobenius; exact is float64."""
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))
