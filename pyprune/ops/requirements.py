"""Requirements of kernels: named predicates of device, dtype, shape and installation, each with a reason.

An operator's file lists those of each of its kernels (declaration.py); dispatch.py asks them. Nothing here names an
operator.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

# The dtypes of activations that the compiled kernels read.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """Problem that a backend is chosen for. shape: as the operator's file defines it; None: any shape."""

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


@cache
def import_optional(name: str) -> tuple[ModuleType | None, str]:
    """Import an optional module: the module, or None and the interpreter's reason."""
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
    """Select the core's targets that run on a device of this compute capability.

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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_text(problem: Problem) -> str:
    return f"the input is on {problem.device}"


ON_NVIDIA_GPU = Requirement("input on an NVIDIA GPU", is_nvidia_gpu, device_text)
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

# Requirements that most kernels of a backend end with.
CUDA_CORE = (CORE_BUILT, CORE_WITH_CUDA, CORE_FOR_THIS_GPU)
TRITON = (TRITON_INSTALLED, C_COMPILER)
