"""Rates at which this device copies and multiplies, measured in the same run: the floor of a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch

from ..ops.precision import exact_float32, tf32_products
from .timing import Timer

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
# Without instructions for bfloat16 a CPU multiplies it at 1 GFLOP/s.
CPU_BFLOAT16_SIZE = 256
# A float32 product of split operands takes three of TF32 (pyprune/ops/split_tf32.py).
SPLIT_PRODUCTS = 3


@dataclass(frozen=True)
class Work:
    """Least work of an operator, in any implementation.

    bytes: read and written once each; flops: additions and multiplications, of a symmetric result those of one
    triangle; products: the type of what is multiplied, bfloat16 or float32.
    """

    bytes: int
    flops: int
    products: str = "float32"


@dataclass(frozen=True)
class Floor:
    """microseconds: no call can be shorter, by these rates; bound: memory or arithmetic, whichever takes longer."""

    microseconds: float
    bound: str


@dataclass(frozen=True)
class Rates:
    """copy: bytes a second that a large copy reads and writes. The others: FLOP/s of large square products of random
    normal numbers; tf32 is None on a CPU."""

    copy: float
    bfloat16: float
    float32: float
    tf32: float | None

    def product_rate(self, products: str) -> float:
        """FLOP/s of the fastest way here to multiply numbers of this type as exactly as float32 does."""
        exact = max(self.float32, (self.tf32 or 0.0) / SPLIT_PRODUCTS)
        return max(self.bfloat16, exact) if products == "bfloat16" else exact

    def floor(self, work: Work) -> Floor:
        memory, arithmetic = work.bytes / self.copy * 1e6, work.flops / self.product_rate(work.products) * 1e6
        return Floor(max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic")

    def document(self) -> dict[str, float | None]:
        return asdict(self)


def measure_rates(timer: Timer) -> Rates:
    on_gpu = timer.device.type == "cuda"
    return Rates(
        copy_rate(timer),
        product_rate(timer, torch.bfloat16, nullcontext),
        product_rate(timer, torch.float32, exact_float32),
        product_rate(timer, torch.float32, tf32_products) if on_gpu else None,
    )


def copy_rate(timer: Timer) -> float:
    source = torch.empty(COPY_BYTES[timer.device.type], dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    timing = timer(lambda: target.copy_(source))
    return 2 * source.nbytes / (timing.median * 1e-6)


def product_rate(timer: Timer, dtype: torch.dtype, precision: Callable[[], AbstractContextManager[None]]) -> float:
    on_cpu = timer.device.type == "cpu"
    size = CPU_BFLOAT16_SIZE if on_cpu and dtype == torch.bfloat16 else PRODUCT_SIZE[timer.device.type]
    generator = torch.Generator(timer.device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=timer.device).to(dtype) for _ in range(2))
    with precision():
        timing = timer(lambda: a @ b)
    return 2 * size**3 / (timing.median * 1e-6)
