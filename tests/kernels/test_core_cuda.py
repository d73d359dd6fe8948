"""The compiled core's CUDA kernels through raw addresses: workspaces, guards, any device, refusals.

Dtypes, strides, non-finite values and repeatability of the operator are test_ops_moments.py's.
"""

from functools import partial

import pytest
import torch
from support import random_rows
from support.moments_oracle import assert_moments_match
from torch import Tensor

core = pytest.importorskip("pyprune._core", reason="pyprune was installed without its compiled core")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not hasattr(core, "channel_moments_cuda"), reason="the core was built without nvcc"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
normal = partial(random_rows.normal, device="cuda")
GUARD = 5  # NaN elements on either side of a state buffer
WORKSPACE_GUARD = 64  # NaN elements after the workspace


class State:
    """mean and M2 between NaN guards, a NaN-filled workspace, fed through the raw addresses."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.buffers = torch.full((2, channels + 2 * GUARD), float("nan"), device="cuda")
        self.mean, self.m2 = self.buffers[:, GUARD : GUARD + channels]

    def update(self, x: Tensor, multiprocessors: int | None = None) -> None:
        if multiprocessors is None:
            multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
        dtype = str(x.dtype).removeprefix("torch.")
        size = core.channel_moments_cuda_workspace(dtype, *x.shape, multiprocessors)
        workspace = torch.full((size // 4 + WORKSPACE_GUARD,), float("nan"), device="cuda")
        core.channel_moments_cuda(
            x.data_ptr(),
            dtype,
            x.shape[0],
            x.shape[1],
            x.stride(0),
            self.count,
            self.mean.data_ptr(),
            self.m2.data_ptr(),
            workspace.data_ptr(),
            size,
            multiprocessors,
            torch.cuda.current_stream().cuda_stream,
        )
        self.count += x.shape[0]
        assert workspace[-WORKSPACE_GUARD:].isnan().all()

    def guards_are_untouched(self) -> bool:
        return bool(self.buffers[:, :GUARD].isnan().all() and self.buffers[:, -GUARD:].isnan().all())


def moments_of(*parts: Tensor, multiprocessors: int | None = None) -> State:
    state = State(parts[0].shape[1])
    for part in parts:
        state.update(part, multiprocessors)
    assert state.guards_are_untouched()
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 64, 65, 256, 264, 1000, 4096])
def test_odd_sizes(channels: int, dtype: torch.dtype) -> None:
    """Around the tiles; the guards beside the state and after the workspace notice what is written beyond."""
    for rows in (1, 7, 8, 9, 31, 63, 64, 65, 1029):
        x = normal(rows, channels, dtype)
        state = moments_of(x)
        assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 288, 4096, 11008, 28672])
def test_long_inputs(channels: int, dtype: torch.dtype) -> None:
    x = normal(20011, channels, dtype)
    state = moments_of(x)
    assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 67])
def test_strided_rows_read_nothing_beyond_their_channels(channels: int, dtype: torch.dtype) -> None:
    rows = 1037
    for stride, offset in ((72, 0), (71, 3), (67, 1), (128, 61), (128, 8)):
        memory = torch.full((offset + rows * stride + channels,), float("nan"), dtype=dtype, device="cuda")
        x = memory.as_strided((rows, channels), (stride, 1), offset)
        x.copy_(normal(rows, channels, dtype))
        state = moments_of(x)
        assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stream_of_calls(dtype: torch.dtype) -> None:
    x = normal(12000, 520, dtype)
    state = moments_of(*x.split([1, 0, 7, 16, 500, 1, 9000, 2475]))
    assert state.count == 12000
    assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["large mean", "massive first row"])
def test_hard_columns(kind: str, dtype: torch.dtype) -> None:
    x = normal(65536, 256, dtype, mean=100.0 if kind == "large mean" else 0.0)
    if kind == "massive first row":
        x[0] = 3000.0
    state = moments_of(x)
    assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("channels", [256, 257])
@pytest.mark.parametrize("multiprocessors", [1, 2, 108, 132, 1000])
def test_any_number_of_multiprocessors(multiprocessors: int, channels: int) -> None:
    x = normal(5001, channels, torch.bfloat16)
    state = moments_of(x, multiprocessors=multiprocessors)
    assert_moments_match(x, state.mean, state.m2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [4096, 4097])
def test_the_same_bits_three_times(channels: int, dtype: torch.dtype) -> None:
    x = normal(30011, channels, dtype)
    first = moments_of(x, x)
    for _ in range(3):
        again = moments_of(x, x)
        assert torch.equal(first.mean, again.mean)
        assert torch.equal(first.m2, again.m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_and_cpu_kernels_agree(dtype: torch.dtype) -> None:
    x = normal(9000, 300, dtype, mean=3.0)
    state = moments_of(x)
    host = x.cpu()
    mean, m2 = torch.zeros(2, 300)
    name = str(dtype).removeprefix("torch.")
    core.channel_moments_cpu(host.data_ptr(), name, 9000, 300, 300, 0, mean.data_ptr(), m2.data_ptr(), 2)
    assert_moments_match(host, mean, m2)
    assert_moments_match(host, state.mean.cpu(), state.m2.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (7, 64), (63, 65), (1029, 264), (9000, 1000)])
def test_weights_are_copies_of_rows(rows: int, channels: int, multiprocessors: int, dtype: torch.dtype) -> None:
    """Squares of 0 to 3 as weights; roots between NaN, and a workspace that is NaN, are neither read nor overrun."""
    x, roots = normal(rows, channels, dtype, mean=3.0), torch.arange(1, rows + 1, device="cuda") % 4
    buffer = torch.full((rows + 16,), float("nan"), device="cuda")
    buffer[7 : 7 + rows] = roots
    state, total = State(channels), torch.zeros((), dtype=torch.float64, device="cuda")
    name, cut = str(dtype).removeprefix("torch."), rows // 3
    for first, last in ((0, cut), (cut, rows)):
        size = core.channel_moments_cuda_workspace(name, last - first, channels, multiprocessors, True)
        workspace = torch.full((size // 4 + WORKSPACE_GUARD,), float("nan"), device="cuda")
        core.channel_moments_cuda(
            x[first:].data_ptr(), name, last - first, channels, channels, first, state.mean.data_ptr(),
            state.m2.data_ptr(), workspace.data_ptr(), size, multiprocessors, torch.cuda.current_stream().cuda_stream,
            buffer[7 + first :].data_ptr(), total.data_ptr(),
        )  # fmt: skip
        assert workspace[-WORKSPACE_GUARD:].isnan().all()
        total += roots[first:last].square().sum()
    assert state.guards_are_untouched()
    assert_moments_match(x.repeat_interleave(roots.square(), 0), state.mean, state.m2)


def test_no_rows_change_nothing() -> None:
    x = normal(20, 9, torch.float32)
    state = moments_of(x)
    before = state.buffers.clone()
    state.update(x[:0])
    assert torch.equal(before.view(torch.int32), state.buffers.view(torch.int32))


def test_captured_in_a_graph() -> None:
    x = normal(4096, 512, torch.bfloat16)
    state = State(512)
    size = core.channel_moments_cuda_workspace("bfloat16", 4096, 512, 132)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        core.channel_moments_cuda(
            x.data_ptr(), "bfloat16", 4096, 512, 512, 0, state.mean.data_ptr(), state.m2.data_ptr(),
            workspace.data_ptr(), size, 132, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    for scale in (1.0, 3.0):
        x.mul_(scale)
        graph.replay()
        assert_moments_match(x, state.mean, state.m2)


def test_more_than_two_to_the_31_elements() -> None:
    rows, channels = 262144, 28672
    needed = rows * channels * 2
    free = torch.cuda.mem_get_info()[0]
    if free < needed + (2 << 30):
        pytest.skip(f"{needed >> 30} GiB are needed, {free >> 30} GiB are free")
    x = torch.empty(rows, channels, dtype=torch.bfloat16, device="cuda").normal_(3.0)
    state = moments_of(x)
    # The oracle's float64 copy of it all would not fit: channels at both ends, and across element 2^31.
    for columns in (slice(0, 64), slice(14336, 14400), slice(-64, None)):
        assert_moments_match(x[:, columns], state.mean[columns], state.m2[columns])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"multiprocessors": 0}, "multiprocessors must be positive"),
        ({"workspace_bytes": 8}, "the workspace has 8 bytes and needs"),
        ({"workspace_ptr": 0}, "workspace_ptr is null"),
        ({"workspace_ptr": 4104}, "workspace_ptr is not aligned to 16 bytes"),
    ],
)
def test_wrong_arguments(wrong: dict[str, int | str], message: str) -> None:
    x = torch.zeros(1024, 64, device="cuda")
    mean, m2 = torch.zeros(2, 64, device="cuda")
    size = core.channel_moments_cuda_workspace("float32", 1024, 64, 132)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    arguments: dict[str, int | str] = {
        "x_ptr": x.data_ptr(),
        "dtype": "float32",
        "rows": 1024,
        "channels": 64,
        "row_stride": 64,
        "count": 0,
        "mean_ptr": mean.data_ptr(),
        "m2_ptr": m2.data_ptr(),
        "workspace_ptr": workspace.data_ptr(),
        "workspace_bytes": size,
        "multiprocessors": 132,
        "stream": 0,
    }
    with pytest.raises(ValueError, match=message):
        core.channel_moments_cuda(**(arguments | wrong))
