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
from .row_weights import check_total, check_unmixed, check_weights, share, sum_of_weights, total_before

OPERATOR = "channel_moments"
NAME = "channel moments"  # in messages

# The reference converts this many elements at a time, 64 MiB in float32: a large input has no full copy.
REFERENCE_CHUNK_ELEMENTS = 1 << 24


@dataclass
class ChannelMoments:
    """Moments of the rows seen so far.

    count: rows; mean: [channels] float32, Σ w² x / Σ w²; m2: [channels] float32, Σ w² (x − mean)² over the rows.
    total: float64 scalar on the device, Σ w², or None while no rows had weights; then w = 1.
    """

    count: int
    mean: Tensor
    m2: Tensor
    total: Tensor | None = None

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str | None = None) -> ChannelMoments:
        """The moments of no rows."""
        mean, m2 = (torch.zeros(channels, dtype=torch.float32, device=device) for _ in range(2))
        return cls(0, mean, m2)

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the rows of x [..., channels]: bfloat16, float16, float32, or float64 (by the reference only).

        Everything but the last dimension counts as rows; an x without rows changes nothing. weights: float32 [rows],
        square roots w of the rows' weights w². Raises ValueError when x or weights do not fit the state, and when some
        rows of a state have weights and others none. Gradients are not tracked.
        """
        total = total_before(NAME, self.count, self.total, x, weights)
        roots = None if weights is None else weights.detach()
        channel_moments_update(x.detach(), self.count, self.mean, self.m2, roots, total)
        if row_count(x) == 0:
            return
        self.count += row_count(x)
        if total is not None and weights is not None:
            self.total = total.add_(sum_of_weights(weights))

    def merge(self, other: ChannelMoments) -> None:
        """Add the rows that `other` has seen (Chan, Golub & LeVeque 1983).

        Raises ValueError where the channels, types or devices differ, and where only one of both has weights.
        """
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"cannot merge {len(other.mean)} channels into {len(self.mean)}")
        for name, own, others in (("mean", self.mean, other.mean), ("m2", self.m2, other.m2)):
            check_alike(NAME, f"the other {name}", others, name, own)
        if other.count == 0:
            return
        check_unmixed(NAME, self.count, self.total, other.total is not None)
        if other.total is None:
            mean, m2 = merge_moments(self.count, self.mean, self.m2, other.count, other.mean, other.m2)
        else:
            total = torch.zeros_like(other.total) if self.total is None else self.total
            mean, m2 = merge_weighted(total, self.mean, self.m2, other.total, other.mean, other.m2)
            self.total = total.add_(other.total)
        self.count += other.count
        self.mean.copy_(mean)
        self.m2.copy_(m2)

    def variance(self) -> Tensor:
        """Unbiased variance M2 / (count − 1), float32 [channels]; NaN below two rows.

        With weights M2 / Σw² · count / (count − 1): the weights count as if they were 1 on the average.
        """
        if self.count < 2:
            return torch.full_like(self.m2, torch.nan)
        if self.total is not None:
            return self.m2 / self.total * (self.count / (self.count - 1))
        return self.m2 / (self.count - 1)

    def sum_of_squares(self) -> Tensor:
        """Σ w² x² = M2 + Σw²·mean², float32 [channels]; Σw² is the count where rows have no weights."""
        return self.m2 + (self.count if self.total is None else self.total) * self.mean**2


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


def merge_weighted(
    total_a: Tensor, mean_a: Tensor, m2_a: Tensor, total_b: Tensor, mean_b: Tensor, m2_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and M2 as merge_moments does, of sets of rows with weights: Σ w² instead of counts, float64 scalars."""
    fraction = share(total_b, total_a + total_b)
    delta = mean_b - mean_a
    return mean_a + delta * fraction, m2_a + m2_b + delta.square() * (total_a * fraction)


def weighted_moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Total Σ w², float64 scalar; mean and M2 of values [T, C], [C] each. weights: float32 [T], w."""
    squares = weights.to(values.dtype).square().unsqueeze(1)  # [T, 1]
    total = squares.sum(dtype=torch.float64)
    mean = share((squares * values).sum(0), total)
    return total, mean, (squares * (values - mean).square()).sum(0)


def channel_moments_update_reference(
    x: Tensor, count: int, mean: Tensor, m2: Tensor, weights: Tensor | None = None, total: Tensor | None = None
) -> None:
    """Merge the rows of x into the state, in plain PyTorch: any device and any floating-point dtype.

    x: [..., channels]. count: rows already in the state. mean, m2: float32 [channels], changed in place.
    weights: float32 [rows], w, and total: float64 scalar, Σ w² already in the state; or None, both.
    Chunks of rows are converted to float32 (float64 stays), centred on their own mean, without weights by
    torch.var_mean, and merged in their order: an offset or an outlier costs no accuracy, the same input gives the
    same bits.
    """
    check_tensors(x, mean, m2, weights, total)
    check_apart(NAME, {"mean": mean, "m2": m2}, {"x": x, "weights": weights, "total": total})
    rows = as_rows(x)  # [T, C]
    if rows.numel() == 0:
        return
    working = torch.promote_types(x.dtype, torch.float32)
    running_mean, running_m2 = mean.to(working), m2.to(working)  # [C]
    chunk_rows = max(1, REFERENCE_CHUNK_ELEMENTS // rows.shape[1])
    for index, chunk in enumerate(rows.split(chunk_rows)):
        if weights is not None and total is not None:
            roots = weights[index * chunk_rows :][: len(chunk)]
            chunk_total, chunk_mean, chunk_m2 = weighted_moments(chunk.to(working), roots)
            running_mean, running_m2 = merge_weighted(
                total, running_mean, running_m2, chunk_total, chunk_mean, chunk_m2
            )
            total = total + chunk_total
            continue
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


def check_tensors(x: Tensor, mean: Tensor, m2: Tensor, weights: Tensor | None, total: Tensor | None) -> None:
    """ValueError unless (mean, m2, total) is a state that the rows of x can be merged into, with these weights."""
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
    if (weights is None) != (total is None):
        given, missing = ("total", "weights") if weights is None else ("weights", "total")
        raise ValueError(f"channel moments: {given} is given and {missing} is not; a weighted update needs both")
    if weights is not None and total is not None:
        check_weights(NAME, weights, x)
        check_total(NAME, total, "x", x)


def check_strides(mean: Tensor, m2: Tensor) -> None:
    """ValueError unless the kernels can write the state as it lies."""
    check_contiguous(NAME, "mean", mean)
    check_contiguous(NAME, "m2", m2)


@torch.library.custom_op(
    "pyprune::channel_moments_update",
    mutates_args=("mean", "m2"),
    schema=("(Tensor x, SymInt count, Tensor(a!) mean, Tensor(b!) m2, Tensor? weights=None, Tensor? total=None) -> ()"),
)
def channel_moments_update(
    x: Tensor, count: int, mean: Tensor, m2: Tensor, weights: Tensor | None = None, total: Tensor | None = None
) -> None:
    """Merge the rows of x into the state, on the backend that pyprune.ops.dispatch chooses.

    x: [..., channels] bfloat16, float16, float32 (float64: reference only), any strides.
    count: rows already in the state, which must be zeros if it is 0; the caller adds x's rows afterwards.
    mean, m2: float32 [channels], contiguous, on x's device, changed in place.
    weights: float32 [rows], any stride, the square roots w of the rows' weights w²; None: 1.
    total: with weights, float64 scalar on x's device, Σ w² already in the state, to which the caller adds
    afterwards; else None.
    Has no gradients, and autograd does not say so: x must not need any.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(x, mean, m2, weights, total)
    check_strides(mean, m2)
    check_apart(NAME, {"mean": mean, "m2": m2}, {"x": x, "weights": weights, "total": total})
    if count < 0:
        raise ValueError(f"channel moments: count is {count}; it is the number of rows already in the state")
    if x.numel() == 0:
        return
    rows = as_rows(x)
    weights = None if weights is None else weights.contiguous()
    choose_launch(CHANNEL_MOMENTS, rows)(rows, count, mean, m2, weights, total)


@channel_moments_update.register_fake
def _(
    x: Tensor, count: int, mean: Tensor, m2: Tensor, weights: Tensor | None = None, total: Tensor | None = None
) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_tensors(x, mean, m2, weights, total)
    check_strides(mean, m2)


def core_arguments(rows: Tensor, count: int, mean: Tensor, m2: Tensor) -> tuple[int | str, ...]:
    """Prepare the arguments of both launches of the compiled core."""
    # The stride of a single row has no meaning and may be anything.
    row_stride = rows.stride(0) if len(rows) > 1 else rows.shape[1]
    dtype = dtype_name(rows.dtype)
    return (rows.data_ptr(), dtype, *rows.shape, row_stride, count, mean.data_ptr(), m2.data_ptr())


def address_of(x: Tensor | None) -> int:
    """The address of x, as the compiled core takes it; 0: there is none."""
    return 0 if x is None else x.data_ptr()


def launch_cpu(
    rows: Tensor, count: int, mean: Tensor, m2: Tensor, weights: Tensor | None, total: Tensor | None
) -> None:
    core = required_core()
    core.channel_moments_cpu(
        *core_arguments(rows, count, mean, m2),
        threads=torch.get_num_threads(),
        weights_ptr=address_of(weights),
        total_ptr=address_of(total),
    )


@cache
def multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_cuda(
    rows: Tensor, count: int, mean: Tensor, m2: Tensor, weights: Tensor | None, total: Tensor | None
) -> None:
    core = required_core()
    multiprocessors = multiprocessors_of(rows.device)
    dtype = dtype_name(rows.dtype)
    size = core.channel_moments_cuda_workspace(dtype, *rows.shape, multiprocessors, weights is not None)
    with torch.cuda.device(rows.device):
        workspace = torch.empty(size, dtype=torch.uint8, device=rows.device)
        core.channel_moments_cuda(
            *core_arguments(rows, count, mean, m2),
            workspace_ptr=workspace.data_ptr(),
            workspace_bytes=size,
            multiprocessors=multiprocessors,
            stream=torch.cuda.current_stream().cuda_stream,
            weights_ptr=address_of(weights),
            total_ptr=address_of(total),
        )


def launch_triton(
    rows: Tensor, count: int, mean: Tensor, m2: Tensor, weights: Tensor | None, total: Tensor | None
) -> None:
    from ..triton_kernels.channel_moments import channel_moments_triton, configuration_for

    properties = torch.cuda.get_device_properties(rows.device)
    configuration = configuration_for((properties.major, properties.minor), rows.element_size(), rows.device)
    with torch.cuda.device(rows.device):
        channel_moments_triton(rows, count, mean, m2, configuration, properties.multi_processor_count, weights, total)


# Shape: [rows, channels]
CHANNEL_MOMENTS: Operator[Callable[[Tensor, int, Tensor, Tensor, Tensor | None, Tensor | None], None]] = Operator(
    OPERATOR,
    versions={"ChannelMoments": 2, "channel_moments_update": 2, "channel_moments_update_reference": 2},
    kernels={
        "cuda": Kernel(launch_cuda, (ON_NVIDIA_GPU, KERNEL_DTYPE, *CUDA_CORE)),
        "triton": Kernel(launch_triton, (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, SIZES_FIT_INT32, *TRITON)),
        "cpu": Kernel(launch_cpu, (ON_CPU, KERNEL_DTYPE, CORE_BUILT)),
        "reference": Kernel(channel_moments_update_reference),
    },
)
