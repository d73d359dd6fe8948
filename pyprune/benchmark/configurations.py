"""Configurations and shapes that `pyprune tune` tries. Imports Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.precision import exact_float32
from ..triton_kernels import channel_moments as moments_kernels
from ..triton_kernels import hessian as hessian_kernels
from .cases.channel_moments import ROUNDINGS, largest_errors, var_mean
from .cases.hessian import largest_allowed, largest_error, update_float32
from .search import Shape

Capability = tuple[int, int]
WHOLE_BAND = 1 << 20  # one band: after its first column, row by row


@dataclass(frozen=True)
class Tunable:
    """An operator whose Triton kernel has a Configuration.

    run(x, state, configuration, multiprocessors) changes the state; state(channels, device) is that of no rows.
    judge(x): what says of a state after x what is wrong with it, None if nothing is.
    """

    shipped: Callable[[Capability, int], Any]
    configurations: Callable[[Capability, int, bool], list[Any]]
    shapes: Callable[[int, bool], list[Shape]]
    state: Callable[[int, torch.device], Tensor]
    run: Callable[[Tensor, Tensor, Any, int], None]
    judge: Callable[[Tensor], Callable[[Tensor], str | None]]


def moments_configurations(capability: Capability, element_size: int, quick: bool) -> list[Any]:
    """Tiles whose columns each lie in one thread, 16 bytes a row, as deep and as many as shared memory may hold."""
    shipped = moments_kernels.shipped_configuration(capability, element_size)
    if quick:
        return [replace(shipped, resident=resident) for resident in (2, 3, 4)]
    found = []
    for rows, warps in ((8, 4), (8, 2), (8, 8), (4, 4), (4, 8), (16, 2)):
        channels = 32 * warps * 16 // element_size
        for stages in (1, 3, 4, 6):
            for resident in (2, 3, 4, 6):
                held = (stages - 1) * rows * channels * element_size * resident
                if held <= 228 * 1024:  # the most that any multiprocessor has (sm_90)
                    found += [
                        moments_kernels.Configuration(
                            rows, channels, warps, stages, resident, waves, shipped.early_merge
                        )
                        for waves in (1, 2)
                    ]
    if shipped.early_merge:
        found.append(replace(shipped, early_merge=False))
    return found


def hessian_configurations(capability: Capability, element_size: int, quick: bool) -> list[Any]:
    """Depths and stages of the shipped tile, and the bands in which tiles are walked."""
    shipped = hessian_kernels.shipped_configuration(capability, element_size)
    if quick:
        return [replace(shipped, band=band) for band in (8, 16)]
    if element_size == 4:
        shapes = [(16, 4), (16, 6), (32, 2), (32, 4), (64, 2)]
    elif shipped.tma:
        shapes = [(32, 8), (32, 10), (64, 4), (64, 5), (128, 3)]
    else:
        shapes = [(32, 4), (32, 6), (64, 3), (64, 5)]
    found = [replace(shipped, depth=depth, stages=stages) for depth, stages in shapes]
    found += [replace(shipped, band=band) for band in (6, 8, 16, 24, WHOLE_BAND)]
    if shipped.tma:
        found.append(hessian_kernels.POINTERS)
    return found


def moments_shapes(element_size: int, quick: bool) -> list[Shape]:
    if quick:
        return [(8192, 4096)]
    return [(32768, 4096), (32768, 11008), (16384, 28672)] if element_size == 2 else [(16384, 4096), (16384, 11008)]


def hessian_shapes(element_size: int, quick: bool) -> list[Shape]:
    if quick:
        return [(8192, 4096)]
    return [(32768, 4096), (32768, 11008), (16384, 14336)] if element_size == 2 else [(8192, 4096), (8192, 11008)]


def run_moments(x: Tensor, state: Tensor, configuration: Any, multiprocessors: int) -> None:
    mean, m2 = state
    moments_kernels.channel_moments_triton(x, 0, mean, m2, configuration, multiprocessors)


def judge_moments(x: Tensor) -> Callable[[Tensor], str | None]:
    limits = largest_errors(x, *var_mean(x.float()))

    def fault(state: Tensor) -> str | None:
        mean, m2 = state
        for what, error, limit in zip(("mean", "M2"), largest_errors(x, mean, m2), limits, strict=True):
            if not error <= 2 * limit + ROUNDINGS:
                return f"error of {what} {error:.1e}, var_mean's {limit:.1e}"
        return None

    return fault


def run_hessian(x: Tensor, state: Tensor, configuration: Any, multiprocessors: int) -> None:
    hessian_kernels.hessian_triton(x, state, None, configuration, multiprocessors)


def judge_hessian(x: Tensor) -> Callable[[Tensor], str | None]:
    plain = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    with exact_float32():
        update_float32(x, plain)
    allowed = largest_allowed(largest_error(x, plain), len(x))

    def fault(state: Tensor) -> str | None:
        error = largest_error(x, state)
        return None if error <= allowed else f"error {error:.1e}, allowed {allowed:.1e}"

    return fault


TUNABLE = {
    "channel_moments": Tunable(
        moments_kernels.shipped_configuration,
        moments_configurations,
        moments_shapes,
        lambda channels, device: torch.zeros(2, channels, device=device),
        run_moments,
        judge_moments,
    ),
    "hessian": Tunable(
        hessian_kernels.shipped_configuration,
        hessian_configurations,
        hessian_shapes,
        lambda channels, device: torch.zeros(channels, channels, device=device),
        run_hessian,
        judge_hessian,
    ),
}


def names_of(configuration: Any, others: Sequence[Any]) -> str:
    """The fields in which it differs from all of the others, else all of its fields."""
    own = vars(configuration)
    differing = {name: value for name, value in own.items() if any(vars(other)[name] != value for other in others)}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in (differing or own).items())
