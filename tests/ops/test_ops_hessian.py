"""The Hessian on every backend that this machine has, against float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forced_backend import each_backend_of, each_device, forced_backend
from support.random_rows import with_offsets
from torch import Tensor

from pyprune.errors import InputError
from pyprune.ops import use_backend
from pyprune.ops.dispatch import choose
from pyprune.ops.hessian import (
    Hessian,
    hessian_finish,
    hessian_finish_reference,
    hessian_update,
    hessian_update_reference,
    on_sixteen_bytes,
)
from pyprune.ops.requirements import KERNEL_DTYPES

OPERATOR = "hessian"
each_backend = each_backend_of("cuda", "triton")
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES)
forced = partial(forced_backend, OPERATOR)
normal = partial(with_offsets, largest=2)  # so that many sums only grow

# What an element may be off by beside twice torch's own error, relative to ‖x_i‖·‖x_j‖.
ROUNDINGS = 2.0**-22  # the state's own and the flushes'
# tf32x3 keeps 22 bits of each factor and leaves out the product of the small halves.
TF32X3 = 3 * 2.0**-22
# Tensor cores cut off low bits: 3.3e-9 a row on the average, up to twice that by where in its binade an element
# is, until the accumulator is flushed: after at most 3072 rows in CUDA, 1536 in Triton.
TRUNCATION = 6e-9
MOST_FLUSH_ROWS = 3072


def hessian_of(*batches: Tensor) -> Hessian:
    """The state after the batches; what it may not read, above the diagonal, was NaN."""
    hessian = Hessian.zeros(batches[0].shape[-1], batches[0].device, sums=True)
    above = torch.ones_like(hessian.lower, dtype=torch.bool).triu(1)
    hessian.lower.masked_fill_(above, torch.nan)
    for x in batches:
        hessian.update(x)
    return hessian


def integers(rows: int, channels: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows whose products and their sums are exact in float32: any order gives the same bits."""
    generator = torch.Generator().manual_seed(rows * 100_003 + channels)
    return torch.randint(-8, 9, (rows, channels), generator=generator).to(device, dtype)


def relative_error(found: Tensor, x: Tensor) -> float:
    """max |found − xᵀx| / (‖x_i‖·‖x_j‖), against float64."""
    exact = x.double().t() @ x.double()
    norms = exact.diagonal().sqrt()
    return ((found.double() - exact).abs() / torch.outer(norms, norms)).max().item()


def assert_as_good_as_torch(x: Tensor, hessian: Hessian, backend: str) -> None:
    """x: [rows, channels], no channel zero. Finishes the Hessian."""
    values = x.float()
    allowed = 2 * relative_error(values.t() @ values, x) + ROUNDINGS
    if backend in ("cuda", "triton"):
        allowed += TF32X3 if x.dtype == torch.float32 else TRUNCATION * min(len(x), MOST_FLUSH_ROWS)
    assert hessian.sums is not None
    sums = hessian.sums.double()
    full = hessian.finish()
    assert torch.equal(full, full.t())
    assert relative_error(full, x) <= allowed
    # Column sums: a rounding for each of up to a few hundred additions in a row, at random.
    assert ((sums - x.double().sum(0)).abs() <= 2.0**-20 * x.double().abs().sum(0)).all()


SHAPES = [(2, 3), (37, 8), (37, 1000), (129, 65), (1000, 257), (2051, 128), (4099, 264), (300, 1032)]


@each_backend
@each_dtype
@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_matches_float64(rows: int, channels: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x = normal(rows, channels, dtype, device)
    with forced(backend, device, dtype, channels):
        hessian = hessian_of(x)
    assert hessian.count == rows
    assert_as_good_as_torch(x, hessian, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@each_dtype
@pytest.mark.parametrize(("rows", "channels"), [(7000, 4104), (513, 5120)])
def test_matches_float64_on_wide_inputs(rows: int, channels: int, dtype: torch.dtype, backend: str) -> None:
    x = normal(rows, channels, dtype, "cuda")
    with forced(backend, "cuda", dtype, channels):
        hessian = hessian_of(x)
    assert_as_good_as_torch(x, hessian, backend)


@each_backend
@each_dtype
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (1, 8), (37, 9), (64, 128), (4099, 136), (6200, 520)])
def test_integers_are_exact(rows: int, channels: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x = integers(rows, channels, dtype, device)
    with forced(backend, device, dtype, channels):
        hessian = hessian_of(x, x[: rows // 3])
    both = torch.cat([x, x[: rows // 3]]).double()
    assert hessian.sums is not None
    assert torch.equal(hessian.sums, both.sum(0).float())
    assert torch.equal(hessian.finish(), (both.t() @ both).float())


@each_backend
@each_dtype
def test_streams(dtype: torch.dtype, backend: str, device: str) -> None:
    x = normal(3000, 72, dtype, device)
    with forced(backend, device, dtype, 72):
        hessian = hessian_of(*x.split([1, 130, 2, 867, 2000]))
    assert hessian.count == 3000
    assert_as_good_as_torch(x, hessian, backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("channels", [136, 1160])
def test_same_bits_three_times(channels: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x = normal(5000, channels, dtype, device)
    with forced(backend, device, dtype, channels):
        first, second, third = (hessian_of(x, x[:77]) for _ in range(3))
    sums, full = first.sums, first.finish()
    assert sums is not None
    for other in (second, third):
        assert other.sums is not None
        assert torch.equal(sums, other.sums)
        assert torch.equal(full, other.finish())


@each_backend
@pytest.mark.parametrize("row", [0, 1500, 2999])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_marks_exactly_its_channel(value: float, row: int, backend: str, device: str) -> None:
    x = normal(3000, 72, torch.bfloat16, device)
    with forced(backend, device, torch.bfloat16, 72):
        clean = hessian_of(x).finish()
        x[row, 70] = value
        found = hessian_of(x).finish()
    assert not found[70].isfinite().any()
    kept = torch.arange(72, device=device) != 70
    assert torch.equal(found[kept][:, kept], clean[kept][:, kept])


@each_backend
@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24)])
def test_no_rows_change_nothing(shape: tuple[int, ...], backend: str, device: str) -> None:
    with forced(backend, device, torch.bfloat16, 24):
        hessian = hessian_of(normal(50, 24, torch.bfloat16, device))
        assert hessian.sums is not None
        lower, sums = hessian.lower.tril(), hessian.sums.clone()
        hessian.update(torch.empty(shape, dtype=torch.bfloat16, device=device))
    assert hessian.count == 50
    assert torch.equal(hessian.lower.tril(), lower)
    assert torch.equal(hessian.sums, sums)


def test_no_channels() -> None:
    hessian = Hessian.zeros(0)
    hessian.update(torch.empty(5, 0))
    assert hessian.count == 5
    assert hessian.finish().shape == (0, 0)


@pytest.mark.parametrize("centred", [False, True])
def test_no_rows_at_all_give_zeros(centred: bool) -> None:
    assert not Hessian.zeros(3, sums=True).finish(centred).any()


VIEWS = {
    "three dimensions": lambda wide: wide[:, :24].unflatten(0, (40, 50)),
    "one row, one dimension": lambda wide: wide[5, :24],
    "some columns": lambda wide: wide[:, :24],
    "columns from an odd address": lambda wide: wide[:, 1:25],
    "every other row": lambda wide: wide[::2, :24],
    "every other column": lambda wide: wide[:, :48:2],
    "transposed": lambda wide: wide[:56].t(),
    "leading dimensions that do not flatten": lambda wide: wide[:, :56].unflatten(0, (40, 50)).transpose(0, 1),
    "a repeated row": lambda wide: wide[7, :56].expand(100, 56),
    "overlapping rows": lambda wide: wide.as_strided((100, 24), (3, 1)),
}


@each_backend
@pytest.mark.parametrize("width", [61, 64], ids=["odd row stride", "row stride 64"])
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, width: int, backend: str, device: str) -> None:
    x = VIEWS[view](integers(2000, width, torch.bfloat16, device))
    rows = x.clone(memory_format=torch.contiguous_format).reshape(-1, x.shape[-1]).double()
    with forced(backend, device, torch.bfloat16, x.shape[-1]):
        hessian = hessian_of(x)
    assert hessian.count == len(rows)
    assert torch.equal(hessian.finish(), (rows.t() @ rows).float())


@each_backend
@pytest.mark.parametrize("channels", [67, 64])
def test_memory_around_the_input_is_not_read(channels: int, backend: str, device: str) -> None:
    buffer = torch.full((303, 80), torch.nan, dtype=torch.bfloat16, device=device)
    x = buffer[1:302, 8 : 8 + channels]
    x.copy_(normal(301, channels, torch.bfloat16, device))
    with forced(backend, device, torch.bfloat16, channels):
        hessian = hessian_of(x)
    assert_as_good_as_torch(x, hessian, backend)


@each_backend
def test_memory_around_the_result_is_not_written(backend: str, device: str) -> None:
    channels = 72
    buffer = torch.full((channels * channels + 512,), 5.0, device=device)
    lower = buffer[256:-256].view(channels, channels)
    x = normal(301, channels, torch.bfloat16, device)
    with forced(backend, device, torch.bfloat16, channels):
        hessian_update(x, lower, None)
    assert (buffer[:256] == 5).all()
    assert (buffer[-256:] == 5).all()


@each_device
def test_float64_runs_on_the_reference_alone(device: str) -> None:
    x = normal(5000, 20, torch.float64, device)
    assert choose(OPERATOR, x).backend == "reference"
    # Computed in float64, stored in float32: one rounding.
    assert relative_error(hessian_of(x).finish(), x) <= 2.0**-24


def test_reference_in_many_chunks_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("REFERENCE_CHUNK_ROWS", 100), ("REFERENCE_BLOCK", 40), ("MIRROR_BLOCK", 16)):
        monkeypatch.setattr(f"pyprune.ops.hessian.{name}", size)
    x = normal(1003, 72, torch.bfloat16, "cpu")
    with forced("reference", "cpu"):
        hessian = hessian_of(x)
    assert_as_good_as_torch(x, hessian, "reference")


@each_device
@pytest.mark.parametrize("channels", [1, 30, 1500])
def test_centred(channels: int, device: str) -> None:
    """C = Σ (x − m)(x − m)ᵀ, to the rounding of the moments that are subtracted."""
    x = normal(500, channels, torch.float32, device)
    with forced("reference", device):
        hessian = hessian_of(x)
    full = hessian.finish(centred=True)
    assert full is hessian.lower
    assert torch.equal(full, full.t())
    exact = x.double()
    scale = exact.square().sum(0).sqrt()
    exact = exact - exact.mean(0)
    error = (full.double() - exact.t() @ exact).abs() / torch.outer(scale, scale)
    assert error.max() <= 500**0.5 * 2.0**-24  # rounding errors of 500 sums walk at random: √n u (Higham & Mary 2019)


@each_device
def test_centred_integers_are_exact(device: str) -> None:
    x = integers(1024, 40, torch.float32, device)  # 1024 divides exactly
    with forced("reference", device):
        found = hessian_of(x).finish(centred=True)
    exact = x.double()
    exact = exact.t() @ exact - torch.outer(exact.sum(0), exact.sum(0)) / 1024
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-23, atol=2.0**-23 * exact.abs().max().item())


def test_scaled() -> None:
    """SparseGPT's and SlimGPT's 2 / N: a power of two changes no digit."""
    x = normal(100, 40, torch.float32, "cpu")
    plain, scaled = (hessian_of(x).finish(scale=scale) for scale in (1.0, 2 / 16))
    assert torch.equal(plain * 0.125, scaled)


def test_centred_needs_sums() -> None:
    hessian = Hessian.zeros(3)
    hessian.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="needs the sums"):
        hessian.finish(centred=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_diagonal_does_not_drift(dtype: torch.dtype, backend: str) -> None:
    """1 M rows: tensor cores that cut off low bits for all of them would lose 5.5e-3, plain cuBLAS loses 1.3e-3."""
    channels = 256
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2**20, channels, dtype=dtype, device="cuda", generator=generator)
    with forced(backend, "cuda", dtype, channels):
        found = hessian_of(x).finish()
    exact = x.double().square().sum(0)
    assert (found.diagonal().double() / exact - 1).mean().abs() <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_than_2_to_the_31_elements(backend: str) -> None:
    rows, channels = 80_000, 28_672  # 4.6 GB of bfloat16, and 3.3 GB of result
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    x = torch.randint(-2, 3, (rows, channels), dtype=torch.int8, device="cuda").bfloat16()
    hessian = Hessian.zeros(channels, "cuda", sums=True)
    with forced(backend, "cuda", torch.bfloat16, channels):
        hessian.update(x)
    full = hessian.finish()
    assert hessian.sums is not None
    first, last = x[:, :64].double(), x[:, -64:].double()
    assert torch.equal(full[-64:, :64], (last.t() @ first).float())
    assert torch.equal(full[:64, -64:], (first.t() @ last).float())
    assert torch.equal(full[-64:, -64:], (last.t() @ last).float())
    assert torch.equal(hessian.sums[-64:], last.sum(0).float())


@each_backend
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from(KERNEL_DTYPES),
    st.lists(st.integers(0, 300), max_size=5),
)
def test_any_split_of_the_rows(
    backend: str, device: str, rows: int, channels: int, dtype: torch.dtype, cuts: list[int]
) -> None:
    if backend == "cuda":
        channels, dtype = 8 * channels, torch.bfloat16
    x = integers(rows, channels, dtype, device)
    batches = torch.tensor_split(x, sorted(min(cut, rows) for cut in cuts))
    with forced(backend, device, dtype, channels):
        hessian = hessian_of(*batches)
    assert hessian.count == rows
    assert torch.equal(hessian.finish(), (x.double().t() @ x.double()).float())


def test_rows_on_sixteen_bytes() -> None:
    wide = torch.zeros(10, 64, dtype=torch.bfloat16)
    for fitting in (wide, wide[:, 8:16], wide[2:3, :24], wide.view(-1)[: 10 * 60].view(10, 60)[3:4, 4:12]):
        assert on_sixteen_bytes(fitting) is fitting
    for view in (wide[:, 1:9], wide.view(-1)[:600].view(10, 60)[:, :8]):
        copy = on_sixteen_bytes(view)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, view)


@pytest.mark.parametrize(
    ("x", "lower", "sums", "message"),
    [
        (torch.tensor(1.0), torch.zeros(1, 1), None, "x is a scalar"),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 3), None, "x is torch.int32"),
        (torch.zeros(2, 3), torch.zeros(4, 4), None, r"lower is \[4, 4\]; x \[2, 3\] needs torch.float32 \[3, 3\]"),
        (torch.zeros(2, 3), torch.zeros(3, 4), None, r"lower is torch.float32 \[3, 4\]; it must be square"),
        (torch.zeros(2, 3), torch.zeros(9), None, r"lower is torch.float32 \[9\]; it must be square"),
        (torch.zeros(2, 3), torch.zeros(3, 3).half(), None, "lower is torch.float16"),
        (torch.zeros(2, 3), torch.zeros(3, 6)[:, ::2], None, r"lower has strides \[6, 2\]; it needs to be contiguous"),
        (torch.zeros(2, 3), torch.zeros(3, 3, device="meta"), None, "lower is on meta and x on cpu"),
        (torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(4), r"sums is torch.float32 \[4\]; lower \[3, 3\]"),
        (torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(3).half(), "sums is torch.float16"),
        (
            torch.zeros(2, 3),
            torch.zeros(3, 3),
            torch.zeros(6)[::2],
            r"sums has strides \[2\]; it needs to be contiguous",
        ),
        (torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(3, device="meta"), "sums is on meta and lower on cpu"),
    ],
)
def test_arguments_that_do_not_fit(x: Tensor, lower: Tensor, sums: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hessian_update(x, lower, sums)


@pytest.mark.gpu
def test_a_result_that_starts_anywhere_is_an_error() -> None:
    lower = torch.zeros(65, device="cuda")[1:].view(8, 8)
    with pytest.raises(ValueError, match="16 bytes"):
        hessian_update(torch.zeros(2, 8, device="cuda"), lower, None)


def test_a_negative_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        hessian_finish(torch.zeros(3, 3), None, -1)


def test_forcing_an_ineligible_backend_reaches_the_caller() -> None:
    with (
        use_backend("triton"),
        pytest.raises(InputError, match="the input is on cpu"),
    ):
        Hessian.zeros(3).update(torch.zeros(2, 3))


def test_schemas() -> None:
    update = "pyprune::hessian_update(Tensor x, Tensor(a!) lower, Tensor(b!)? sums, Tensor? weights=None) -> ()"
    finish = (
        "pyprune::hessian_finish(Tensor(a!) lower, Tensor? sums, SymInt count, float scale=1., Tensor? total=None) "
        "-> ()"
    )
    assert str(torch.ops.pyprune.hessian_update.default._schema) == update
    assert str(torch.ops.pyprune.hessian_finish.default._schema) == finish


@each_backend
def test_opcheck(backend: str, device: str) -> None:
    with forced(backend, device, torch.bfloat16, 24):
        for x in (normal(40, 24, torch.bfloat16, device), normal(40, 48, torch.bfloat16, device)[:, ::2]):
            for sums in (None, torch.zeros(24, device=device)):
                torch.library.opcheck(hessian_update, (x, torch.zeros(24, 24, device=device), sums))
                torch.library.opcheck(hessian_finish, (torch.ones(24, 24, device=device), sums, 40))


@each_backend
def test_compiles_as_one_graph(backend: str, device: str) -> None:
    def step(x: Tensor, hessian: Hessian) -> Tensor:
        hessian.update(x)
        return x * 2

    x = normal(40, 24, torch.bfloat16, device)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hessian = Hessian.zeros(24, device, sums=True)
    with forced(backend, device, torch.bfloat16, 24):
        for _ in range(3):
            assert torch.equal(compiled(x, hessian), x * 2)
        eager = hessian_of(x, x, x)
    assert hessian.count == 120
    finish = torch.compile(lambda hessian: hessian.finish(centred=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(finish(hessian), eager.finish(centred=True))


def test_references_do_what_the_operators_do() -> None:
    x = normal(100, 24, torch.float32, "cpu")
    hessian = hessian_of(x)
    lower, sums = torch.zeros(24, 24), torch.zeros(24)
    hessian_update_reference(x, lower, sums)
    hessian_finish_reference(lower, sums, 100)
    assert torch.equal(hessian.finish(centred=True), lower)
