"""The compiled core's CPU kernel through its raw addresses: every instruction set, threads, refusals.

What the operator makes of any input is test_ops_moments.py's; that runs on the instruction set of the machine alone.
"""

import os

import pytest
import torch
from support.moments_oracle import assert_moments_match, exact_moments, tolerances
from support.random_rows import normal
from torch import Tensor

core = pytest.importorskip("pyprune._core", reason="pyprune was installed without its compiled core")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 5  # NaN elements on either side of a state buffer


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYPRUNE_CPU_ISA", request.param)
    try:
        core.build_info()
    except ValueError:
        pytest.skip(f"this processor cannot run {request.param}")
    return request.param


class State:
    """mean and M2 between NaN guards, fed through the raw addresses."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.buffers = torch.full((2, channels + 2 * GUARD), float("nan"))
        self.mean, self.m2 = self.buffers[:, GUARD : GUARD + channels]

    def update(self, x: Tensor, threads: int = 2) -> None:
        core.channel_moments_cpu(
            x.data_ptr(),
            str(x.dtype).removeprefix("torch."),
            x.shape[0],
            x.shape[1],
            x.stride(0),
            self.count,
            self.mean.data_ptr(),
            self.m2.data_ptr(),
            threads,
        )
        self.count += x.shape[0]

    def guards_are_untouched(self) -> bool:
        return bool(self.buffers[:, :GUARD].isnan().all() and self.buffers[:, -GUARD:].isnan().all())


def moments_of(*parts: Tensor, threads: int = 2) -> State:
    state = State(parts[0].shape[1])
    for part in parts:
        state.update(part, threads)
    assert state.guards_are_untouched()
    return state


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes(isa: str, dtype: torch.dtype) -> None:
    """Around the widths of the vectors and of the blocks; the guards beside the state notice what is written beyond."""
    sizes = [(1, 1), (1, 64), (2, 3), (7, 17), (15, 16), (16, 15), (17, 33), (33, 1024), (40, 1025), (1029, 130)]
    for rows, channels in sizes:
        x = normal(rows, channels, dtype)
        state = moments_of(x)
        assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks_of_rows(dtype: torch.dtype) -> None:
    x = normal(5003, 2100, dtype)
    state = moments_of(x)
    assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_read_nothing_beyond_their_channels(isa: str, dtype: torch.dtype) -> None:
    rows, channels = 37, 67
    for stride, offset in ((70, 0), (71, 3), (67, 1), (128, 61)):
        memory = torch.full((offset + rows * stride,), float("nan"), dtype=dtype)
        x = memory[offset:].view(rows, stride)[:, :channels]
        x.copy_(normal(rows, channels, dtype))
        state = moments_of(x)
        assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stream_of_calls(isa: str, dtype: torch.dtype) -> None:
    x = normal(3000, 50, dtype)
    state = moments_of(*x.split([1, 0, 7, 16, 500, 1, 2000, 475]))
    assert state.count == 3000
    assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_columns(isa: str, dtype: torch.dtype) -> None:
    large_mean = normal(8192, 40, dtype, mean=100.0)
    massive_first_row = normal(8192, 40, dtype)
    massive_first_row[0] = 3000.0
    for x in (large_mean, massive_first_row):
        state = moments_of(x)
        assert_moments_match(x, state.mean, state.m2)


def test_the_tolerance_refuses_the_textbook_formula() -> None:
    x = normal(8192, 40, torch.float32, mean=100.0)
    textbook = x.square().sum(0) - x.sum(0).square() / x.shape[0]
    mean, m2 = exact_moments(x)
    assert (textbook.double() - m2).abs().max() > tolerances(x, mean, m2)[1].max()


def test_the_tolerance_refuses_a_shift_by_the_first_row() -> None:
    x = normal(8192, 40, torch.float32)
    x[0] = 3000.0
    shifted = x - x[0]
    shifted_m2 = shifted.square().sum(0) - shifted.sum(0).square() / x.shape[0]
    mean, m2 = exact_moments(x)
    assert (shifted_m2.double() - m2).abs().max() > tolerances(x, mean, m2)[1].max()


def test_every_kind_of_float16_is_converted_exactly(isa: str) -> None:
    for bits in (0x0001, 0x03FF, 0x8001, 0x0400, 0x3C00, 0x7BFF, 0xFBFF):
        signed = bits - (1 << 16) if bits >= 1 << 15 else bits
        x = torch.full((32, 35), signed, dtype=torch.int16).view(torch.float16)
        state = moments_of(x)
        assert torch.equal(state.mean, x[0].float()), hex(bits)
        assert torch.equal(state.m2, torch.zeros(35)), hex(bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_value_shows_in_its_channel_alone(isa: str, dtype: torch.dtype) -> None:
    for value in (float("inf"), float("nan")):
        x = normal(100, 35, dtype)
        x[50, 33] = value
        state = moments_of(x)
        others = torch.arange(35) != 33
        assert not state.mean[33].isfinite()
        assert state.m2[33].isnan()
        assert_moments_match(x[:, others], state.mean[others], state.m2[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    x = normal(4099, 1500, dtype)
    first = moments_of(x, threads=1)
    for threads in (1, 2, 3, 5, 64):
        again = moments_of(x, threads=threads)
        assert torch.equal(first.mean, again.mean)
        assert torch.equal(first.m2, again.m2)


def test_no_rows_change_nothing() -> None:
    x = normal(20, 9, torch.float32)
    state = moments_of(x)
    before = state.buffers.clone()
    state.update(x[:0])
    core.channel_moments_cpu(0, "float32", 0, 9, 9, 20, 0, 0, 1)
    assert torch.equal(before.view(torch.int32), state.buffers.view(torch.int32))


def test_one_row_read_many_times() -> None:
    row = normal(1, 19, torch.bfloat16)
    x = row.expand(48, 19)
    state = moments_of(x)
    assert torch.equal(state.mean, row[0].float())
    assert torch.equal(state.m2, torch.zeros(19))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_copies_of_rows(isa: str, dtype: torch.dtype) -> None:
    """Squares of 0 to 3 as weights, in a stream and around the widths of vectors, blocks and chunks."""
    for rows, channels in ((1, 1), (7, 17), (33, 1025), (1100, 35)):
        x, roots = normal(rows, channels, dtype, mean=3.0), torch.arange(1, rows + 1) % 4
        mean, m2 = torch.full((2, channels), float("nan"))
        total, count = torch.zeros((), dtype=torch.float64), 0
        for part, own in zip(x.tensor_split([rows // 3]), roots.float().tensor_split([rows // 3]), strict=True):
            core.channel_moments_cpu(
                part.data_ptr(), str(dtype).removeprefix("torch."), len(part), channels, channels, count,
                mean.data_ptr(), m2.data_ptr(), 2, own.data_ptr(), total.data_ptr(),
            )  # fmt: skip
            count += len(part)
            total += own.square().sum()
        assert_moments_match(x.repeat_interleave(roots.square(), 0), mean, m2)


def test_without_weights_no_total_is_read() -> None:
    x = normal(100, 35, torch.float32)
    expected, found = moments_of(x), torch.zeros(2, 35)
    core.channel_moments_cpu(
        x.data_ptr(), "float32", 100, 35, 35, 0, found[0].data_ptr(), found[1].data_ptr(), 1, weights_ptr=0, total_ptr=3
    )
    assert torch.equal(found, torch.stack([expected.mean, expected.m2]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights_ptr": 4098}, "weights_ptr is not aligned to 4 bytes"),
        ({"weights_ptr": 4096}, "total_ptr is null"),
        ({"weights_ptr": 4096, "total_ptr": 4100}, "total_ptr is not aligned to 8 bytes"),
        ({"dtype": "float64"}, "dtype must be float32, bfloat16 or float16, not float64"),
        ({"rows": -1}, "rows must not be negative"),
        ({"channels": -1}, "channels must not be negative"),
        ({"row_stride": -8}, "row_stride must not be negative"),
        ({"count": -1}, "count must not be negative"),
        ({"threads": 0}, "threads must be positive"),
        ({"x_ptr": 0}, "x_ptr is null"),
        ({"mean_ptr": 0}, "mean_ptr is null"),
        ({"m2_ptr": 0}, "m2_ptr is null"),
        ({"x_ptr": 4097}, "x_ptr is not aligned to 4 bytes"),
        ({"mean_ptr": 4098}, "mean_ptr is not aligned to 4 bytes"),
        ({"rows": 1 << 40, "row_stride": 1 << 40}, "more memory than can exist"),
    ],
)
def test_wrong_arguments(wrong: dict[str, int | str], message: str) -> None:
    x = torch.zeros(4, 8)
    mean, m2 = torch.zeros(2, 8)
    arguments: dict[str, int | str] = {
        "x_ptr": x.data_ptr(),
        "dtype": "float32",
        "rows": 4,
        "channels": 8,
        "row_stride": 8,
        "count": 0,
        "mean_ptr": mean.data_ptr(),
        "m2_ptr": m2.data_ptr(),
        "threads": 1,
    }
    with pytest.raises(ValueError, match=message):
        core.channel_moments_cpu(**(arguments | wrong))


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYPRUNE_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="PYPRUNE_CPU_ISA=sse9"):
        core.build_info()


def test_build_info() -> None:
    facts = core.build_info()
    assert facts["cpu_isa"] in ("portable", "avx2", "avx512")
    assert facts["compiler"]
    assert facts["cuda"] == hasattr(core, "channel_moments_cuda")
    assert facts["cuda"] == (facts["cuda_version"] is not None) == bool(facts["cuda_architectures"])
    assert os.environ.get("PYPRUNE_CPU_ISA") in (None, facts["cpu_isa"])
