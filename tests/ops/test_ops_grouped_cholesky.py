"""The errors of removing single units on every backend that this machine has, against float64."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyprune.ops import grouped_cholesky_errors, grouped_cholesky_errors_reference, use_backend
from pyprune.ops.dispatch import choose_backend, unmet_requirement
from pyprune.ops.grouped_cholesky import OPERATOR, diagonal_blocks
from pyprune.ops.requirements import Problem

CASES = [
    pytest.param("cpu", "cpu"),
    pytest.param("reference", "cpu"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("reference", "cuda", marks=pytest.mark.gpu),
]
each_backend = pytest.mark.parametrize(("backend", "device"), CASES)
each_error = pytest.mark.parametrize("diagonal", [False, True], ids=["exact", "diagonal"])
FP32_UNIT = 2.0**-24


@contextmanager
def forced(backend: str, device: str, width: int) -> Iterator[None]:
    """Run on this backend; skip, with the table's own reason, where this machine lacks it."""
    unmet = unmet_requirement(OPERATOR, backend, Problem(torch.device(device), torch.float32, (1, width)))
    if unmet is not None:
        pytest.skip(unmet.reason(Problem(torch.device(device), torch.float32, (1, width))))
    with use_backend(backend):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_condition(width: int, condition: float) -> Tensor:
    basis = torch.linalg.qr(normal(width, width))[0]
    return (basis * condition ** -torch.linspace(0, 1, width, dtype=torch.float64)) @ basis.T


def tridiagonal(width: int) -> Tensor:
    ones = torch.ones(width - 1, dtype=torch.float64)
    return 2.1 * torch.eye(width, dtype=torch.float64) - torch.diag(ones, 1) - torch.diag(ones, -1)


def low_rank(width: int) -> Tensor:
    x = normal(width, max(1, width // 8))
    h = x @ x.T
    return h + 0.01 * h.diagonal().mean() * torch.eye(width, dtype=torch.float64)


def row_scaled(width: int) -> Tensor:
    x = normal(width, 2 * width) * 10 ** (3 * torch.rand(width, 1, dtype=torch.float64) - 1.5)
    return x @ x.T


def dense(width: int) -> Tensor:
    x = normal(width, 2 * width)
    return x @ x.T


FAMILIES = {
    "dense": dense,
    "low rank, damped": low_rank,
    "its inverse": lambda width: torch.linalg.inv(low_rank(width)),
    "row-scaled": row_scaled,
    "diagonal": lambda width: torch.diag(torch.logspace(-2, 2, width, dtype=torch.float64)),
    "tridiagonal": tridiagonal,
    "condition 1e5": lambda width: with_condition(width, 1e5),
}


def products(width: int, seed: int) -> Tensor:
    w = normal(width + 5, width, seed=seed)
    return w.T @ w


def block_matrix(blocks: list[Tensor], device: str) -> Tensor:
    """Float32 [d, d], rows of a wider buffer; NaN wherever the operator has no business."""
    width, size = len(blocks[0]), len(blocks) * len(blocks[0])
    lower = torch.full((width, width), torch.nan).triu(1)
    buffer = torch.full((size, size + 3), torch.nan)
    for i, block in enumerate(blocks):
        own = slice(i * width, (i + 1) * width)
        buffer[own, 1:][:, own] = block.float().tril() + lower
    return buffer.to(device)[:, 1 : size + 1]


def exact_errors(a: Tensor, g: Tensor, width: int, diagonal: bool) -> tuple[Tensor, Tensor]:
    """Errors and condition numbers [units] of the float32 inputs as they are, in float64 on the CPU."""
    a_blocks, g_blocks = (diagonal_blocks(x.double().cpu(), width).tril() for x in (a, g))
    a_blocks, g_blocks = (x + x.tril(-1).mT for x in (a_blocks, g_blocks))
    if diagonal:
        pivots = torch.linalg.cholesky(a_blocks).diagonal(dim1=1, dim2=2).square()
        errors = (g_blocks.diagonal(dim1=1, dim2=2) / pivots).sum(1)
    else:
        factors = torch.linalg.cholesky(a_blocks)
        errors = torch.cholesky_solve(g_blocks, factors).diagonal(dim1=1, dim2=2).sum(1)
    return errors, torch.linalg.cond(a_blocks)


def solved_errors(a: Tensor, g: Tensor, width: int, diagonal: bool) -> Tensor:
    """By two solves against G, in the precision of a."""
    if diagonal:
        return grouped_cholesky_errors_reference(a, g, width, diagonal)
    factors = torch.linalg.cholesky_ex(diagonal_blocks(a, width))[0]
    lower = diagonal_blocks(g, width).tril()
    return torch.cholesky_solve(lower + lower.tril(-1).mT, factors).diagonal(dim1=1, dim2=2).sum(1)


def assert_accurate(a: Tensor, g: Tensor, width: int, diagonal: bool, errors: Tensor) -> None:
    """Backward stable: a relative error ≲ u·cond (the c·w of the worst case is near 1 for random roundings, Higham 2002
    §2.8); or at most twice that of PyTorch's solves in float32, + 4 roundings."""
    exact, condition = exact_errors(a, g, width, diagonal)
    torch_errors = solved_errors(a, g, width, diagonal).double().cpu()
    limit = (2 * (torch_errors / exact - 1).abs() + 4 * FP32_UNIT).maximum(2 * FP32_UNIT * condition)
    assert ((errors.double().cpu() / exact - 1).abs() <= limit).all()


@each_backend
@each_error
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", [1, 3, 64, 80, 128, 129, 200, 256])
def test_matches_float64(width: int, family: str, diagonal: bool, backend: str, device: str) -> None:
    a = block_matrix([FAMILIES[family](width), dense(width)], device)
    g = block_matrix([products(width, 1), products(width, 2)], device)
    with forced(backend, device, width):
        errors = grouped_cholesky_errors(a, g, width, diagonal)
    assert errors.dtype == torch.float32
    assert errors.device == a.device
    assert_accurate(a, g, width, diagonal, errors)


@each_backend
@each_error
@settings(max_examples=40, derandomize=True, deadline=None)
@given(width=st.integers(1, 70))
def test_any_small_width(width: int, diagonal: bool, backend: str, device: str) -> None:
    a = block_matrix([dense(width)] * 3, device)
    g = block_matrix([products(width, seed) for seed in range(3)], device)
    with forced(backend, device, width):
        errors = grouped_cholesky_errors(a, g, width, diagonal)
    assert_accurate(a, g, width, diagonal, errors)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@each_error
def test_wide_units(diagonal: bool, device: str) -> None:
    """On a GPU those are left to the library."""
    a, g = block_matrix([dense(384)] * 2, device), block_matrix([products(384, 1)] * 2, device)
    if device == "cuda":
        assert choose_backend(OPERATOR, a, (2, 384)) == "reference"
    assert_accurate(a, g, 384, diagonal, grouped_cholesky_errors(a, g, 384, diagonal))


@each_backend
@each_error
def test_more_units_than_multiprocessors(diagonal: bool, backend: str, device: str) -> None:
    width, units = 12, 300
    a = block_matrix([dense(width) * (1 + i) for i in range(units)], device)
    g = block_matrix([products(width, i) for i in range(units)], device)
    with forced(backend, device, width):
        errors = grouped_cholesky_errors(a, g, width, diagonal)
    assert_accurate(a, g, width, diagonal, errors)


@each_backend
def test_error_is_that_of_the_weights(backend: str, device: str) -> None:
    """tr(W_S A_SS^-1 W_Sᵀ): what a caller means by it."""
    width, units = 16, 5
    d = width * units
    w = normal(40, d)
    a = torch.linalg.inv(dense(d)).contiguous()
    expected = [
        torch.trace(w[:, s] @ torch.linalg.inv(a[s, s]) @ w[:, s].T)
        for s in (slice(i * width, (i + 1) * width) for i in range(units))
    ]
    with forced(backend, device, width):
        errors = grouped_cholesky_errors(a.float().to(device), (w.T @ w).float().to(device), width)
    torch.testing.assert_close(errors.cpu().double(), torch.stack(expected), rtol=1e-3, atol=0)


@each_backend
@each_error
@pytest.mark.parametrize("width", [1, 3, 40, 128, 200])
@pytest.mark.parametrize("fault", ["negative", "zero", "nan"])
def test_not_positive_definite_is_nan_for_that_unit(
    fault: str, width: int, diagonal: bool, backend: str, device: str
) -> None:
    a = block_matrix([dense(width)] * 4, device)
    g = block_matrix([products(width, seed) for seed in range(4)], device)
    with forced(backend, device, width):
        clean = grouped_cholesky_errors(a, g, width, diagonal)
        for unit, column in ((1, 0), (3, width - 1)):
            channel = unit * width + column
            a[channel, channel] = {"negative": -1.0, "zero": 0.0, "nan": torch.nan}[fault]
        errors = grouped_cholesky_errors(a, g, width, diagonal)
    assert errors[[1, 3]].isnan().all()
    assert torch.equal(errors[[0, 2]], clean[[0, 2]])


@each_backend
def test_nothing_lost_is_no_error_and_nan_stays_nan(backend: str, device: str) -> None:
    a = block_matrix([dense(20), -dense(20)], device)
    with forced(backend, device, 20):
        errors = grouped_cholesky_errors(a, torch.zeros(40, 40, device=device), 20)
    assert errors[0] == 0
    assert errors[1].isnan()


@each_backend
@each_error
@pytest.mark.parametrize("width", [80, 200])
def test_same_bits_three_times(width: int, diagonal: bool, backend: str, device: str) -> None:
    a, g = block_matrix([low_rank(width)] * 3, device), block_matrix([products(width, 3)] * 3, device)
    with forced(backend, device, width):
        first, second, third = (grouped_cholesky_errors(a, g, width, diagonal) for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert (first == first[0]).all()


@each_backend
def test_inputs_are_left_alone(backend: str, device: str) -> None:
    a, g = block_matrix([dense(30)] * 2, device), block_matrix([products(30, 1)] * 2, device)
    before = a.clone(), g.clone()
    with forced(backend, device, 30):
        grouped_cholesky_errors(a, g, 30)
    for x, y in zip((a, g), before, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float64_runs_on_the_reference_alone(device: str) -> None:
    a, g = dense(60).to(device), products(60, 1).to(device)
    errors = grouped_cholesky_errors(a, g, 20)
    exact, _ = exact_errors(a, g, 20, False)
    assert errors.dtype == torch.float64
    torch.testing.assert_close(errors.cpu(), exact, rtol=1e-12, atol=0)


def test_no_units() -> None:
    assert grouped_cholesky_errors(torch.zeros(0, 0), torch.zeros(0, 0), 4).shape == (0,)


@pytest.mark.parametrize(
    ("a", "g", "width", "message"),
    [
        (torch.zeros(4, 6), torch.zeros(4, 6), 2, r"a is \[4, 6\]"),
        (torch.zeros(4), torch.zeros(4), 2, r"a is \[4\]"),
        (torch.zeros(4, 4).half(), torch.zeros(4, 4).half(), 2, "a is torch.float16"),
        (torch.zeros(4, 4), torch.zeros(4, 4).double(), 2, "g is torch.float64"),
        (torch.zeros(4, 4), torch.zeros(6, 6), 2, r"g is torch.float32 \[6, 6\]"),
        (torch.zeros(4, 4), torch.zeros(4, 4, device="meta"), 2, "g is on meta and a on cpu"),
        (torch.zeros(4, 4), torch.zeros(4, 4), 3, "4 channels do not divide into units of 3"),
        (torch.zeros(4, 4), torch.zeros(4, 4), 0, "units of 0"),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(4, 4), 2, "a has strides"),
        (torch.zeros(4, 4), torch.zeros(4, 4).T, 2, "g has strides"),
    ],
)
def test_arguments_that_do_not_fit(a: Tensor, g: Tensor, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_cholesky_errors(a, g, width)


@each_backend
@each_error
def test_opcheck(diagonal: bool, backend: str, device: str) -> None:
    a, g = dense(24).float().to(device), products(24, 1).float().to(device)
    with forced(backend, device, 8):
        torch.library.opcheck(grouped_cholesky_errors, (a, g, 8, diagonal))


@each_backend
def test_compiles_as_one_graph(backend: str, device: str) -> None:
    a, g = dense(24).float().to(device), products(24, 1).float().to(device)
    torch.compiler.reset()
    compiled = torch.compile(lambda a, g: grouped_cholesky_errors(a, g * 2, 8) + 1, fullgraph=True, backend="aot_eager")
    with forced(backend, device, 8):
        assert torch.equal(compiled(a, g), grouped_cholesky_errors(a, g * 2, 8) + 1)
