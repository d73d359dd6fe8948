"""Arithmetic of the library's matrix products. The settings are the process's, not the thread's."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

CUDA_PRODUCTS: Any = torch.backends.cuda.matmul
CPU_PRODUCTS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def exact_float32() -> AbstractContextManager[None]:
    """Products of float32 matrices in float32, whatever the caller set; his setting is put back.

    TF32's 10 bits of mantissa are too few where A's condition number is above 1000, and on Hessians of low rank it
    made the error of the chosen units up to 26 % worse.
    """
    return set_precision((CUDA_PRODUCTS, CPU_PRODUCTS), "ieee")


def tf32_products() -> AbstractContextManager[None]:
    """Products of float32 matrices on a GPU in TF32, for operands made for it; the caller's setting is put back."""
    return set_precision((CUDA_PRODUCTS,), "tf32")


@contextmanager
def set_precision(settings: Sequence[Any], precision: str) -> Iterator[None]:
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = precision
        yield
    finally:
        for setting, own in zip(settings, before, strict=True):
            setting.fp32_precision = own
