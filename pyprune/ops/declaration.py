"""Declaration of an operator, in the operator's file: versions of public names, kernels with requirements.

    HESSIAN = Operator(
        "hessian",
        versions={"Hessian": 1, "hessian_update": 1},
        kernels={
            "cuda": Kernel(launch_cuda, (ON_NVIDIA_GPU, HALF_DTYPE, *CUDA_CORE)),
            "reference": Kernel(hessian_update_reference),
        },
    )

The declaration registers itself: the choice of a backend, `pyprune backends` and OPERATOR_VERSIONS follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .requirements import Requirement

BACKENDS = ("cuda", "triton", "cpu", "reference")
REFERENCE = "reference"

Launch = TypeVar("Launch", bound=Callable[..., Any])

# Filled by the declarations, which run when the operators' files are imported.
OPERATORS: dict[str, Operator[Any]] = {}
VERSIONS: dict[str, int] = {}


@dataclass(frozen=True)
class Kernel(Generic[Launch]):
    """One implementation of an operator.

    Args:
        launch: What runs it. Kernels of one operator take the same arguments.
        requirements: What the input and the installation have to meet. The order matters: the first one that does not
            hold is the reason that people read, and a predicate may rely on the ones before it (no compute capability
            is asked of a CPU tensor), so that the device comes first.
    """

    launch: Launch
    requirements: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class Operator(Generic[Launch]):
    """The declaration of an operator, registered when it is made.

    Args:
        name: The operator in messages and in `pyprune backends`.
        versions: The public names of the file and their versions (versions.py). A class has the number of what it
            holds: a state, or what the operators of the file return.
        kernels: By backend, preferred first; the reference, which has no requirements, is last. None: the operator is
            plain PyTorch on every device, and no backend is chosen for it.

    Raises:
        ValueError: The name or a public name is taken, a backend is unknown, or the reference is not as it has to be.
    """

    name: str
    versions: Mapping[str, int]
    kernels: Mapping[str, Kernel[Launch]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = {self.name} & OPERATORS.keys() | self.versions.keys() & VERSIONS.keys()
        if taken:
            raise ValueError(f"operator {self.name}: {', '.join(sorted(taken))} is declared already")
        unknown = [backend for backend in self.kernels if backend not in BACKENDS]
        if unknown:
            raise ValueError(f"operator {self.name}: {', '.join(unknown)} is not one of {', '.join(BACKENDS)}")
        # Every input has a backend that way.
        if self.kernels and (list(self.kernels)[-1] != REFERENCE or self.kernels[REFERENCE].requirements):
            raise ValueError(f"operator {self.name}: the last kernel has to be a reference that runs any input")
        OPERATORS[self.name] = self
        VERSIONS.update(self.versions)
