"""Rotary position embedding (Su et al. 2021) of queries or keys, in place, in one pass.

The operator is `pyprune::rotate_`; `rotate_reference` says in plain PyTorch what it computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import FLOATS, check_alike, check_apart, check_kind
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .requirements import AMPERE_OR_LATER, KERNEL_DTYPE, ON_NVIDIA_GPU, TRITON

OPERATOR = "rotary"


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> None:
    """x ← x cos + (−second half, first half of x) sin, in place; each product and their sum rounded to x's type.

    neighbours: channels 2i and 2i + 1 turn together, by the angles that cos and sin have at i.
    """
    if neighbours:
        half = x.shape[-1] // 2
        cos, sin = (angles[..., :half].repeat_interleave(2, dim=-1) for angles in (cos, sin))
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    x.copy_(x * cos.unsqueeze(1) + turned * sin.unsqueeze(1))


@torch.library.custom_op(
    "pyprune::rotate_",
    mutates_args=("x",),
    schema="(Tensor(a!) x, Tensor cos, Tensor sin, bool neighbours=False) -> ()",
)
def rotate_(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> None:
    """Turn every head by its token's angles, on the backend that pyprune.ops.dispatch chooses.

    x: [batch, heads, tokens, head_dim] bfloat16, float16, float32 (float64: reference only), any strides that do not
    overlap, changed in place. cos, sin: [1 or batch, tokens, head_dim], of x's type and device. The halves of a head
    are the two coordinates (Llama's order); neighbours: channels 2i and 2i + 1 are, and cos and sin are read at i
    (GLM's order). A view of the first channels of each head turns a part of it. Has no gradients, and autograd does not
    say so: x must not need any. Nothing waits for a GPU.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(x, cos, sin)
    check_apart(OPERATOR, {"x": x}, {"cos": cos, "sin": sin})
    if x.numel() == 0:
        return
    # The kernel reads along heads.
    launch = choose_launch(ROTARY, x) if x.stride(-1) == 1 else rotate_reference
    launch(x, cos, sin, neighbours)


@rotate_.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_tensors(x, cos, sin)


def check_tensors(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"rotary: x is {list(x.shape)}; it needs [batch, heads, tokens, an even head_dim]")
    check_kind(OPERATOR, "x", x, FLOATS)
    batch, _, tokens, head_dim = x.shape
    for name, angles in (("cos", cos), ("sin", sin)):
        if tuple(angles.shape) not in ((1, tokens, head_dim), (batch, tokens, head_dim)):  # sizes may be symbolic
            raise ValueError(f"rotary: {name} is {list(angles.shape)}; x {list(x.shape)} needs one row a token")
        check_alike(OPERATOR, name, angles, "x", x)
    if cos.shape != sin.shape:
        raise ValueError(f"rotary: cos is {list(cos.shape)}, sin {list(sin.shape)}")


def launch_triton(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> None:
    from ..triton_kernels.rotary import rotate_triton

    with torch.cuda.device(x.device):
        rotate_triton(x, cos.contiguous(), sin.contiguous(), neighbours)


# Shape: [batch, heads, tokens, head_dim]
ROTARY: Operator[Callable[[Tensor, Tensor, Tensor, bool], None]] = Operator(
    OPERATOR,
    versions={"rotate_": 2},
    kernels={
        "triton": Kernel(launch_triton, (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, *TRITON)),
        "reference": Kernel(rotate_reference),
    },
)
