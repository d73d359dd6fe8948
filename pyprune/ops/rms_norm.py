"""RMSNorm of rows (Zhang & Sennrich 2019), as the decoder layers of Llama or of Gemma have it, in one pass.

The operator is `pyprune::rms_norm`; `rms_norm_reference` says in plain PyTorch what it computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import FLOATS, check_device, check_kind
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .requirements import AMPERE_OR_LATER, KERNEL_DTYPE, ON_NVIDIA_GPU, ROW_IN_REGISTERS, TRITON

OPERATOR = "rms_norm"


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """weight · (x / √(mean x² + eps)) over the last dimension, in float32 or wider, rounded to x's type between.

    plus_one: (1 + weight) · (x / √(mean x² + eps)), rounded once, to x's type.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if plus_one:
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


@torch.library.custom_op(
    "pyprune::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, float eps, bool plus_one=False) -> Tensor",
)
def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """RMSNorm on the backend that pyprune.ops.dispatch chooses.

    x: [..., channels] bfloat16, float16, float32 (float64: reference only); weight: [channels], a floating type, on x's
    device. plus_one: the factor is 1 + weight, as Gemma's. Returns x's shape, contiguous, in the promoted type of
    both, with plus_one in x's. Has no gradients; `rms_norm_gather` has.
    Nothing waits for a GPU.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(x, weight)
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=result_type(x, weight, plus_one))
    rows = x.reshape(-1, x.shape[-1])
    return choose_launch(RMS_NORM, rows)(rows, weight, eps, plus_one).contiguous().view(x.shape)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    check_tensors(x, weight)
    return x.new_empty(x.shape, dtype=result_type(x, weight, plus_one))


def result_type(x: Tensor, weight: Tensor, plus_one: bool) -> torch.dtype:
    return x.dtype if plus_one else torch.promote_types(x.dtype, weight.dtype)


def check_tensors(x: Tensor, weight: Tensor, name: str = "x") -> None:
    """`name`: what the operator calls x."""
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms norm: the weight is {list(weight.shape)}; {name} {list(x.shape)} needs one of its last size"
        )
    check_kind("rms norm", name, x, FLOATS)
    check_kind("rms norm", "the weight", weight, FLOATS)
    check_device("rms norm", name, x, "the weight", weight)


def launch_triton(rows: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    from ..triton_kernels.rms_norm import rms_norm_triton

    with torch.cuda.device(rows.device):
        return rms_norm_triton(rows.contiguous(), weight.contiguous(), eps, plus_one)


# Shape: [rows, channels]
RMS_NORM: Operator[Callable[[Tensor, Tensor, float, bool], Tensor]] = Operator(
    OPERATOR,
    versions={"rms_norm": 2},
    kernels={
        "triton": Kernel(launch_triton, (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, ROW_IN_REGISTERS, *TRITON)),
        "reference": Kernel(rms_norm_reference),
    },
)
