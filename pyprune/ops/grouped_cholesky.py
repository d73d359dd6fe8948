"""The error of removing each unit alone: one small Cholesky factorisation for every diagonal block of A = H^-1.

Optimal Brain Surgeon on units. The operator is `pyprune::grouped_cholesky_errors`;
`grouped_cholesky_errors_reference` says in plain PyTorch what it computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import WIDE, check_device, check_kind, check_square
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .precision import exact_float32
from .requirements import CORE_BUILT, CUDA_CORE, FLOAT32, ON_CPU, ON_NVIDIA_GPU, WIDTH_256, required_core

OPERATOR = "grouped_cholesky_errors"
NAME = "grouped Cholesky"  # in messages


def diagonal_blocks(x: Tensor, width: int) -> Tensor:
    """The diagonal blocks [units, width, width] of x [d, d], a view."""
    units = x.shape[0] // width
    blocks = x.unflatten(1, (units, width)).unflatten(0, (units, width))  # [units, width, units, width]
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def grouped_cholesky_errors_reference(a: Tensor, g: Tensor, width: int, diagonal: bool = False) -> Tensor:
    """Reference of grouped_cholesky_errors in plain PyTorch: any device, float32 or float64.

    A block that is not positive definite is found by cholesky_ex, which asks nothing of the host. With M = L^-1 from
    one triangular solve, A_SS^-1 = MᵀM by one product: on a GPU faster than two solves against G. Temporaries have the
    size of the diagonal blocks, d·width.
    """
    check_tensors(a, g, width)
    if len(a) == 0:
        return a.new_empty(0)
    factors, failed = torch.linalg.cholesky_ex(diagonal_blocks(a, width))  # [units, w, w], [units]
    g_blocks = diagonal_blocks(g, width)
    if diagonal:
        squares = g_blocks.diagonal(dim1=1, dim2=2)  # [units, w]
        errors = (squares / factors.diagonal(dim1=1, dim2=2).square()).sum(1)
    else:
        identity = torch.eye(width, dtype=a.dtype, device=a.device).expand_as(factors)
        m = torch.linalg.solve_triangular(factors, identity, upper=False)
        with exact_float32():
            inverse = m.mT @ m
        squares = g_blocks.diagonal(dim1=1, dim2=2) * inverse.diagonal(dim1=1, dim2=2)
        errors = squares.sum(1) + 2 * (g_blocks.tril(-1) * inverse).sum((1, 2))
    return errors.masked_fill(failed != 0, torch.nan)


def check_tensors(a: Tensor, g: Tensor, width: int) -> None:
    """ValueError unless a and g are matrices of one size that `width` divides."""
    check_square(NAME, "a", a)
    for name, x in (("a", a), ("g", g)):
        check_kind(NAME, name, x, WIDE)
    if g.dtype != a.dtype or g.shape != a.shape:
        raise ValueError(
            f"grouped Cholesky: g is {g.dtype} {list(g.shape)}; a needs {a.dtype} {list(a.shape)}",
        )
    check_device(NAME, "g", g, "a", a)
    if width < 1 or a.shape[0] % width != 0:
        raise ValueError(f"grouped Cholesky: {a.shape[0]} channels do not divide into units of {width}")


def check_strides(a: Tensor, g: Tensor) -> None:
    """ValueError unless the kernels can read the rows of a and g as they lie."""
    for name, x in (("a", a), ("g", g)):
        if x.shape[0] > 1 and (x.stride(1) != 1 or x.stride(0) < x.shape[1]):
            raise ValueError(f"grouped Cholesky: {name} has strides {list(x.stride())}; its rows must be contiguous")


@torch.library.custom_op(
    "pyprune::grouped_cholesky_errors",
    mutates_args=(),
    schema="(Tensor a, Tensor g, SymInt width, bool diagonal=False) -> Tensor",
)
def grouped_cholesky_errors(a: Tensor, g: Tensor, width: int, diagonal: bool = False) -> Tensor:
    """The error of removing each unit alone, [units] in a's dtype, units = d / width.

    a: [d, d] float32 (float64: reference only), A = H^-1; g: the same shape and dtype, G = WᵀW; rows contiguous, any
    row stride. Of both only the lower triangles of the diagonal blocks are read. With A_SS = L Lᵀ for the columns S
    of a unit:

        diagonal=False   tr(A_SS^-1 G_SS), the least-squares error of removing the unit (Hassibi & Stork 1993)
        diagonal=True    Σ_j G_jj / L_jj², SlimGPT's grouped Cholesky (arXiv 2412.18110)

    A unit whose block is not positive definite gets NaN; the others are what they would be without it. Nothing waits
    for the device. Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(a, g, width)
    check_strides(a, g)
    units = a.shape[0] // width
    if units == 0:
        return a.new_empty(0)
    return choose_launch(GROUPED_CHOLESKY, a, (units, width))(a, g, width, diagonal)


@grouped_cholesky_errors.register_fake
def _(a: Tensor, g: Tensor, width: int, diagonal: bool = False) -> Tensor:
    """[units]; what does not fit fails while it is traced."""
    check_tensors(a, g, width)
    check_strides(a, g)
    return a.new_empty(a.shape[0] // width)


def row_stride(x: Tensor) -> int:
    """The stride of a single row has no meaning and may be anything."""
    return x.stride(0) if x.shape[0] > 1 else 1


def launch_cpu(a: Tensor, g: Tensor, width: int, diagonal: bool) -> Tensor:
    errors = a.new_empty(a.shape[0] // width)
    required_core().grouped_cholesky_errors_cpu(
        a.data_ptr(),
        row_stride(a),
        g.data_ptr(),
        row_stride(g),
        len(errors),
        width,
        diagonal,
        errors.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return errors


def launch_cuda(a: Tensor, g: Tensor, width: int, diagonal: bool) -> Tensor:
    with torch.cuda.device(a.device):
        errors = a.new_empty(a.shape[0] // width)
        required_core().grouped_cholesky_errors_cuda(
            a.data_ptr(),
            row_stride(a),
            g.data_ptr(),
            row_stride(g),
            len(errors),
            width,
            diagonal,
            errors.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return errors


# Shape: [units, width]
GROUPED_CHOLESKY: Operator[Callable[[Tensor, Tensor, int, bool], Tensor]] = Operator(
    OPERATOR,
    versions={"grouped_cholesky_errors": 1, "grouped_cholesky_errors_reference": 1},
    kernels={
        "cuda": Kernel(launch_cuda, (ON_NVIDIA_GPU, FLOAT32, WIDTH_256, *CUDA_CORE)),
        "cpu": Kernel(launch_cpu, (ON_CPU, FLOAT32, CORE_BUILT)),
        "reference": Kernel(grouped_cholesky_errors_reference),
    },
)
