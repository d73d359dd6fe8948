"""Tests of an operator on every backend that this machine has."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pyprune.ops import use_backend
from pyprune.ops.dispatch import unmet_requirement
from pyprune.ops.requirements import Problem

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def each_backend_of(*kernels: str) -> pytest.MarkDecorator:
    """Parametrize `backend` and `device`: each kernel where it runs, the reference on both devices."""
    on_gpu = [*(kernel for kernel in kernels if kernel != "cpu"), "reference"]
    on_cpu = [*(kernel for kernel in kernels if kernel == "cpu"), "reference"]
    cases = [pytest.param(backend, "cpu") for backend in on_cpu]
    cases += [pytest.param(backend, "cuda", marks=pytest.mark.gpu) for backend in on_gpu]
    return pytest.mark.parametrize(("backend", "device"), cases)


@contextmanager
def forced_backend(
    operator: str, backend: str, device: str, dtype: torch.dtype = torch.float32, width: int | None = None
) -> Iterator[None]:
    """Run on this backend; skip, with the table's own reason, where it cannot run an input [1, width].

    Without a width nothing is asked of the shape.
    """
    problem = Problem(torch.device(device), dtype, None if width is None else (1, width))
    unmet = unmet_requirement(operator, backend, problem)
    if unmet is not None:
        pytest.skip(unmet.reason(problem))
    with use_backend(backend):
        yield
