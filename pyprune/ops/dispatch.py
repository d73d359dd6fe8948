"""Which backend runs an operator: one table, chosen by operator, device, dtype and shape.

Backends: `cuda` (compiled core), `triton`, `cpu` (compiled core), `reference` (plain PyTorch). PREFERENCE
gives the order in which they are tried, REQUIREMENTS what each needs: named predicates with a reason for
people. PYPRUNE_BACKEND forces one backend; an unknown or ineligible one is an InputError. When a preferred
backend is missing from the installation, that is logged once.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .tuning import describe_tables

logger = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT_VARIABLE = "PYPRUNE_BACKEND"

# The dtypes of activations that the compiled kernels read; `pyprune backends` lists float64 beside them.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LISTED_DTYPES = (*KERNEL_DTYPES, torch.float64)


@dataclass(frozen=True)
class Problem:
    """What a choice depends on. shape: what the operator's file says, or None where any shape is meant."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Requirement:
    """A named predicate. `reason` says, for people, why a backend cannot run where it does not hold.

    `installation`: whether it fails because of how pyprune was installed, and not because of the input.
    """

    name: str
    holds: Callable[[Problem], bool]
    reason: Callable[[Problem], str]
    installation: bool = False


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


@cache
def import_optional(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and the interpreter's own reason why it cannot be imported."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, str(error)


def core() -> ModuleType | None:
    """The compiled core, or None where pyprune was installed without a compiler."""
    return import_optional("pyprune._core")[0]


def required_core() -> ModuleType:
    """The compiled core, for a launch that was chosen because it is there."""
    module = core()
    assert module is not None
    return module


@cache
def core_build_info() -> dict[str, Any]:
    """build_info() of the compiled core; empty without one."""
    module = core()
    return {} if module is None else module.build_info()


def core_targets(capability: tuple[int, int], architectures: list[str]) -> list[str]:
    """Those of the core's targets that run on a device of this compute capability.

    sm_XY: machine code, for the same major version from minor Y on; sm_XYa: for exactly XY; compute_XY: PTX,
    which the driver compiles for XY and everything later.
    """
    runnable = []
    for target in architectures:
        kind, version = target.split("_")
        digits = version.rstrip("a")
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute":
            runs = capability >= (major, minor)
        elif version.endswith("a"):
            runs = capability == (major, minor)
        else:
            runs = capability[0] == major and capability[1] >= minor
        if runs:
            runnable.append(target)
    return runnable


def core_runs_on(problem: Problem) -> bool:
    capability = torch.cuda.get_device_capability(problem.device)
    return bool(core_targets(capability, core_architectures()))


def is_nvidia_gpu(problem: Problem) -> bool:
    # PyTorch for AMD GPUs calls its devices "cuda" too.
    return problem.device.type == "cuda" and torch.version.cuda is not None


def fits_int32(problem: Problem) -> bool:
    return problem.shape is None or max(problem.shape, default=0) < 2**31


def core_runs_wgmma(problem: Problem) -> bool:
    return "sm_90a" in core_targets(torch.cuda.get_device_capability(problem.device), core_architectures())


def core_architectures() -> list[str]:
    return core_build_info()["cuda_architectures"]


def device_text(problem: Problem) -> str:
    return f"the input is on {problem.device}"


ON_NVIDIA_GPU = Requirement("input on an NVIDIA GPU", is_nvidia_gpu, device_text)
NOT_WRITTEN = Requirement(
    "a kernel of this backend",
    lambda problem: False,
    lambda problem: "the operator is not written for this backend",
)
ON_CPU = Requirement("input on the CPU", lambda problem: problem.device.type == "cpu", device_text)
KERNEL_DTYPE = Requirement(
    "dtype bfloat16, float16 or float32",
    lambda problem: problem.dtype in KERNEL_DTYPES,
    lambda problem: f"the input is {dtype_name(problem.dtype)}; the kernels read bfloat16, float16 and float32",
)
CORE_BUILT = Requirement(
    "compiled core installed",
    lambda problem: core() is not None,
    lambda problem: f"the compiled core is not installed ({import_optional('pyprune._core')[1]})",
    installation=True,
)
CORE_WITH_CUDA = Requirement(
    "compiled core with CUDA",
    lambda problem: core_build_info()["cuda"],
    lambda problem: "the compiled core was built without CUDA; install again with PYPRUNE_BUILD_CUDA=1",
    installation=True,
)
CORE_FOR_THIS_GPU = Requirement(
    "compiled core for this GPU",
    core_runs_on,
    lambda problem: (
        f"the compiled core was built for {', '.join(core_architectures())}, "
        f"and {torch.cuda.get_device_name(problem.device)} runs none of them"
    ),
    installation=True,
)
TRITON_INSTALLED = Requirement(
    "triton installed",
    lambda problem: import_optional("triton")[0] is not None,
    lambda problem: f"triton is not installed ({import_optional('triton')[1]})",
    installation=True,
)
# Triton 3.6 compiles a launcher in C for every kernel; triton/runtime/build.py looks in these places.
C_COMPILER = Requirement(
    "C compiler for Triton's launchers",
    lambda problem: bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")),
    lambda problem: "triton needs a C compiler for its launchers: install gcc or clang, or name one in CC",
    installation=True,
)
# The kernels copy to shared memory asynchronously and read bfloat16: both came with compute capability 8.0.
AMPERE_OR_LATER = Requirement(
    "compute capability 8.0 or later",
    lambda problem: torch.cuda.get_device_capability(problem.device) >= (8, 0),
    lambda problem: f"{torch.cuda.get_device_name(problem.device)} is older than compute capability 8.0",
)
SIZES_FIT_INT32 = Requirement(
    "rows and channels below 2^31",
    fits_int32,
    lambda problem: f"the shape {list(problem.shape or ())} has a size of 2^31 or more",
)
HALF_DTYPE = Requirement(
    "dtype bfloat16 or float16",
    lambda problem: problem.dtype in (torch.bfloat16, torch.float16),
    lambda problem: f"the input is {dtype_name(problem.dtype)}; the tensor cores' kernel reads bfloat16 and float16",
)
FLOAT32 = Requirement(
    "dtype float32",
    lambda problem: problem.dtype == torch.float32,
    lambda problem: f"the input is {dtype_name(problem.dtype)}; the kernels compute in float32",
)
CORE_WITH_WGMMA = Requirement(
    "compiled core for compute capability 9.0",
    core_runs_wgmma,
    lambda problem: (
        f"the kernel needs wgmma: compute capability 9.0, built for sm_90a; this is "
        f"{torch.cuda.get_device_name(problem.device)}, the core was built for {', '.join(core_architectures())}"
    ),
)
# The tensor memory accelerator reads rows that start on 16 bytes: 8 elements of 2 bytes.
WIDTH_8 = Requirement(
    "channels divisible by 8",
    lambda problem: problem.shape is None or problem.shape[-1] % 8 == 0,
    lambda problem: f"{(problem.shape or (0,))[-1]} channels are not a multiple of 8",
)
ROW_IN_REGISTERS = Requirement(
    "rows of at most 32768 channels",
    lambda problem: problem.shape is None or problem.shape[-1] <= 32768,
    lambda problem: f"a row has {(problem.shape or (0,))[-1]} channels; a program holds at most 32768",
)
# A group of columns is sorted within a row's registers; longer ones are no pattern that anything runs.
BLOCK_OF_COLUMNS = Requirement(
    "blocks of at most 128 columns",
    lambda problem: problem.shape is None or problem.shape[-1] <= 128,
    lambda problem: f"a block has {(problem.shape or (0,))[-1]} columns; a program holds at most 128",
)
# One matrix of the group lies in a multiprocessor's shared memory.
WIDTH_256 = Requirement(
    "units of at most 256 channels",
    lambda problem: problem.shape is None or problem.shape[-1] <= 256,
    lambda problem: f"a unit has {(problem.shape or (0,))[-1]} channels; the kernel holds at most 256",
)

# Order matters: a later predicate may rely on the earlier ones (no capability is asked of a CPU tensor).
REQUIREMENTS: dict[str, dict[str, tuple[Requirement, ...]]] = {
    "channel_moments": {
        "cuda": (ON_NVIDIA_GPU, KERNEL_DTYPE, CORE_BUILT, CORE_WITH_CUDA, CORE_FOR_THIS_GPU),
        "triton": (
            ON_NVIDIA_GPU,
            KERNEL_DTYPE,
            AMPERE_OR_LATER,
            SIZES_FIT_INT32,
            TRITON_INSTALLED,
            C_COMPILER,
        ),
        "cpu": (ON_CPU, KERNEL_DTYPE, CORE_BUILT),
        "reference": (),
    },
    # shape: [rows, channels]. On a CPU the reference is BLAS.
    "hessian": {
        "cuda": (ON_NVIDIA_GPU, HALF_DTYPE, WIDTH_8, CORE_BUILT, CORE_WITH_CUDA, CORE_WITH_WGMMA),
        "triton": (
            ON_NVIDIA_GPU,
            KERNEL_DTYPE,
            AMPERE_OR_LATER,
            SIZES_FIT_INT32,
            TRITON_INSTALLED,
            C_COMPILER,
        ),
        "reference": (),
    },
    # shape: [units, width]
    "grouped_cholesky_errors": {
        "cuda": (ON_NVIDIA_GPU, FLOAT32, WIDTH_256, CORE_BUILT, CORE_WITH_CUDA, CORE_FOR_THIS_GPU),
        "cpu": (ON_CPU, FLOAT32, CORE_BUILT),
        "reference": (),
    },
    # shape: [rows, channels]
    "rms_norm": {
        "triton": (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, ROW_IN_REGISTERS, TRITON_INSTALLED, C_COMPILER),
        "reference": (),
    },
    # shape: [..., channels], of all three
    **{
        operator: {
            "triton": (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, ROW_IN_REGISTERS, TRITON_INSTALLED, C_COMPILER),
            "reference": (),
        }
        for operator in ("rms_norm_gather", "scatter_add", "scatter_add_rms_norm_gather")
    },
    # shape: [batch, heads, tokens, head_dim]
    "rotary": {
        "triton": (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, TRITON_INSTALLED, C_COMPILER),
        "reference": (),
    },
    # shape: that of the gate
    "swiglu": {
        "triton": (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, TRITON_INSTALLED, C_COMPILER),
        "reference": (),
    },
    # shape: [rows, columns of a block]
    "sparsify": {
        "triton": (ON_NVIDIA_GPU, FLOAT32, AMPERE_OR_LATER, BLOCK_OF_COLUMNS, TRITON_INSTALLED, C_COMPILER),
        "reference": (),
    },
    # shape: [channels, channels]
    "eliminate": {
        "cuda": (ON_NVIDIA_GPU, FLOAT32, CORE_BUILT, CORE_WITH_CUDA, CORE_FOR_THIS_GPU),
        "cpu": (ON_CPU, FLOAT32, CORE_BUILT),
        "reference": (),
    },
}

# The first eligible one runs; anything that is not listed runs on the reference.
PREFERENCE: dict[tuple[str, str], tuple[str, ...]] = {
    ("channel_moments", "cuda"): ("cuda", "triton", "reference"),
    ("channel_moments", "cpu"): ("cpu", "reference"),
    ("hessian", "cuda"): ("cuda", "triton", "reference"),
    ("grouped_cholesky_errors", "cuda"): ("cuda", "reference"),
    ("grouped_cholesky_errors", "cpu"): ("cpu", "reference"),
    ("rms_norm", "cuda"): ("triton", "reference"),
    ("rms_norm_gather", "cuda"): ("triton", "reference"),
    ("scatter_add", "cuda"): ("triton", "reference"),
    ("scatter_add_rms_norm_gather", "cuda"): ("triton", "reference"),
    ("rotary", "cuda"): ("triton", "reference"),
    ("swiglu", "cuda"): ("triton", "reference"),
    ("sparsify", "cuda"): ("triton", "reference"),
    ("eliminate", "cuda"): ("cuda", "reference"),
    ("eliminate", "cpu"): ("cpu", "reference"),
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unmet_requirement(operator: str, backend: str, problem: Problem) -> Requirement | None:
    """The first requirement of the backend that the problem does not meet; None: it is eligible."""
    requirements = REQUIREMENTS[operator].get(backend, (NOT_WRITTEN,))
    return next((item for item in requirements if not item.holds(problem)), None)


def preference(operator: str, device: torch.device) -> tuple[str, ...]:
    """The backends meant for this operator and device, preferred first."""
    return PREFERENCE.get((operator, device.type), ("reference",))


def eligible_backends(operator: str, problem: Problem) -> list[str]:
    """All backends that can run it, preferred first; never empty."""
    preferred = preference(operator, problem.device)
    others = [backend for backend in BACKENDS if backend not in preferred]
    return [item for item in (*preferred, *others) if unmet_requirement(operator, item, problem) is None]


def forced_backend(operator: str) -> str | None:
    """The backend that PYPRUNE_BACKEND names; None where it is unset or empty, or the operator is not written for it.

    Raises InputError for a name that is not in BACKENDS.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if name and name not in BACKENDS:
        raise InputError(f"{ENVIRONMENT_VARIABLE}={name} is not a backend; choose {', '.join(BACKENDS)} or unset it")
    return name if name in REQUIREMENTS[operator] else None


def choose_backend(operator: str, x: Tensor, shape: tuple[int, ...] | None = None) -> str:
    """The backend that runs this operator on x; `shape`, where the operator's is not x's own.

    Raises InputError when PYPRUNE_BACKEND names no backend, or one that cannot run this input. Logs, once for
    each cause, that a preferred backend is missing from the installation.
    """
    problem = Problem(x.device, x.dtype, tuple(x.shape) if shape is None else shape)
    forced = forced_backend(operator)
    if forced is not None:
        unmet = unmet_requirement(operator, forced, problem)
        if unmet is not None:
            raise InputError(
                f"{ENVIRONMENT_VARIABLE}={forced} cannot run {operator} here: {unmet.reason(problem)}; "
                f"eligible: {', '.join(eligible_backends(operator, problem))}"
            )
        return forced
    passed_over = []
    for backend in preference(operator, x.device):
        unmet = unmet_requirement(operator, backend, problem)
        if unmet is None:
            break
        if unmet.installation:
            passed_over.append(f"cannot use {backend}: {unmet.reason(problem)}")
    for reason in passed_over:
        warn_once(f"{operator} on {x.device.type} {reason}; running {backend}")
    return backend


def choose(operator: str, x: Tensor) -> BackendChoice:
    """As choose_backend, with the reason against each other backend."""
    backend = choose_backend(operator, x)
    return explain(operator, Problem(x.device, x.dtype, tuple(x.shape)), backend, forced_backend(operator))


def explain(operator: str, problem: Problem, backend: str, forced: str | None) -> BackendChoice:
    """The choice of `backend`, with the reason against each other one."""
    passed_over = f"{ENVIRONMENT_VARIABLE}={forced}" if forced else f"{backend} is preferred"
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
    """What would run for every operator, device of this machine and dtype.

    The backend is "none" where PYPRUNE_BACKEND forces one that is not eligible.
    """
    devices = [torch.device("cpu")] + [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = []
    for operator in REQUIREMENTS:
        forced = forced_backend(operator)
        for device in devices:
            for dtype in LISTED_DTYPES:
                problem = Problem(device, dtype, None)
                eligible = eligible_backends(operator, problem)
                backend = forced or eligible[0]
                choice = explain(operator, problem, backend if backend in eligible else "none", forced)
                rows.append(BackendRow(operator, str(device), dtype_name(dtype), choice.backend, choice.reasons))
    return rows


def describe_installation() -> dict[str, str]:
    """Versions and builds that the choice rests on: torch, CUDA, triton, the compiled core, tuned configurations.

    InputError where PYPRUNE_TUNING names a table that is not for this machine.
    """
    module, why_not = import_optional("triton")
    facts = {
        "torch": torch.__version__,
        "torch CUDA": str(torch.version.cuda),
        "triton": module.__version__ if module is not None else f"not installed ({why_not})",
    }
    if core() is None:
        facts["core"] = f"not installed ({import_optional('pyprune._core')[1]})"
    else:
        facts |= {f"core {key}": describe_value(value) for key, value in core_build_info().items()}
    return facts | describe_tables()


def describe_value(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)
