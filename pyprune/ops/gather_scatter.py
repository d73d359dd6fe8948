"""Selections of the residual stream (DISP-LLM, arXiv 2410.11988): a block reads some of its channels, adds to others.

Three operators: `pyprune::rms_norm_gather`, `pyprune::scatter_add_` and, as one pass over the residual stream,
`pyprune::scatter_add_rms_norm_gather_`, a block's end and the next one's beginning. The functions `*_reference` say in
plain PyTorch what they compute.

index, of all of them: [n] int32 or int64, contiguous or not, 1 ≤ n ≤ channels, on the device of the others, ascending
and without duplicates, every value in [0, channels). The values are not looked at: reading them would wait for the GPU,
and what they must be is the caller's to ensure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, INDICES, check_apart, check_device, check_kind
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .requirements import AMPERE_OR_LATER, KERNEL_DTYPE, ON_NVIDIA_GPU, ROW_IN_REGISTERS, TRITON
from .rms_norm import check_tensors, rms_norm_reference

NAME = "selection"  # in messages


def rms_norm_gather_reference(x: Tensor, weight: Tensor, eps: float, index: Tensor) -> Tensor:
    """Channels `index` of the RMSNorm of whole rows."""
    return rms_norm_reference(x, weight, eps).index_select(-1, index)


def scatter_add_reference(residual: Tensor, update: Tensor, index: Tensor) -> None:
    """residual[..., index] ← residual[..., index] + update, each sum rounded to residual's type."""
    residual.index_add_(-1, index, update)


def scatter_add_rms_norm_gather_reference(
    residual: Tensor, update: Tensor, update_index: Tensor, weight: Tensor, eps: float, index: Tensor
) -> Tensor:
    """scatter_add_, and rms_norm_gather of the residual stream that it leaves."""
    scatter_add_reference(residual, update, update_index)
    return rms_norm_gather_reference(residual, weight, eps, index)


@torch.library.custom_op(
    "pyprune::rms_norm_gather", mutates_args=(), schema="(Tensor x, Tensor weight, float eps, Tensor index) -> Tensor"
)
def rms_norm_gather(x: Tensor, weight: Tensor, eps: float, index: Tensor) -> Tensor:
    """Channels `index` of the RMSNorm of x over its last dimension, on the backend that pyprune.ops.dispatch chooses.

    x: [..., channels] bfloat16, float16, float32 (float64: reference only), any strides; weight: [channels], a floating
    type, on x's device; index: [n], see the file's head. Returns [..., n], contiguous, in the promoted type of x and
    weight, with the rounding of `rms_norm`. Has gradients for x and weight. Nothing waits for a GPU.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(x, weight)
    check_index(x, index)
    if x.numel() == 0:
        return empty_selection(x, weight, index)
    return choose_launch(RMS_NORM_GATHER, x)(x, weight, eps, index)


@rms_norm_gather.register_fake
def _(x: Tensor, weight: Tensor, eps: float, index: Tensor) -> Tensor:
    check_tensors(x, weight)
    check_index(x, index)
    return empty_selection(x, weight, index)


def keep_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, index = inputs
    ctx.save_for_backward(x, weight, index)


def rms_norm_gather_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    """Gradients of x and weight in plain PyTorch, float32 or wider; the roundings count as the identity.

    With s = 1 / √(mean x² + eps), n = s x and g the gradient of n, 0 at channels that are not selected:
    the gradient of x is s (g − n mean(g n)).
    """
    x, weight, index = ctx.saved_tensors
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    wide = x.to(gradient.dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
    normed = wide * scale
    of_x = of_weight = None
    if ctx.needs_input_grad[0]:
        of_normed = torch.zeros_like(wide).index_add(-1, index, gradient * weight.index_select(0, index))
        of_x = (scale * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))).to(x.dtype)
    if ctx.needs_input_grad[1]:
        products = gradient * normed.to(x.dtype).index_select(-1, index)  # [..., n]
        summed = products.reshape(-1, index.shape[0]).sum(0).to(weight.dtype)
        of_weight = torch.zeros_like(weight).index_add(0, index, summed)
    return of_x, of_weight, None, None


rms_norm_gather.register_autograd(rms_norm_gather_gradients, setup_context=keep_for_gradients)


@torch.library.custom_op(
    "pyprune::scatter_add_",
    mutates_args=("residual",),
    schema="(Tensor(a!) residual, Tensor update, Tensor index) -> ()",
)
def scatter_add_(residual: Tensor, update: Tensor, index: Tensor) -> None:
    """residual[..., index] ← residual[..., index] + update on the backend that pyprune.ops.dispatch chooses.

    residual: [..., channels] bfloat16, float16, float32 (float64: reference only), any strides that do not overlap,
    changed in place (not contiguous: by the reference); update: [..., n] of its type and device, any strides, in memory
    of its own; index: [n], see the file's head. Each channel is added to once, so that the result is deterministic.
    Has no gradients, and autograd does not say so: neither may need any. Nothing waits for a GPU.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_update(residual, update, index)
    check_apart(NAME, {"residual": residual}, {"update": update, "index": index})
    if residual.numel() == 0:
        return
    launch = choose_launch(SCATTER_ADD, residual) if residual.is_contiguous() else scatter_add_reference
    launch(residual, update, index)


@scatter_add_.register_fake
def _(residual: Tensor, update: Tensor, index: Tensor) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_update(residual, update, index)


@torch.library.custom_op(
    "pyprune::scatter_add_rms_norm_gather_",
    mutates_args=("residual",),
    schema=(
        "(Tensor(a!) residual, Tensor update, Tensor update_index, Tensor weight, float eps, Tensor index) -> Tensor"
    ),
)
def scatter_add_rms_norm_gather_(
    residual: Tensor, update: Tensor, update_index: Tensor, weight: Tensor, eps: float, index: Tensor
) -> Tensor:
    """scatter_add_(residual, update, update_index), then rms_norm_gather(residual, weight, eps, index), in one pass.

    Arguments, result and errors as theirs; the sums are rounded to residual's type before the norm reads them. The two
    selections are independent of each other. No gradients. Nothing waits for a GPU.
    """
    check_both(residual, update, update_index, weight, index)
    others = {"update": update, "update_index": update_index, "weight": weight, "index": index}
    check_apart(NAME, {"residual": residual}, others)
    if residual.numel() == 0:
        return empty_selection(residual, weight, index)
    launch = scatter_add_rms_norm_gather_reference
    if residual.is_contiguous():
        launch = choose_launch(SCATTER_ADD_RMS_NORM_GATHER, residual)
    return launch(residual, update, update_index, weight, eps, index)


@scatter_add_rms_norm_gather_.register_fake
def _(residual: Tensor, update: Tensor, update_index: Tensor, weight: Tensor, eps: float, index: Tensor) -> Tensor:
    check_both(residual, update, update_index, weight, index)
    return empty_selection(residual, weight, index)


def empty_selection(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.new_empty((*x.shape[:-1], index.shape[0]), dtype=dtype)


def check_index(x: Tensor, index: Tensor, name: str = "index", of: str = "x") -> None:
    """Check an index against x's last dimension. `name`, `of`: the operator's names of index and x."""
    check_kind(NAME, f"the {name}", index, INDICES)
    if index.dim() != 1 or not 1 <= index.shape[0] <= x.shape[-1]:
        raise ValueError(
            f"selection: the {name} is {list(index.shape)}; of {x.shape[-1]} channels it needs one dimension, "
            "of 1 to all of them"
        )
    check_device(NAME, f"the {name}", index, of, x)


def check_both(residual: Tensor, update: Tensor, update_index: Tensor, weight: Tensor, index: Tensor) -> None:
    check_update(residual, update, update_index, "update_index")
    check_tensors(residual, weight, "residual")
    check_index(residual, index, of="residual")


def check_update(residual: Tensor, update: Tensor, index: Tensor, name: str = "index") -> None:
    """`name`: what the operator calls the update's index."""
    if residual.dim() == 0 or residual.dtype not in FLOATS.dtypes:
        raise ValueError(
            f"selection: the residual stream is {residual.dtype} {list(residual.shape)}; "
            "it needs a floating type and a dimension of channels"
        )
    check_index(residual, index, name, "residual")
    if update.shape != (*residual.shape[:-1], index.shape[0]):
        raise ValueError(
            f"selection: the update is {list(update.shape)}; the {index.shape[0]} channels of the residual stream "
            f"{list(residual.shape)} in {name} need one value each"
        )
    if update.dtype != residual.dtype or update.device != residual.device:
        raise ValueError(
            f"selection: the residual stream is {residual.dtype} on {residual.device}, "
            f"the update {update.dtype} on {update.device}"
        )
    check_kind(NAME, "residual", residual, FLOATS)
    check_kind(NAME, "update", update, FLOATS)


def launch_rms_norm_gather(x: Tensor, weight: Tensor, eps: float, index: Tensor) -> Tensor:
    from ..triton_kernels.selection import rms_norm_gather_triton

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device(x.device):
        selected = rms_norm_gather_triton(rows, weight.contiguous(), eps, index.contiguous())
    return selected.view(*x.shape[:-1], len(index))


def launch_scatter_add(residual: Tensor, update: Tensor, index: Tensor) -> None:
    from ..triton_kernels.selection import scatter_add_triton

    rows = residual.view(-1, residual.shape[-1])
    with torch.cuda.device(residual.device):
        scatter_add_triton(rows, update.contiguous(), index.contiguous())


def launch_scatter_add_rms_norm_gather(
    residual: Tensor, update: Tensor, update_index: Tensor, weight: Tensor, eps: float, index: Tensor
) -> Tensor:
    from ..triton_kernels.selection import scatter_add_rms_norm_gather_triton

    rows = residual.view(-1, residual.shape[-1])
    with torch.cuda.device(residual.device):
        selected = scatter_add_rms_norm_gather_triton(
            rows, update.contiguous(), update_index.contiguous(), weight.contiguous(), eps, index.contiguous()
        )
    return selected.view(*residual.shape[:-1], len(index))


# Shape of all three: [..., channels]
BY_TRITON = (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, ROW_IN_REGISTERS, *TRITON)
RMS_NORM_GATHER = Operator(
    "rms_norm_gather",
    versions={"rms_norm_gather": 1},
    kernels={
        "triton": Kernel(launch_rms_norm_gather, BY_TRITON),
        "reference": Kernel(rms_norm_gather_reference),
    },
)
SCATTER_ADD = Operator(
    "scatter_add",
    versions={"scatter_add_": 1},
    kernels={"triton": Kernel(launch_scatter_add, BY_TRITON), "reference": Kernel(scatter_add_reference)},
)
SCATTER_ADD_RMS_NORM_GATHER = Operator(
    "scatter_add_rms_norm_gather",
    versions={"scatter_add_rms_norm_gather_": 1},
    kernels={
        "triton": Kernel(launch_scatter_add_rms_norm_gather, BY_TRITON),
        "reference": Kernel(scatter_add_rms_norm_gather_reference),
    },
)
