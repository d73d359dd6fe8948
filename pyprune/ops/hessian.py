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
from .moments import as_rows, multiprocessors_of, row_count
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
from .split_tf32 import has_fast_tf32, split_gram

OPERATOR = "hessian"

# Rows that the reference converts and adds at a time: 90 MB in float32 at 11008 channels, no copy of a large input.
REFERENCE_CHUNK_ROWS = 2048
# Columns of the lower triangle that one product of the reference covers. A block computes half a square too much,
# REFERENCE_BLOCK / channels of the whole; narrower ones run slower in BLAS.
REFERENCE_BLOCK = 512
# Columns that are mirrored at a time: 4 MiB of temporary memory, and 28 steps at 28672 channels.
MIRROR_BLOCK = 1024
# Channels from which WᵀW of float32 weights is summed from split products on tensor cores, where these are fast, and
# columns at a time.
SPLIT_FROM, SPLIT_WIDTH = 4096, 2048


@dataclass
class Hessian:
    """Second moments of the rows seen so far.

    count: rows. lower: [channels, channels] float32, the lower triangle (diagonal included) of Σ x xᵀ; what lies
    above the diagonal is unspecified until `finish`. sums: [channels] float32, Σ x, or None.
    """

    count: int
    lower: Tensor
    sums: Tensor | None

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str | None = None, sums: bool = False) -> Hessian:
        """The moments of no rows; `sums`: whether Σ x is kept too, which `finish(centred=True)` needs."""
        lower = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        return cls(0, lower, torch.zeros(channels, dtype=torch.float32, device=device) if sums else None)

    def update(self, x: Tensor) -> None:
        """Add the rows of x [..., channels]: bfloat16, float16, float32, or float64 (by the reference only).

        Everything but the last dimension counts as rows; an x without rows changes nothing. Raises ValueError
        when x does not fit the state. Gradients are not tracked.
        """
        hessian_update(x.detach(), self.lower, self.sums)
        self.count += row_count(x)

    def finish(self, centred: bool = False, scale: float = 1.0) -> Tensor:
        """H in full, symmetric, float32 [channels, channels]: `lower` itself, completed in place.

        centred: C = H − count·m mᵀ = Σ (x − m)(x − m)ᵀ with the mean m instead; the state then holds C and takes
        no more rows. scale: a factor, as 2 / N of SparseGPT and SlimGPT. Raises ValueError where centring needs sums
        that were not kept. No rows give zeros.
        """
        if centred and self.sums is None:
            raise ValueError("hessian: a centred matrix needs the sums; start with Hessian.zeros(..., sums=True)")
        hessian_finish(self.lower, self.sums if centred else None, self.count, scale)
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


def hessian_update_reference(x: Tensor, lower: Tensor, sums: Tensor | None = None) -> None:
    """lower += xᵀx where row ≥ column, sums += Σ x, in plain PyTorch: any device and floating-point dtype.

    x: [..., channels]. lower: float32 [channels, channels]; sums: float32 [channels] or None; changed in place.
    Chunks of rows are converted to float32 and multiplied block column by block column, from the diagonal down.
    float64 is multiplied in float64 and rounded once.
    """
    rows = as_rows(x)  # [T, C]
    if rows.numel() == 0:
        return
    working = torch.promote_types(x.dtype, torch.float32)
    for chunk in rows.split(len(rows) if working == torch.float64 else REFERENCE_CHUNK_ROWS):
        values = chunk.to(working)  # [t, C]
        for first in range(0, rows.shape[1], REFERENCE_BLOCK):
            left, right = values[:, first:], values[:, first : first + REFERENCE_BLOCK]  # [t, C − first], [t, B]
            below = lower[first:, first : first + REFERENCE_BLOCK]  # [C − first, B]
            if working == lower.dtype:
                below.addmm_(left.t(), right)
            else:
                below.add_(left.t() @ right)
        if sums is not None:
            sums.add_(values.sum(0))


def hessian_finish_reference(lower: Tensor, sums: Tensor | None, count: int, scale: float = 1.0) -> None:
    """Copy the lower triangle of `lower`, times `scale`, onto the upper one, in place, any device.

    lower: float32 [channels, channels]; nothing above its diagonal is read. sums: float32 [channels], Σ x over
    `count` rows: subtract sums sumsᵀ / count as well; None: do not.
    """
    channels = len(lower)
    means = None if sums is None or count == 0 else sums / count  # [C]
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


def check_tensors(x: Tensor, lower: Tensor, sums: Tensor | None) -> None:
    """ValueError unless (lower, sums) is a state that the rows of x can be added to."""
    check_rows(OPERATOR, "x", x)
    check_kind(OPERATOR, "x", x, FLOATS)
    check_state(lower, sums)
    if lower.shape[1:] != x.shape[-1:]:
        channels = x.shape[-1]
        raise ValueError(
            f"hessian: lower is {list(lower.shape)}; x {list(x.shape)} needs torch.float32 {[channels, channels]}"
        )
    check_device(OPERATOR, "lower", lower, "x", x)


@torch.library.custom_op(
    "pyprune::hessian_update",
    mutates_args=("lower", "sums"),
    schema="(Tensor x, Tensor(a!) lower, Tensor(b!)? sums) -> ()",
)
def hessian_update(x: Tensor, lower: Tensor, sums: Tensor | None) -> None:
    """lower += xᵀx where row ≥ column and sums += Σ x, on the backend that pyprune.ops.dispatch chooses.

    x: [..., channels] bfloat16, float16, float32 (float64: reference only), any strides.
    lower: float32 [channels, channels], contiguous, on x's device, changed in place; above the diagonal anything
    may be written. sums: float32 [channels], contiguous, changed in place, or None.
    Has no gradients, and autograd does not say so: x must not need any.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(x, lower, sums)
    check_apart(OPERATOR, {"lower": lower, "sums": sums}, {"x": x})
    if lower.is_cuda and lower.data_ptr() % 16 != 0:
        raise ValueError("hessian: lower does not start on a multiple of 16 bytes; it is a view into other memory")
    if x.numel() == 0:
        return
    rows = as_rows(x)
    choose_launch(HESSIAN, rows)(rows, lower, sums)


@hessian_update.register_fake
def _(x: Tensor, lower: Tensor, sums: Tensor | None) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_tensors(x, lower, sums)


@torch.library.custom_op(
    "pyprune::hessian_finish",
    mutates_args=("lower",),
    schema="(Tensor(a!) lower, Tensor? sums, SymInt count, float scale=1.0) -> ()",
)
def hessian_finish(lower: Tensor, sums: Tensor | None, count: int, scale: float = 1.0) -> None:
    """Complete `lower` to the full symmetric matrix, centred where sums are given, times `scale`.

    lower: float32 [channels, channels], contiguous, changed in place. sums: float32 [channels] on its device, or
    None. count: rows, which the sums were taken over. Raises ValueError for arguments that do not fit each other.
    Plain PyTorch on every device: it moves each element once, once a matrix.
    """
    check_state(lower, sums)
    check_apart(OPERATOR, {"lower": lower}, {"sums": sums})
    if count < 0:
        raise ValueError(f"hessian: count is {count}; it is the number of rows in the state")
    hessian_finish_reference(lower, sums, count, scale)


@hessian_finish.register_fake
def _(lower: Tensor, sums: Tensor | None, count: int, scale: float = 1.0) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_state(lower, sums)


def on_sixteen_bytes(rows: Tensor) -> Tensor:
    """rows [T, C] with every row on an address that 16 divides, as the tensor memory accelerator reads them.

    Itself, or a copy where it is not so; C · element size must be divisible by 16.
    """
    row_bytes = rows.stride(0) * rows.element_size() if len(rows) > 1 else 0
    if rows.data_ptr() % 16 == 0 and row_bytes % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def launch_cuda(rows: Tensor, lower: Tensor, sums: Tensor | None) -> None:
    core = required_core()
    multiprocessors = multiprocessors_of(rows.device)
    with torch.cuda.device(rows.device):
        rows = on_sixteen_bytes(rows)
        count, channels = rows.shape
        size = core.hessian_update_cuda_workspace(count, channels, multiprocessors)
        workspace = torch.empty(size, dtype=torch.uint8, device=rows.device)
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
        )


def launch_triton(rows: Tensor, lower: Tensor, sums: Tensor | None) -> None:
    from ..triton_kernels.hessian import configuration_for, hessian_triton

    properties = torch.cuda.get_device_properties(rows.device)
    capability = (properties.major, properties.minor)
    with torch.cuda.device(rows.device):
        if rows.shape[1] * rows.element_size() % 16 == 0:
            rows = on_sixteen_bytes(rows)
        configuration = configuration_for(capability, rows)
        hessian_triton(rows, lower, sums, configuration, properties.multi_processor_count)


# Shape: [rows, channels]. On a CPU the reference is BLAS.
HESSIAN: Operator[Callable[[Tensor, Tensor, Tensor | None], None]] = Operator(
    OPERATOR,
    versions={"Hessian": 1, "hessian_finish": 1, "hessian_update": 1, "lower_gram": 1},
    kernels={
        "cuda": Kernel(launch_cuda, (ON_NVIDIA_GPU, HALF_DTYPE, WIDTH_8, CORE_BUILT, CORE_WITH_CUDA, CORE_WITH_WGMMA)),
        "triton": Kernel(launch_triton, (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, SIZES_FIT_INT32, *TRITON)),
        "reference": Kernel(hessian_update_reference),
    },
)
