"""Channel moments: count, mean and centred sum of squares of every channel, streamed over many calls.

The statistic behind FLAP's fluctuation, and behind every centred statistic. The operator is
`pyprune::channel_moments_update`; `channel_moments_update_reference` says in plain PyTorch what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .checks import FLOATS, SINGLE, check_alike, check_apart, check_contiguous, check_device, check_kind, check_rows
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .requirements import (
    AMPERE_OR_LATER,
    CORE_BUILT,
    CUDA_CORE,
    KERNEL_DTYPE,
    ON_CPU,
    ON_NVIDIA_GPU,
    SIZES_FIT_INT32,
    TRITON,
    dtype_name,
    required_core,
)

OPERATOR = "channel_moments"
NAME = "channel moments"  # in messages

# The reference converts this many elements at a time, 64 MiB in float32: a large input has no full copy.
REFERENCE_CHUNK_ELEMENTS = 1 << 24


@dataclass
class ChannelMoments:
    """Moments of the rows seen so far.

    count: rows; mean: [channels] float32; m2: [channels] float32, Σ (x − mean)² over the rows.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str | None = None) -> ChannelMoments:
        """The moments of no rows."""
        mean, m2 = (torch.zeros(channels, dtype=torch.float32, device=device) for _ in range(2))
        return cls(0, mean, m2)

    def update(self, x: Tensor) -> None:
        """Add the rows of x [..., channels]: bfloat16, float16, float32, or float64 (by the reference only).

        Everything but the last dimension counts as rows; an x without rows changes nothing. Raises ValueError
        when x does not fit the state. Gradients are not tracked.
        """
        channel_moments_update(x.detach(), self.count, self.mean, self.m2)
        self.count += row_count(x)

    def merge(self, other: ChannelMoments) -> None:
        """Add the rows that `other` has seen (Chan, Golub & LeVeque 1983)."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"cannot merge {len(other.mean)} channels into {len(self.mean)}")
        for name, own, others in (("mean", self.mean, other.mean), ("m2", self.m2, other.m2)):
            check_alike(NAME, f"the other {name}", others, name, own)
        if other.count == 0:
            return
        mean, m2 = merge_moments(self.count, self.mean, self.m2, other.count, other.mean, other.m2)
        self.count += other.count
        self.mean.copy_(mean)
        self.m2.copy_(m2)

    def variance(self) -> Tensor:
        """Unbiased variance M2 / (count − 1), float32 [channels]; NaN below two rows."""
        if self.count < 2:
            return torch.full_like(self.m2, torch.nan)
        return self.m2 / (self.count - 1)

    def sum_of_squares(self) -> Tensor:
        """Σ x² = M2 + count·mean², float32 [channels]."""
        return self.m2 + self.count * self.mean**2


def row_count(x: Tensor) -> int:
    """Rows of x [..., channels], also where there are no channels."""
    return x.shape[:-1].numel()


def merge_moments(
    count_a: int, mean_a: Tensor, m2_a: Tensor, count_b: int, mean_b: Tensor, m2_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and M2 of two disjoint sets of rows: δ = m_b − m_a, M2 = M2_a + M2_b + δ²·n_a·n_b/(n_a + n_b).

    Chan, Golub & LeVeque 1983, eq. 2.1. count_a + count_b > 0.
    """
    fraction = count_b / (count_a + count_b)
    delta = mean_b - mean_a
    return mean_a + delta * fraction, m2_a + m2_b + delta.square() * (count_a * fraction)


def channel_moments_update_reference(x: Tensor, count: int, mean: Tensor, m2: Tensor) -> None:
    """Merge the rows of x into the state, in plain PyTorch: any device and any floating-point dtype.

    x: [..., channels]. count: rows already in the state. mean, m2: float32 [channels], changed in place.
    Chunks of rows are converted to float32 (float64 stays), centred on their own mean by torch.var_mean and
    merged in their order: an offset or an outlier costs no accuracy, the same input gives the same bits.
    """
    check_tensors(x, mean, m2)
    check_apart(NAME, {"mean": mean, "m2": m2}, {"x": x})
    rows = as_rows(x)  # [T, C]
    if rows.numel() == 0:
        return
    working = torch.promote_types(x.dtype, torch.float32)
    running_mean, running_m2 = mean.to(working), m2.to(working)  # [C]
    for chunk in rows.split(max(1, REFERENCE_CHUNK_ELEMENTS // rows.shape[1])):
        variance, chunk_mean = torch.var_mean(chunk.to(working), dim=0, correction=0)  # [C], [C]
        running_mean, running_m2 = merge_moments(
            count, running_mean, running_m2, len(chunk), chunk_mean, variance * len(chunk)
        )
        count += len(chunk)
    mean.copy_(running_mean)
    m2.copy_(running_m2)


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [T, C] with unit stride in channels and rows that do not overlap.

    A view wherever the strides allow. A contiguous copy is made when the leading dimensions cannot be
    flattened, when neighbouring channels are not neighbours in memory, and when rows overlap or repeat
    (x.expand).
    """
    channels = x.shape[-1]
    rows = x.reshape(row_count(x), channels)
    if channels > 1 and rows.stride(1) != 1:
        return rows.contiguous()
    if len(rows) > 1 and rows.stride(0) < channels:
        return rows.contiguous()
    return rows


def check_tensors(x: Tensor, mean: Tensor, m2: Tensor) -> None:
    """ValueError unless (mean, m2) is a state that the rows of x can be merged into."""
    check_rows(NAME, "x", x)
    check_kind(NAME, "x", x, FLOATS)
    for name, state in (("mean", mean), ("m2", m2)):
        check_kind(NAME, name, state, SINGLE)
        if state.shape != x.shape[-1:]:
            raise ValueError(
                f"channel moments: {name} is {state.dtype} {list(state.shape)}; "
                f"x {list(x.shape)} needs torch.float32 {list(x.shape[-1:])}"
            )
        check_device(NAME, name, state, "x", x)


def check_strides(mean: Tensor, m2: Tensor) -> None:
    """ValueError unless the kernels can write the state as it lies."""
    check_contiguous(NAME, "mean", mean)
    check_contiguous(NAME, "m2", m2)


@torch.library.custom_op(
    "pyprune::channel_moments_update",
    mutates_args=("mean", "m2"),
    schema="(Tensor x, SymInt count, Tensor(a!) mean, Tensor(b!) m2) -> ()",
)
def channel_moments_update(x: Tensor, count: int, mean: Tensor, m2: Tensor) -> None:
    """Merge the rows of x into the state, on the backend that pyprune.ops.dispatch chooses.

    x: [..., channels] bfloat16, float16, float32 (float64: reference only), any strides.
    count: rows already in the state, which must be zeros if it is 0; the caller adds x's rows afterwards.
    mean, m2: float32 [channels], contiguous, on x's device, changed in place.
    Has no gradients, and autograd does not say so: x must not need any.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(x, mean, m2)
    check_strides(mean, m2)
    check_apart(NAME, {"mean": mean, "m2": m2}, {"x": x})
    if count < 0:
        raise ValueError(f"channel moments: count is {count}; it is the number of rows already in the state")
    if x.numel() == 0:
        return
    rows = as_rows(x)
    choose_launch(CHANNEL_MOMENTS, rows)(rows, count, mean, m2)


@channel_moments_update.register_fake
def _(x: Tensor, count: int, mean: Tensor, m2: Tensor) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_tensors(x, mean, m2)
    check_strides(mean, m2)


def core_arguments(rows: Tensor, count: int, mean: Tensor, m2: Tensor) -> tuple[int | str, ...]:
    """Prepare the arguments of both launches of the compiled core."""
    # The stride of a single row has no meaning and may be anything.
    row_stride = rows.stride(0) if len(rows) > 1 else rows.shape[1]
    dtype = dtype_name(rows.dtype)
    return (rows.data_ptr(), dtype, *rows.shape, row_stride, count, mean.data_ptr(), m2.data_ptr())


def launch_cpu(rows: Tensor, count: int, mean: Tensor, m2: Tensor) -> None:
    core = required_core()
    core.channel_moments_cpu(*core_arguments(rows, count, mean, m2), threads=torch.get_num_threads())


@cache
def multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_cuda(rows: Tensor, count: int, mean: Tensor, m2: Tensor) -> None:
    core = required_core()
    multiprocessors = multiprocessors_of(rows.device)
    dtype = dtype_name(rows.dtype)
    size = core.channel_moments_cuda_workspace(dtype, *rows.shape, multiprocessors)
    with torch.cuda.device(rows.device):
        workspace = torch.empty(size, dtype=torch.uint8, device=rows.device)
        core.channel_moments_cuda(
            *core_arguments(rows, count, mean, m2),
            workspace_ptr=workspace.data_ptr(),
            workspace_bytes=size,
            multiprocessors=multiprocessors,
            stream=torch.cuda.current_stream().cuda_stream,
        )


def launch_triton(rows: Tensor, count: int, mean: Tensor, m2: Tensor) -> None:
    from ..triton_kernels.channel_moments import channel_moments_triton, configuration_for

    properties = torch.cuda.get_device_properties(rows.device)
    configuration = configuration_for((properties.major, properties.minor), rows.element_size(), rows.device)
    with torch.cuda.device(rows.device):
        channel_moments_triton(rows, count, mean, m2, configuration, properties.multi_processor_count)


# Shape: [rows, channels]
CHANNEL_MOMENTS: Operator[Callable[[Tensor, int, Tensor, Tensor], None]] = Operator(
    OPERATOR,
    versions={"ChannelMoments": 1, "channel_moments_update": 1, "channel_moments_update_reference": 1},
    kernels={
        "cuda": Kernel(launch_cuda, (ON_NVIDIA_GPU, KERNEL_DTYPE, *CUDA_CORE)),
        "triton": Kernel(launch_triton, (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, SIZES_FIT_INT32, *TRITON)),
        "cpu": Kernel(launch_cpu, (ON_CPU, KERNEL_DTYPE, CORE_BUILT)),
        "reference": Kernel(channel_moments_update_reference),
    },
)
