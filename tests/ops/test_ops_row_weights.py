"""Weights of rows in the Hessian and the channel moments, on every backend of this machine, against float64."""

from collections.abc import Callable

import pytest
import torch
from support.forced_backend import each_backend_of, each_device, forced_backend
from support.random_rows import with_offsets
from torch import Tensor

from pyprune.ops import (
    ChannelMoments,
    Hessian,
    channel_moments_update,
    channel_moments_update_reference,
    hessian_finish,
    hessian_update,
)
from pyprune.ops.hessian import HESSIAN, hessian_update_reference, padded_squares
from pyprune.ops.requirements import KERNEL_DTYPES
from pyprune.ops.row_weights import divisor_of

each_hessian_backend = each_backend_of("cuda", "triton")
each_moments_backend = each_backend_of("cpu", "cuda", "triton")
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES)
SHAPES = [(1, 8), (37, 5), (129, 65), (700, 264)]
FP32_UNIT = 2.0**-24

# Half a unit in the last place of the rows' type: what one operand of a kernel's product is rounded by, where a weight
# is no power of two.
# float32 is multiplied as tf32x3, which keeps 22 bits of each factor and leaves out the product of the small halves.
ELEMENT_ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 3 * 2.0**-22}


def powers_of_two(rows: int, device: str, largest: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (2.0 ** torch.randint(-largest, largest + 1, (rows,), generator=generator)).to(device)


def any_weights(rows: int, device: str) -> Tensor:
    """Between 0.1 and 3, of both signs, every fifth one 0 from the third row on."""
    generator = torch.Generator().manual_seed(rows)
    weights = torch.empty(rows).uniform_(0.1, 3, generator=generator)
    weights[1::7] *= -1
    weights[2::5] = 0
    return weights.to(device)


def integers(rows: int, channels: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows whose products, times 2⁻⁴ … 2⁴, have exact sums in float32: any order gives the same bits."""
    generator = torch.Generator().manual_seed(rows * 100_003 + channels)
    return torch.randint(-4, 5, (rows, channels), generator=generator).to(device, dtype)


def exact_hessian(x: Tensor, weights: Tensor, centred: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w² x xᵀ, or of x − m, Σ w² x and Σ w² in float64."""
    rows, squares = x.double(), weights.double().square()
    sums, total = squares @ rows, squares.sum()
    if centred:
        rows = rows - sums / total
    return torch.einsum("t,ti,tj->ij", squares, rows, rows), sums, total


def exact_moments(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    rows, squares = x.double(), weights.double().square()
    mean = squares @ rows / squares.sum()
    return mean, squares @ (rows - mean).square()


def hessian_of(*batches: tuple[Tensor, Tensor]) -> Hessian:
    """The state after the weighted batches; what it may not read, above the diagonal, was NaN."""
    first = batches[0][0]
    hessian = Hessian.zeros(first.shape[-1], first.device, sums=True)
    hessian.lower.masked_fill_(torch.ones_like(hessian.lower, dtype=torch.bool).triu(1), torch.nan)
    for x, weights in batches:
        hessian.update(x, weights)
    return hessian


def moments_of(*batches: tuple[Tensor, Tensor]) -> ChannelMoments:
    moments = ChannelMoments.zeros(batches[0][0].shape[-1], batches[0][0].device)
    for x, weights in batches:
        moments.update(x, weights)
    return moments


def assert_hessian_matches(x: Tensor, weights: Tensor, hessian: Hessian, rounding: float) -> None:
    """Relative to ‖w x_i‖·‖w x_j‖; rounding: of one factor of a product, of either sign. Finishes the Hessian."""
    exact, sums, total = exact_hessian(x, weights)
    # 3.3e-9 a row is what tensor cores cut off (test_ops_hessian.py).
    allowed = rounding + 8 * FP32_UNIT + 6e-9 * min(len(x), 3072)
    norms = exact.diagonal().sqrt()
    assert hessian.sums is not None
    assert hessian.total is not None
    assert hessian.count == len(x)
    torch.testing.assert_close(hessian.total, total, rtol=4 * FP32_UNIT, atol=0)
    found_sums, full = hessian.sums.double(), hessian.finish()
    assert torch.equal(full, full.T)
    assert ((full.double() - exact).abs() <= allowed * torch.outer(norms, norms)).all()
    assert ((found_sums - sums).abs() <= 2.0**-20 * (weights.double().square() @ x.double().abs())).all()


def assert_moments_match(x: Tensor, weights: Tensor, moments: ChannelMoments) -> None:
    """As test_core.py's tolerance: merges of 8 rows round like a random walk, a mean relative to the size of x."""
    mean, m2 = exact_moments(x, weights)
    total = weights.double().square().sum()
    squares = m2 + total * mean.square()
    unit, merges = 8 * FP32_UNIT, 1 + len(x) / 8
    assert moments.total is not None
    torch.testing.assert_close(moments.total, total, rtol=4 * FP32_UNIT, atol=0)
    assert ((moments.mean.double() - mean).abs() <= unit * merges**0.5 * (squares / total).sqrt()).all()
    allowed = unit * (merges**0.5 * m2 + (m2 * squares).sqrt()) + unit**2 * merges * squares
    assert ((moments.m2.double() - m2).abs() <= allowed).all()


@each_hessian_backend
@each_dtype
@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_hessian_with_powers_of_two_is_exact(
    rows: int, channels: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    x, weights = integers(rows, channels, dtype, device), powers_of_two(rows, device)
    cut = rows // 3
    with forced_backend("hessian", backend, device, dtype, channels):
        hessian = hessian_of((x[:cut], weights[:cut]), (x[cut:], weights[cut:]))
    exact, sums, total = exact_hessian(x, weights)
    assert hessian.count == rows
    assert torch.equal(hessian.sums.double(), sums)
    assert torch.equal(hessian.total, total)
    assert torch.equal(hessian.finish().double(), exact)


@each_hessian_backend
@each_dtype
@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_hessian_with_any_weights(rows: int, channels: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x, weights = with_offsets(rows, channels, dtype, device, 2), any_weights(rows, device)
    with forced_backend("hessian", backend, device, dtype, channels):
        hessian = hessian_of((x, weights))
    assert_hessian_matches(x, weights, hessian, FP32_UNIT if backend == "reference" else 2 * ELEMENT_ROUNDING[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (129, 72), (3000, 264)])
def test_launch_of_the_cuda_hessian_with_weights(rows: int, channels: int, dtype: torch.dtype) -> None:
    """The launch alone, whichever backend is chosen for weighted rows; far from 1 in float16."""
    x, weights = integers(rows, channels, dtype, "cuda"), powers_of_two(rows, "cuda") * 2.0**12
    lower, sums = torch.zeros(channels, channels, device="cuda"), torch.zeros(channels, device="cuda")
    with forced_backend("hessian", "cuda", "cuda", dtype, channels):
        HESSIAN.kernels["cuda"].launch(x, lower, sums, weights)
    exact, exact_sums, _ = exact_hessian(x, weights)
    if rows < 1000:  # more sums are rounded
        assert torch.equal(lower.tril().double(), exact.tril())
        assert torch.equal(sums.double(), exact_sums)
    state = Hessian(rows, lower, sums, weights.double().square().sum())
    assert_hessian_matches(x, weights, state, FP32_UNIT)


@each_hessian_backend
def test_hessian_of_float16_neither_overflows_nor_vanishes(backend: str, device: str) -> None:
    """w² x is beyond float16 at both ends: 2²⁰ · 1000 and 2⁻²⁰ · 1."""
    x = integers(200, 24, torch.float16, device) * 250
    weights = torch.full((200,), 2.0**10, device=device)
    weights[100:] = 2.0**-2
    with forced_backend("hessian", backend, device, torch.float16, 24):
        large, small = hessian_of((x, weights)), hessian_of((x / 1000, weights * 2.0**-20))
    for hessian, rows, own in ((large, x, weights), (small, x / 1000, weights * 2.0**-20)):
        assert_hessian_matches(rows, own, hessian, 2 * FP32_UNIT)


@each_device
@pytest.mark.parametrize("channels", [1, 30, 1100])
def test_centred_hessian(channels: int, device: str) -> None:
    """C = Σ w² (x − m)(x − m)ᵀ, to the rounding of the moments that are subtracted."""
    x, weights = with_offsets(500, channels, torch.float32, device, 2), any_weights(500, device)
    with forced_backend("hessian", "reference", device):
        hessian = hessian_of((x, weights))
    scale = exact_hessian(x, weights)[0].diagonal().sqrt()
    exact, sums, total = exact_hessian(x, weights, centred=True)
    torch.testing.assert_close(hessian.mean().double(), sums / total, rtol=1e-5, atol=1e-6)
    error = (hessian.finish(centred=True).double() - exact).abs() / torch.outer(scale, scale)
    assert error.max() <= 500**0.5 * FP32_UNIT


@each_hessian_backend
@each_dtype
def test_hessian_with_weights_of_one_has_the_bits_without(dtype: torch.dtype, backend: str, device: str) -> None:
    x = with_offsets(1000, 72, dtype, device, 2)
    with forced_backend("hessian", backend, device, dtype, 72):
        weighted, plain = hessian_of((x, torch.ones(1000, device=device))), Hessian.zeros(72, device, sums=True)
        plain.update(x)
    assert plain.total is None
    if (backend, device) != ("reference", "cpu"):  # other instructions, and cuBLAS where operands are not one tensor
        assert_hessian_matches(x, torch.ones(1000, device=device), weighted, 2 * ELEMENT_ROUNDING[torch.float32])
        return
    assert torch.equal(weighted.sums, plain.sums)
    assert torch.equal(weighted.mean(), plain.mean())
    assert torch.equal(weighted.finish(centred=True), plain.finish(centred=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_large_weighted_hessian_has_the_same_bits_three_times(dtype: torch.dtype) -> None:
    """Many steps and tiles: an operand that is overwritten while it is read would show."""
    x = torch.randn(20_000, 1032, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    weights = powers_of_two(20_000, "cuda")
    first, second, third = (hessian_of((x, weights)) for _ in range(3))
    assert torch.equal(first.lower.tril(), second.lower.tril())
    assert torch.equal(first.sums, third.sums)
    assert torch.equal(first.lower.tril(), third.lower.tril())
    assert_hessian_matches(x, weights, first, 2.0**-20)


@each_moments_backend
@each_dtype
@pytest.mark.parametrize("make", [powers_of_two, any_weights])
@pytest.mark.parametrize(("rows", "channels"), [*SHAPES, (2051, 1030)])
def test_moments(
    rows: int, channels: int, make: Callable[..., Tensor], dtype: torch.dtype, backend: str, device: str
) -> None:
    x, weights = with_offsets(rows, channels, dtype, device, 10), make(rows, device)
    cut = rows // 3
    with forced_backend("channel_moments", backend, device, dtype):
        assert_moments_match(x, weights, moments_of((x, weights)))
        streamed = moments_of((x[:cut], weights[:cut]), (x[cut:], weights[cut:]))
    assert streamed.count == rows
    assert_moments_match(x, weights, streamed)


@each_moments_backend
@pytest.mark.parametrize("case", ["massive first row", "offset of 100", "a heavy row"])
def test_ill_conditioned_moments(case: str, backend: str, device: str) -> None:
    x = torch.randn(4096, 40, generator=torch.Generator().manual_seed(0))
    weights = powers_of_two(4096, "cpu")
    if case == "massive first row":
        x[0] = 3000
    elif case == "a heavy row":
        weights[7] = 2.0**8
    else:
        x += 100
    x, weights = x.to(device, torch.bfloat16), weights.to(device)
    with forced_backend("channel_moments", backend, device, torch.bfloat16):
        assert_moments_match(x, weights, moments_of((x, weights)))


@each_moments_backend
def test_rows_of_weight_zero_change_nothing_but_the_count(backend: str, device: str) -> None:
    x, weights = with_offsets(100, 24, torch.float32, device, 10), powers_of_two(100, device)
    nothing = torch.zeros(50, device=device)
    with forced_backend("channel_moments", backend, device):
        moments = moments_of((x[:50], nothing), (x, weights), (x[:50], nothing))
        none = moments_of((x[:50], nothing))
    assert moments.count == 200
    assert_moments_match(x, weights, moments)
    assert not none.mean.any()
    assert not none.m2.any()
    with forced_backend("hessian", "reference", device):
        assert not hessian_of((x[:50], nothing)).finish(centred=True).any()


@each_moments_backend
def test_moments_of_repeated_rows(backend: str, device: str) -> None:
    """Σ w² of rows is the same as w² copies of each: variance, sum of squares and count follow."""
    x = with_offsets(60, 9, torch.float32, device, 3)
    copies = torch.arange(60, device=device) % 2 * 3 + 1  # 1 or 4
    with forced_backend("channel_moments", backend, device):
        weighted = moments_of((x, copies.sqrt()))
        repeated = ChannelMoments.zeros(9, device)
        repeated.update(x.repeat_interleave(copies, 0))
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(weighted.mean, repeated.mean, **near)
    torch.testing.assert_close(weighted.m2, repeated.m2, **near)
    torch.testing.assert_close(weighted.sum_of_squares(), repeated.sum_of_squares(), **near)
    assert weighted.total == repeated.count == 150
    variance = repeated.m2 / 150 * (60 / 59)
    torch.testing.assert_close(weighted.variance(), variance, **near)


def test_merge_is_concatenation() -> None:
    x, weights = with_offsets(300, 20, torch.float32, "cpu", 10), any_weights(300, "cpu")
    with forced_backend("channel_moments", "reference", "cpu"):
        moments, other = moments_of((x[:110], weights[:110])), moments_of((x[110:], weights[110:]))
        fresh = ChannelMoments.zeros(20)
    kept = other.total.clone()
    moments.merge(other)
    assert moments.count == 300
    assert_moments_match(x, weights, moments)
    fresh.merge(moments)
    fresh.merge(ChannelMoments.zeros(20))
    assert torch.equal(fresh.m2, moments.m2)
    fresh.merge(other)
    assert_moments_match(x, weights, moments)  # the total of a state is its own
    assert torch.equal(other.total, kept)


def test_float64() -> None:
    x, weights = with_offsets(5000, 20, torch.float64, "cpu", 5), any_weights(5000, "cpu")
    moments, hessian = moments_of((x, weights)), hessian_of((x, weights))
    mean, m2 = exact_moments(x, weights)
    # Computed in float64, stored in float32: one rounding.
    torch.testing.assert_close(moments.mean.double(), mean, rtol=FP32_UNIT, atol=0)
    torch.testing.assert_close(moments.m2.double(), m2, rtol=FP32_UNIT, atol=0)
    exact, _, total = exact_hessian(x, weights)
    torch.testing.assert_close(hessian.finish().double(), exact, rtol=FP32_UNIT, atol=1e-9)
    torch.testing.assert_close(hessian.total, total, rtol=FP32_UNIT, atol=0)


def test_references_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("hessian.REFERENCE_CHUNK_ROWS", 100), ("hessian.REFERENCE_BLOCK", 40),
                       ("moments.REFERENCE_CHUNK_ELEMENTS", 1000)):  # fmt: skip
        monkeypatch.setattr(f"pyprune.ops.{name}", size)
    x, weights = with_offsets(1003, 72, torch.bfloat16, "cpu", 2), any_weights(1003, "cpu")
    lower, sums = torch.zeros(72, 72), torch.zeros(72)
    hessian_update_reference(x, lower, sums, weights)
    total = weights.double().square().sum()
    assert_hessian_matches(x, weights, Hessian(1003, lower, sums, total), FP32_UNIT)
    mean, m2 = torch.zeros(2, 72)
    channel_moments_update_reference(x, 0, mean, m2, weights, torch.zeros((), dtype=torch.float64))
    assert_moments_match(x, weights, ChannelMoments(1003, mean, m2, total))


@each_device
@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24)])
@pytest.mark.parametrize("weights", [None, torch.zeros(0)])
def test_no_rows_change_nothing(weights: Tensor | None, shape: tuple[int, ...], device: str) -> None:
    x, own = with_offsets(50, 24, torch.float32, device, 2), powers_of_two(50, device)
    empty = torch.empty(shape, device=device)
    weights = None if weights is None else weights.to(device)
    for make in (hessian_of, moments_of):
        state, plain = make((x, own)), make((x, None))
        total = state.total.clone()
        state.update(empty, weights)
        plain.update(empty, weights)
        assert torch.equal(state.total, total)
        assert state.count == plain.count == 50
        assert plain.total is None


@pytest.mark.parametrize("view", ["three dimensions", "one row", "every other row"])
@each_device
def test_rows_of_any_shape(view: str, device: str) -> None:
    wide, weights = integers(60, 48, torch.bfloat16, device), powers_of_two(60, device)
    x, own = {
        "three dimensions": (wide.view(5, 12, 48), weights),
        "one row": (wide[3], weights[3:4]),
        "every other row": (wide[::2], weights[::2]),
    }[view]
    exact = exact_hessian(x.reshape(-1, 48), own)[0]
    assert torch.equal(hessian_of((x, own)).finish().double(), exact)
    assert_moments_match(x.reshape(-1, 48), own, moments_of((x, own)))


@pytest.mark.parametrize("power", [-40, -1, 0, 1, 40])
def test_divisors(power: int) -> None:
    for factor, expected in ((1.0, power), (1.25, power + 1), (0.75, power)):
        weights = torch.tensor([0.0, -factor, factor / 2]) * 2.0**power
        assert divisor_of(weights) == 2.0**expected
    assert divisor_of(torch.zeros(3)) == 1


def test_weights_as_the_core_takes_them() -> None:
    weights = torch.tensor([-3.0, 0.5, 1.0]).repeat(23)[:65]
    squares, factor = padded_squares(weights, torch.bfloat16)
    assert factor is None
    assert torch.equal(squares, torch.cat([weights.square(), torch.zeros(63)]))
    scaled, factor = padded_squares(weights, torch.float16)
    assert factor == 16
    assert torch.equal(scaled * 16, squares)
    assert len(padded_squares(weights[:64], torch.float16)[0]) == 64


X = torch.ones(4, 3)
WRONG_WEIGHTS = [
    (torch.ones(3), r"weights is \[3\]; x \[4, 3\] needs one a row, \[4\]"),
    (torch.ones(4, 1), r"weights is \[4, 1\]; x \[4, 3\] needs one a row"),
    (torch.ones(()), r"weights is \[\]; x \[4, 3\] needs one a row"),
    (torch.ones(4).double(), "weights is torch.float64; it needs torch.float32"),
    (torch.ones(4).bfloat16(), "weights is torch.bfloat16; it needs torch.float32"),
    (torch.ones(4).to_sparse(), "weights is torch.sparse_coo; it needs to be a dense tensor"),
    (torch.ones(4, device="meta"), "weights is on meta and x on cpu"),
]


@pytest.mark.parametrize(("weights", "message"), WRONG_WEIGHTS)
def test_weights_that_do_not_fit(weights: Tensor, message: str) -> None:
    for name, state in (("hessian", Hessian.zeros(3)), ("channel moments", ChannelMoments.zeros(3))):
        with pytest.raises(ValueError, match=f"^{name}: {message}.*$"):
            state.update(X, weights)
        assert (state.count, state.total) == (0, None)


@pytest.mark.parametrize("first", [None, torch.ones(4)])
def test_weights_are_for_all_rows_or_none(first: Tensor | None) -> None:
    second = None if first is not None else torch.ones(4)
    had, have = ("weights", "no weights") if second is None else ("no weights", "weights")
    message = f"the state has rows with {had}, and these have {have}; give weights to all rows or to none"
    for name, state in (("hessian", Hessian.zeros(3)), ("channel moments", ChannelMoments.zeros(3))):
        state.update(X, first)
        with pytest.raises(ValueError, match=f"^{name}: {message}$"):
            state.update(X, second)
        assert state.count == 4
    moments, other = ChannelMoments.zeros(3), ChannelMoments.zeros(3)
    moments.update(X, first)
    other.update(X, second)
    with pytest.raises(ValueError, match=f"^channel moments: {message}$"):
        moments.merge(other)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (torch.zeros(()), "total is torch.float32; it needs torch.float64"),
        (torch.zeros(1).double(), r"total is \[1\]; it needs to be a scalar"),
        (torch.zeros(()).double().to("meta"), "total is on meta and"),
        (None, "weights is given and total is not; a weighted update needs both"),
    ],
)
def test_totals_that_do_not_fit(total: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channel_moments_update(X, 0, torch.zeros(3), torch.zeros(3), torch.ones(4), total)
    if total is not None:
        with pytest.raises(ValueError, match=message):
            hessian_finish(torch.zeros(3, 3), torch.zeros(3), 4, 1.0, total)
        with pytest.raises(ValueError, match=r"total.*float|total is given and weights is not|meta"):
            channel_moments_update(X, 0, torch.zeros(3), torch.zeros(3), None, total)


def test_weights_lie_apart_from_what_is_changed() -> None:
    memory = torch.ones(16)
    with pytest.raises(ValueError, match="sums and weights are the same memory"):
        hessian_update(X, torch.zeros(3, 3), memory[:3], memory[2:6])
    total = torch.zeros((), dtype=torch.float64)
    with pytest.raises(ValueError, match="mean and weights are the same memory"):
        channel_moments_update(X, 0, memory[:3], memory[3:6], memory[2:6], total)


def test_a_mean_needs_sums() -> None:
    with pytest.raises(ValueError, match="hessian: a mean needs the sums"):
        Hessian.zeros(3).mean()
    assert torch.equal(Hessian.zeros(3, sums=True).mean(), torch.zeros(3))


@each_device
def test_opcheck(device: str) -> None:
    x, weights = with_offsets(40, 24, torch.bfloat16, device, 2), powers_of_two(80, device)[::2]
    mean, m2 = torch.zeros(2, 24, device=device)
    total = torch.tensor(3.0, dtype=torch.float64, device=device)
    torch.library.opcheck(hessian_update, (x, torch.zeros(24, 24, device=device), mean, weights))
    torch.library.opcheck(hessian_finish, (torch.ones(24, 24, device=device), m2, 40, 1.0, total))
    torch.library.opcheck(channel_moments_update, (x, 3, mean, m2, weights, total))


@each_device
def test_compiles_as_one_graph(device: str) -> None:
    def step(x: Tensor, weights: Tensor, hessian: Hessian, moments: ChannelMoments) -> Tensor:
        hessian.update(x, weights)
        moments.update(x, weights)
        return x * 2

    x, weights = with_offsets(40, 24, torch.bfloat16, device, 2), powers_of_two(40, device)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hessian, moments = Hessian.zeros(24, device, sums=True), ChannelMoments.zeros(24, device)
    for _ in range(3):
        assert torch.equal(compiled(x, weights, hessian, moments), x * 2)
    eager, own = hessian_of(*[(x, weights)] * 3), moments_of(*[(x, weights)] * 3)
    assert torch.equal(hessian.total, eager.total)
    assert torch.equal(moments.total, own.total)
    assert torch.equal(moments.m2, own.m2)
    finish = torch.compile(lambda state: state.finish(centred=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(finish(hessian), eager.finish(centred=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    x, weights = torch.randn(300, 64, device="cuda").bfloat16(), powers_of_two(300, "cuda")
    for _ in range(2):  # kernels are compiled and loaded by the first
        torch.cuda.set_sync_debug_mode("error")
        try:
            hessian, moments = hessian_of((x, weights)), moments_of((x, weights))
            hessian.mean()
            hessian.finish(centred=True)
            moments.merge(moments_of((x, weights)))
            moments.variance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
