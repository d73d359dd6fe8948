"""Channel moments on every backend that this machine has, against float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forced_backend import each_backend_of, each_device, forced_backend
from support.moments_bounds import assert_as_good_as_torch, assert_within_analysed_bound
from support.moments_oracle import exact_moments
from support.random_rows import with_offsets
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pyprune.errors import InputError
from pyprune.ops import ChannelMoments, channel_moments_update, use_backend
from pyprune.ops.dispatch import choose
from pyprune.ops.requirements import KERNEL_DTYPES

OPERATOR = "channel_moments"
each_backend = each_backend_of("cpu", "cuda", "triton")
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES)
forced = partial(forced_backend, OPERATOR)
normal = partial(with_offsets, largest=10)


def moments_of(*batches: Tensor) -> ChannelMoments:
    moments = ChannelMoments.zeros(batches[0].shape[-1], batches[0].device)
    for x in batches:
        moments.update(x)
    return moments


@each_backend
@each_dtype
@pytest.mark.parametrize(
    ("rows", "channels"), [(2, 3), (7, 5), (37, 1000), (129, 65), (1000, 257), (2051, 64), (4099, 1032)]
)
def test_matches_float64(rows: int, channels: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x = normal(rows, channels, dtype, device)
    with forced(backend, device):
        moments = moments_of(x)
    assert moments.count == rows
    assert_as_good_as_torch(x, moments.mean, moments.m2)


@each_backend
@each_dtype
@pytest.mark.parametrize("channels", [1, 8, 129])
def test_one_row_is_its_own_mean(channels: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x = normal(1, channels, dtype, device)
    with forced(backend, device):
        moments = moments_of(x)
    assert torch.equal(moments.mean, x[0].float())
    assert not moments.m2.any()
    assert moments.variance().isnan().all()


@each_backend
@pytest.mark.parametrize("case", ["massive first row", "offset of 100"])
def test_ill_conditioned(case: str, backend: str, device: str) -> None:
    """Where a shift by the first row (8.6e-2) or Σx² − (Σx)²/n (5e-3 at 131072 rows) fails."""
    x = torch.randn(8192, 40, generator=torch.Generator().manual_seed(0))
    if case == "massive first row":
        x[0] = 3000
    else:
        x += 100
    x = x.to(device, torch.bfloat16)
    with forced(backend, device):
        moments = moments_of(x)
    assert_as_good_as_torch(x, moments.mean, moments.m2)


@each_backend
@each_dtype
def test_streams(dtype: torch.dtype, backend: str, device: str) -> None:
    x = normal(3000, 72, dtype, device)
    batches = x.split([1, 130, 2, 867, 2000])
    with forced(backend, device):
        moments = moments_of(*batches)
    assert moments.count == 3000
    assert_as_good_as_torch(x, moments.mean, moments.m2, merges=len(batches))


@each_backend
def test_merges_into_a_long_history(backend: str, device: str) -> None:
    """2^31 + 5 rows before: the count is no 32-bit integer."""
    x = normal(500, 33, torch.float32, device)
    before, mean_before, m2_before = 2**31 + 5, 3.0, 7.0e9
    moments = ChannelMoments(
        before, torch.full((33,), mean_before, device=device), torch.full((33,), m2_before, device=device)
    )
    with forced(backend, device):
        moments.update(x)
    mean, m2 = exact_moments(x)
    count = before + len(x)
    delta = mean - mean_before
    torch.testing.assert_close(moments.mean.double(), mean_before + delta * len(x) / count, rtol=2**-22, atol=0)
    torch.testing.assert_close(
        moments.m2.double(), m2_before + m2 + delta**2 * before * len(x) / count, rtol=2**-22, atol=0
    )


@each_backend
@each_dtype
def test_same_bits_three_times(dtype: torch.dtype, backend: str, device: str) -> None:
    x = normal(5000, 136, dtype, device)
    with forced(backend, device):
        first, second, third = (moments_of(x, x[:77]) for _ in range(3))
    for other in (second, third):
        assert torch.equal(first.mean, other.mean)
        assert torch.equal(first.m2, other.m2)


@each_backend
@each_dtype
@pytest.mark.parametrize("row", [0, 1500, 2999])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_marks_exactly_its_channel(
    value: float, row: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    x = normal(3000, 70, dtype, device)
    with forced(backend, device):
        clean = moments_of(x)
        x[row, 69] = value
        moments = moments_of(x)
    assert not moments.mean[69].isfinite()
    assert moments.m2[69].isnan()
    assert torch.equal(moments.mean[:69], clean.mean[:69])
    assert torch.equal(moments.m2[:69], clean.m2[:69])


@each_backend
@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24)])
def test_no_rows_change_nothing(shape: tuple[int, ...], backend: str, device: str) -> None:
    with forced(backend, device):
        moments = moments_of(normal(50, 24, torch.float32, device))
        mean, m2 = moments.mean.clone(), moments.m2.clone()
        moments.update(torch.empty(shape, device=device))
    assert moments.count == 50
    assert torch.equal(moments.mean, mean)
    assert torch.equal(moments.m2, m2)


def test_no_channels() -> None:
    moments = ChannelMoments.zeros(0)
    moments.update(torch.empty(5, 0))
    assert moments.count == 5


VIEWS = {
    "three dimensions": lambda wide: wide[:, :24].unflatten(0, (40, 50)),
    "one row, one dimension": lambda wide: wide[5, :24],
    "some columns": lambda wide: wide[:, :24],
    "columns from an odd address": lambda wide: wide[:, 1:26],
    "every other row": lambda wide: wide[::2, :24],
    "every other column": lambda wide: wide[:, ::2],
    "transposed": lambda wide: wide[:60].t(),
    "leading dimensions that do not flatten": lambda wide: wide.unflatten(0, (40, 50)).transpose(0, 1),
    "a repeated row": lambda wide: wide[7].expand(100, 61),
    "overlapping rows": lambda wide: wide.as_strided((100, 24), (3, 1)),
}


@each_backend
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, backend: str, device: str) -> None:
    x = VIEWS[view](normal(2000, 61, torch.bfloat16, device))
    rows = x.clone(memory_format=torch.contiguous_format).reshape(-1, x.shape[-1])
    with forced(backend, device):
        moments = moments_of(x)
    assert moments.count == len(rows)
    assert_within_analysed_bound(rows, moments.mean, moments.m2, merges=1)


@each_backend
def test_memory_around_the_input_is_not_read(backend: str, device: str) -> None:
    buffer = torch.full((303, 80), torch.nan, dtype=torch.bfloat16, device=device)
    x = buffer[1:302, 3:70]
    x.copy_(normal(301, 67, torch.bfloat16, device))
    with forced(backend, device):
        moments = moments_of(x)
    assert_as_good_as_torch(x, moments.mean, moments.m2)


@each_device
def test_float64_runs_on_the_reference_alone(device: str) -> None:
    x = normal(400, 20, torch.float64, device)
    assert choose(OPERATOR, x).backend == "reference"
    moments = moments_of(x)
    mean, m2 = exact_moments(x)
    # Computed in float64, stored in float32: one rounding.
    torch.testing.assert_close(moments.mean.double(), mean, rtol=2**-24, atol=0)
    torch.testing.assert_close(moments.m2.double(), m2, rtol=2**-24, atol=0)


def test_reference_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyprune.ops.moments.REFERENCE_CHUNK_ELEMENTS", 1000)
    x = normal(1003, 64, torch.bfloat16, "cpu")
    with forced("reference", "cpu"):
        moments = moments_of(x)
    assert_as_good_as_torch(x, moments.mean, moments.m2, merges=1003 // (1000 // 64) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_than_2_to_the_31_elements(backend: str) -> None:
    rows, channels = 80_000, 28_672  # 4.6 GB of bfloat16
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    x = torch.randn(rows, channels, dtype=torch.bfloat16, device="cuda")
    with forced(backend, "cuda"):
        moments = moments_of(x)
    for columns in (slice(0, 64), slice(channels - 64, channels)):
        assert_as_good_as_torch(x[:, columns], moments.mean[columns], moments.m2[columns])


inputs = st.tuples(
    st.integers(2, 200),  # rows
    st.integers(1, 40),  # channels
    st.sampled_from(KERNEL_DTYPES),
    st.sampled_from([0.0, 10.0, 100.0]),  # offset
    st.integers(0, 2**31),  # seed
)


def make_input(rows: int, channels: int, dtype: torch.dtype, offset: float, seed: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, channels, generator=generator) + offset).to(device, dtype)


@each_backend
@settings(deadline=None, max_examples=40)
@given(inputs, st.lists(st.integers(0, 200), max_size=6))
def test_any_split_of_the_rows(
    backend: str, device: str, shape: tuple[int, int, torch.dtype, float, int], cuts: list[int]
) -> None:
    x = make_input(*shape, device)
    batches = torch.tensor_split(x, sorted(min(cut, len(x)) for cut in cuts))
    with forced(backend, device):
        moments = moments_of(*batches)
    assert moments.count == len(x)
    assert_within_analysed_bound(x, moments.mean, moments.m2, merges=len(batches))


@each_backend
@settings(deadline=None, max_examples=40)
@given(inputs, st.integers(0, 200))
def test_merge_is_concatenation(
    backend: str, device: str, shape: tuple[int, int, torch.dtype, float, int], cut: int
) -> None:
    x = make_input(*shape, device)
    with forced(backend, device):
        moments, other = moments_of(x[:cut]), moments_of(x[cut:])
    moments.merge(other)
    assert moments.count == len(x)
    assert_within_analysed_bound(x, moments.mean, moments.m2, merges=3)


def test_merge_with_no_rows_is_exact() -> None:
    moments = moments_of(normal(30, 9, torch.float32, "cpu"))
    mean, m2 = moments.mean.clone(), moments.m2.clone()
    moments.merge(ChannelMoments.zeros(9))
    empty = ChannelMoments.zeros(9)
    empty.merge(moments)
    for merged in (moments, empty):
        assert merged.count == 30
        assert torch.equal(merged.mean, mean)
        assert torch.equal(merged.m2, m2)


def test_merge_of_other_channels_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot merge 4 channels into 3"):
        ChannelMoments.zeros(3).merge(ChannelMoments.zeros(4))


def test_variance_and_sum_of_squares() -> None:
    x = normal(500, 30, torch.float32, "cpu")
    moments = moments_of(x)
    # M2's own error: 63 merges of 8 rows, random signs, condition number up to 10: 18 u, u = 2^-24.
    torch.testing.assert_close(moments.variance().double(), x.double().var(0), rtol=18 * 2**-24, atol=0)
    squares = x.double().square().sum(0)
    torch.testing.assert_close(moments.sum_of_squares().double(), squares, rtol=18 * 2**-24, atol=0)


@pytest.mark.parametrize(
    ("x", "count", "mean", "m2", "message"),
    [
        (torch.tensor(1.0), 0, torch.zeros(1), torch.zeros(1), "x is a scalar"),
        (torch.zeros(2, 3, dtype=torch.int32), 0, torch.zeros(3), torch.zeros(3), "x is torch.int32"),
        (torch.zeros(2, 3), -1, torch.zeros(3), torch.zeros(3), "count is -1"),
        (torch.zeros(2, 3), 0, torch.zeros(4), torch.zeros(3), r"mean is torch.float32 \[4\]; x \[2, 3\]"),
        (torch.zeros(2, 3), 0, torch.zeros(3), torch.zeros(1, 3), r"m2 is torch.float32 \[1, 3\]"),
        (torch.zeros(2, 3), 0, torch.zeros(3).half(), torch.zeros(3), "mean is torch.float16"),
        (torch.zeros(2, 3), 0, torch.zeros(3), torch.zeros(6)[::2], r"m2 has strides \[2\]; it needs to be contiguous"),
        (torch.zeros(2, 3), 0, torch.zeros(3), torch.zeros(3, device="meta"), "m2 is on meta and x on cpu"),
    ],
)
def test_arguments_that_do_not_fit(x: Tensor, count: int, mean: Tensor, m2: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channel_moments_update(x, count, mean, m2)


def test_forcing_an_ineligible_backend_reaches_the_caller() -> None:
    with (
        use_backend("triton"),
        pytest.raises(InputError, match="the input is on cpu"),
    ):
        ChannelMoments.zeros(3).update(torch.zeros(2, 3))


def test_schema() -> None:
    schema = (
        "pyprune::channel_moments_update(Tensor x, SymInt count, Tensor(a!) mean, Tensor(b!) m2, "
        "Tensor? weights=None, Tensor? total=None) -> ()"
    )
    assert str(torch.ops.pyprune.channel_moments_update.default._schema) == schema


@each_backend
def test_opcheck(backend: str, device: str) -> None:
    with forced(backend, device):
        for x in (normal(40, 24, torch.bfloat16, device), normal(40, 48, torch.float32, device)[:, ::2]):
            torch.library.opcheck(
                channel_moments_update, (x, 3, torch.zeros(24, device=device), torch.zeros(24, device=device))
            )


@each_backend
def test_compiles_as_one_graph_however_the_count_grows(backend: str, device: str) -> None:
    def step(x: Tensor, moments: ChannelMoments) -> Tensor:
        moments.update(x)
        return x * 2

    x = normal(40, 24, torch.float32, device)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    moments = ChannelMoments.zeros(24, device)
    with forced(backend, device):
        for _ in range(12):
            assert torch.equal(compiled(x, moments), x * 2)
        eager = moments_of(*[x] * 12)
    assert moments.count == 480
    assert torch.equal(moments.mean, eager.mean)
    assert torch.equal(moments.m2, eager.m2)
    # Once for a count of 0, once for any count.
    assert counter.frame_count == 2
