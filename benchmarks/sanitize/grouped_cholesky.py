"""Grouped Cholesky: both errors from NaN-filled memory over odd widths, an indefinite unit among them."""

from collections.abc import Iterator

import pyprune._core as core
import torch

UNITS = 3
INDEFINITE = 1


def errors_are_right(width: int, diagonal: bool) -> bool:
    """Units in rows of a wider NaN-filled buffer, of which only the lower triangles are filled."""
    size = UNITS * width
    memory = torch.full((2, size, size + 5), float("nan"))
    exact = []
    for unit in range(UNITS):
        own = slice(unit * width, (unit + 1) * width)
        a, g = (x @ x.T for x in torch.randn(2, width, 2 * width + 3))
        factor = torch.linalg.cholesky(a.double())
        if diagonal:
            exact.append((g.double().diagonal() / factor.diagonal().square()).sum())
        else:
            exact.append(torch.cholesky_solve(g.double(), factor).trace())
        above = torch.full((width, width), float("nan")).triu(1)
        for target, block in zip(memory, (a, g), strict=True):
            target[own, own] = block.tril() + above
    last = (INDEFINITE + 1) * width - 1
    memory[0, last, last] = -1.0
    on_device = memory.cuda()
    errors = torch.full((UNITS,), float("inf"), device="cuda")
    core.grouped_cholesky_errors_cuda(
        on_device[0].data_ptr(),
        size + 5,
        on_device[1].data_ptr(),
        size + 5,
        UNITS,
        width,
        diagonal,
        errors.data_ptr(),
        torch.cuda.current_stream().cuda_stream,
    )
    exact[INDEFINITE].fill_(float("nan"))
    return torch.allclose(errors.cpu().double(), torch.stack(exact), rtol=1e-3, atol=0, equal_nan=True)


def cases() -> Iterator[tuple[str, bool]]:
    for width in (1, 3, 33, 80, 128, 200, 256):
        for diagonal in (False, True):
            yield f"grouped Cholesky {(width, diagonal)}", errors_are_right(width, diagonal)
