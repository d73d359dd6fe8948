"""Second moments H = Σ x xᵀ of rows of activations, streamed over many calls, with one triangle computed.

The matrix that SlimGPT and every method with compensated weights need. The operators are
`pyprune::hessian_update` and `pyprune::hessian_finish`; `hessian_update_reference` and
`hessian_finish_reference` say in plain PyTorch what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import FLOATS, SINGLE, check_apart, check_contiguous, check_device, check_kind, check_matrix, check_rows
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .moments import address_of, as_rows, multiprocessors_of, row_count
from .requirements import (
    AMPERE_OR_LATER,
    CORE_BUILT,
    CORE_WITH_CUDA,
    CORE_WITH_WGMMA,
    HALF_DTYPE,
    KERNEL_DTYPE,
    ON_NVIDIA_GPU,
    SIZES_FIT_INT32,
    TRITON,
    WIDTH_8,
    dtype_name,
    required_core,
)
from .row_weights import check_total, check_weights, divisor_of, share, sum_of_weights, total_before
from .split_tf32 import has_fast_tf32, split_gram

OPERATOR = "hessian"

# Rows that the reference converts and adds at a time: 90 MB in float32 at 11008 channels, no copy of a large input.
REFERENCE_CHUNK_ROWS = 2048
# Columns of the lower triangle that one product of the reference covers. A block computes half a square too much,
# REFERENCE_BLOCK / channels of the whole; narrower ones run slower in BLAS.
REFERENCE_BLOCK = 512
# HESSIAN_WEIGHTS_MULTIPLE of csrc/include/pyprune/hessian.h: rows that the core's kernel loads at a time.
PADDED_ROWS = 64
# Columns that are mirrored at a time: 4 MiB of temporary memory, and 28 steps at 28672 channels.
MIRROR_BLOCK = 1024
# Channels from which WᵀW of float32 weights is summed from split products on tensor cores, where these are fast, and
# columns at a time.
SPLIT_FROM, SPLIT_WIDTH = 4096, 2048


@dataclass
class Hessian:
    """Second moments of the rows seen so far.

    count: rows. lower: [channels, channels] float32, the lower triangle (diagonal included) of Σ w² x xᵀ; what lies
    above the diagonal is unspecified until `finish`. sums: [channels] float32, Σ w² x, or None. total: float64 scalar
    on the device, Σ w², or None while no rows had weights; then w = 1.
    """

    count: int
    lower: Tensor
    sums: Tensor | None
    total: Tensor | None = None

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str | None = None, sums: bool = False) -> Hessian:
        """The moments of no rows; `sums`: whether Σ x is kept too, which `finish(centred=True)` needs."""
        lower = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        return cls(0, lower, torch.zeros(channels, dtype=torch.float32, device=device) if sums else None)

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the rows of x [..., channels]: bfloat16, float16, float32, or float64 (by the reference only).

        Everything but the last dimension counts as rows; an x without rows changes nothing. weights: float32 [rows],
        square roots w of the rows' weights w². Powers of two leave products of 16-bit rows exact; others are rounded
        to the rows' type (`hessian_update`). Raises ValueError when x or weights do not fit the state, and when some
        rows of a state have weights and others none. Gradients are not tracked.
        """
        total = total_before(OPERATOR, self.count, self.total, x, weights)
        hessian_update(x.detach(), self.lower, self.sums, None if weights is None else weights.detach())
        if row_count(x) == 0:
            return
        self.count += row_count(x)
        if total is not None and weights is not None:
            self.total = total.add_(sum_of_weights(weights))

    def mean(self) -> Tensor:
        """m = Σ w² x / Σ w², float32 [channels]; zeros of no rows. Raises ValueError where no sums were kept."""
        if self.sums is None:
            raise ValueError("hessian: a mean needs the sums; start with Hessian.zeros(..., sums=True)")
        return mean_of(self.sums, self.count, self.total)

    def finish(self, centred: bool = False, scale: float = 1.0) -> Tensor:
        """H in full, symmetric, float32 [channels, channels]: `lower` itself, completed in place.

        centred: C = H − Σw²·m mᵀ = Σ w² (x − m)(x − m)ᵀ with the mean m instead; the state then holds C and takes
        no more rows. scale: a factor, as 2 / N of SparseGPT and SlimGPT. Raises ValueError where centring needs sums
        that were not kept. No rows give zeros. Does not wait for the device.
        """
        if centred and self.sums is None:
            raise ValueError("hessian: a centred matrix needs the sums; start with Hessian.zeros(..., sums=True)")
        hessian_finish(self.lower, self.sums if centred else None, self.count, scale, self.total)
        return self.lower


def lower_gram(weight: Tensor) -> Tensor:
    """WᵀW [in, in] of weight [out, in] in float32, only its lower triangle; of a float64 weight in float64, whole."""
    check_kind("lower gram", "weight", weight, FLOATS)
    check_matrix("lower gram", "weight", weight)
    if weight.dtype == torch.float64:
        return weight.T @ weight
    if weight.shape[1] >= SPLIT_FROM and has_fast_tf32(weight):
        return split_gram(weight, SPLIT_WIDTH)
    gram = Hessian.zeros(weight.shape[1], weight.device)
    gram.update(weight)
    return gram.lower


def hessian_update_reference(
    x: Tensor, lower: Tensor, sums: Tensor | None = None, weights: Tensor | None = None
) -> None:
    """lower += Σ w² x xᵀ where row ≥ column, sums += Σ w² x, in plain PyTorch: any device and floating-point dtype.

    x: [..., channels]. lower: float32 [channels, channels]; sums: float32 [channels] or None; changed in place.
    weights: float32 [rows], w; None: 1. Chunks of rows are converted to float32, multiplied by w, and then by
    themselves block column by block column, from the diagonal down. float64 is multiplied in float64 and rounded once.
    """
    rows = as_rows(x)  # [T, C]
    if rows.numel() == 0:
        return
    working = torch.promote_types(x.dtype, torch.float32)
    chunk_rows = len(rows) if working == torch.float64 else REFERENCE_CHUNK_ROWS
    for index, chunk in enumerate(rows.split(chunk_rows)):
        values = chunk.to(working)  # [t, C]
        roots = None if weights is None else weights[index * chunk_rows :][: len(chunk), None].to(working)  # [t, 1]
        if roots is not None:
            values = values * roots
        for first in range(0, rows.shape[1], REFERENCE_BLOCK):
            left, right = values[:, first:], values[:, first : first + REFERENCE_BLOCK]  # [t, C − first], [t, B]
            below = lower[first:, first : first + REFERENCE_BLOCK]  # [C − first, B]
            if working == lower.dtype:
                below.addmm_(left.t(), right)
            else:
                below.add_(left.t() @ right)
        if sums is not None:
            sums.add_((values if roots is None else values * roots).sum(0))


def mean_of(sums: Tensor, count: int, total: Tensor | None) -> Tensor:
    """sums / total, or sums / count where total is None: float32 [channels], zeros of nothing."""
    if total is not None:
        return share(sums, total)
    return sums / count if count > 0 else torch.zeros_like(sums)


def hessian_finish_reference(
    lower: Tensor, sums: Tensor | None, count: int, scale: float = 1.0, total: Tensor | None = None
) -> None:
    """Copy the lower triangle of `lower`, times `scale`, onto the upper one, in place, any device.

    lower: float32 [channels, channels]; nothing above its diagonal is read. sums: float32 [channels], Σ x over
    `count` rows: subtract sums sumsᵀ / count as well; None: do not. total: float64 scalar, Σ w² of rows with
    weights, by which sums sumsᵀ is divided instead of count.
    """
    channels = len(lower)
    means = None if sums is None or count == 0 else mean_of(sums, count, total)  # [C]
    for first in range(0, channels, MIRROR_BLOCK):
        last = min(first + MIRROR_BLOCK, channels)
        panel = lower[first:, first:last]  # [C − first, B], on and below the diagonal block
        if sums is not None and means is not None:
            panel.addr_(sums[first:], means[first:last], alpha=-1)
        if scale != 1:
            panel.mul_(scale)
        square = panel[: last - first]  # [B, B]
        square.copy_(square.tril() + square.tril(-1).t())
        lower[first:last, last:].copy_(panel[last - first :].t())


def check_state(lower: Tensor, sums: Tensor | None) -> None:
    """ValueError unless (lower, sums) is the state of a Hessian."""
    check_kind(OPERATOR, "lower", lower, SINGLE)
    if lower.dim() != 2 or lower.shape[0] != lower.shape[1]:
        raise ValueError(f"hessian: lower is {lower.dtype} {list(lower.shape)}; it must be square torch.float32")
    check_contiguous(OPERATOR, "lower", lower)
    if sums is None:
        return
    check_kind(OPERATOR, "sums", sums, SINGLE)
    if sums.shape != lower.shape[1:]:
        raise ValueError(
            f"hessian: sums is {sums.dtype} {list(sums.shape)}; "
            f"lower {list(lower.shape)} needs torch.float32 {list(lower.shape[1:])}"
        )
    check_contiguous(OPERATOR, "sums", sums)
    check_device(OPERATOR, "sums", sums, "lower", lower)


def check_finish(lower: Tensor, sums: Tensor | None, total: Tensor | None) -> None:
    """ValueError unless (lower, sums, total) is the state of a Hessian."""
    check_state(lower, sums)
    if total is not None:
        check_total(OPERATOR, total, "lower", lower)


def check_tensors(x: Tensor, lower: Tensor, sums: Tensor | None, weights: Tensor | None) -> None:
    """ValueError unless (lower, sums) is a state that the rows of x can be added to, with these weights."""
    check_rows(OPERATOR, "x", x)
    check_kind(OPERATOR, "x", x, FLOATS)
    check_state(lower, sums)
    if lower.shape[1:] != x.shape[-1:]:
        channels = x.shape[-1]
        raise ValueError(
            f"hessian: lower is {list(lower.shape)}; x {list(x.shape)} needs torch.float32 {[channels, channels]}"
        )
    check_device(OPERATOR, "lower", lower, "x", x)
    if weights is not None:
        check_weights(OPERATOR, weights, x)


@torch.library.custom_op(
    "pyprune::hessian_update",
    mutates_args=("lower", "sums"),
    schema="(Tensor x, Tensor(a!) lower, Tensor(b!)? sums, Tensor? weights=None) -> ()",
)
def hessian_update(x: Tensor, lower: Tensor, sums: Tensor | None, weights: Tensor | None = None) -> None:
    """lower += Σ w² x xᵀ where row ≥ column and sums += Σ w² x, on the backend that pyprune.ops.dispatch chooses.

    x: [..., channels] bfloat16, float16, float32 (float64: reference only), any strides.
    lower: float32 [channels, channels], contiguous, on x's device, changed in place; above the diagonal anything
    may be written. sums: float32 [channels], contiguous, changed in place, or None.
    weights: float32 [rows], any stride, the square roots w of the rows' weights w²; None: 1. The reference multiplies
    in float32; kernels round one factor, w² x, to the type of 16-bit rows, which is exact where w is a power of two
    (in float16 as long as |w² x| is at least 2⁻¹⁴ of the largest w²). A weight of 0 does not hide a NaN.
    Has no gradients, and autograd does not say so: x must not need any.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(x, lower, sums, weights)
    check_apart(OPERATOR, {"lower": lower, "sums": sums}, {"x": x, "weights": weights})
    if lower.is_cuda and lower.data_ptr() % 16 != 0:
        raise ValueError("hessian: lower does not start on a multiple of 16 bytes; it is a view into other memory")
    if x.numel() == 0:
        return
    rows = as_rows(x)
    weights = None if weights is None else weights.contiguous()
    choose_launch(HESSIAN, rows)(rows, lower, sums, weights)


@hessian_update.register_fake
def _(x: Tensor, lower: Tensor, sums: Tensor | None, weights: Tensor | None = None) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_tensors(x, lower, sums, weights)


@torch.library.custom_op(
    "pyprune::hessian_finish",
    mutates_args=("lower",),
    schema="(Tensor(a!) lower, Tensor? sums, SymInt count, float scale=1.0, Tensor? total=None) -> ()",
)
def hessian_finish(
    lower: Tensor, sums: Tensor | None, count: int, scale: float = 1.0, total: Tensor | None = None
) -> None:
    """Complete `lower` to the full symmetric matrix, centred where sums are given, times `scale`.

    lower: float32 [channels, channels], contiguous, changed in place. sums: float32 [channels] on its device, or
    None. count: rows, which the sums were taken over. total: float64 scalar on lower's device, Σ w² of rows with
    weights; None: count. Raises ValueError for arguments that do not fit each other.
    Plain PyTorch on every device: it moves each element once, once a matrix.
    """
    check_finish(lower, sums, total)
    check_apart(OPERATOR, {"lower": lower}, {"sums": sums, "total": total})
    if count < 0:
        raise ValueError(f"hessian: count is {count}; it is the number of rows in the state")
    hessian_finish_reference(lower, sums, count, scale, total)


@hessian_finish.register_fake
def _(lower: Tensor, sums: Tensor | None, count: int, scale: float = 1.0, total: Tensor | None = None) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_finish(lower, sums, total)


def on_sixteen_bytes(rows: Tensor) -> Tensor:
    """rows [T, C] with every row on an address that 16 divides, as the tensor memory accelerator reads them.

    Itself, or a copy where it is not so; C · element size must be divisible by 16.
    """
    row_bytes = rows.stride(0) * rows.element_size() if len(rows) > 1 else 0
    if rows.data_ptr() % 16 == 0 and row_bytes % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def padded_squares(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights as the core's kernel takes them: w² [rows, rounded up to PADDED_ROWS], 0 beyond the rows, and a factor.

    For float16 divided by the factor, float32 scalar, which makes them 1 at most; None for other types.
    """
    squares = torch.zeros(-(-len(weights) // PADDED_ROWS) * PADDED_ROWS, dtype=torch.float32, device=weights.device)
    divisor = divisor_of(weights) if dtype == torch.float16 else None
    torch.square(weights if divisor is None else weights / divisor, out=squares[: len(weights)])
    return squares, None if divisor is None else divisor.square()


def launch_cuda(rows: Tensor, lower: Tensor, sums: Tensor | None, weights: Tensor | None) -> None:
    core = required_core()
    multiprocessors = multiprocessors_of(rows.device)
    with torch.cuda.device(rows.device):
        rows = on_sixteen_bytes(rows)
        count, channels = rows.shape
        size = core.hessian_update_cuda_workspace(count, channels, multiprocessors)
        workspace = torch.empty(size, dtype=torch.uint8, device=rows.device)
        squares, factor = (None, None) if weights is None else padded_squares(weights, rows.dtype)
        core.hessian_update_cuda(
            rows.data_ptr(),
            dtype_name(rows.dtype),
            count,
            channels,
            # The stride of a single row has no meaning and may be anything.
            rows.stride(0) if count > 1 else channels,
            lower.data_ptr(),
            channels,
            0 if sums is None else sums.data_ptr(),
            workspace_ptr=workspace.data_ptr(),
            workspace_bytes=size,
            multiprocessors=multiprocessors,
            stream=torch.cuda.current_stream().cuda_stream,
            weights_ptr=address_of(squares),
            factor_ptr=address_of(factor),
        )


def launch_triton(rows: Tensor, lower: Tensor, sums: Tensor | None, weights: Tensor | None) -> None:
    from ..triton_kernels.hessian import configuration_for, hessian_triton

    properties = torch.cuda.get_device_properties(rows.device)
    capability = (properties.major, properties.minor)
    with torch.cuda.device(rows.device):
        if rows.shape[1] * rows.element_size() % 16 == 0:
            rows = on_sixteen_bytes(rows)
        configuration = configuration_for(capability, rows)
        hessian_triton(rows, lower, sums, configuration, properties.multi_processor_count, weights)


# Shape: [rows, channels]. On a CPU the reference is BLAS.
HESSIAN: Operator[Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]] = Operator(
    OPERATOR,
    versions={"Hessian": 2, "hessian_finish": 2, "hessian_update": 2, "lower_gram": 1},
    kernels={
        "cuda": Kernel(launch_cuda, (ON_NVIDIA_GPU, HALF_DTYPE, WIDTH_8, CORE_BUILT, CORE_WITH_CUDA, CORE_WITH_WGMMA)),
        "triton": Kernel(launch_triton, (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, SIZES_FIT_INT32, *TRITON)),
        "reference": Kernel(hessian_update_reference),
    },
)
