"""The middle of a gated FFN (Shazeer 2020), gate ← silu(gate) · up, in place, in one pass.

The operator is `pyprune::swiglu_`; `swiglu_reference` says in plain PyTorch what it computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, check_apart, check_kind
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .requirements import AMPERE_OR_LATER, KERNEL_DTYPE, ON_NVIDIA_GPU, TRITON

OPERATOR = "swiglu"


def swiglu_reference(gate: Tensor, up: Tensor) -> None:
    """gate ← silu(gate) · up; silu and the product are each rounded to gate's type."""
    gate.copy_(torch.nn.functional.silu(gate) * up)


@torch.library.custom_op("pyprune::swiglu_", mutates_args=("gate",), schema="(Tensor(a!) gate, Tensor up) -> ()")
def swiglu_(gate: Tensor, up: Tensor) -> None:
    """gate ← silu(gate) · up on the backend that pyprune.ops.dispatch chooses.

    gate, up: of one shape, type and device, bfloat16, float16, float32 (float64: reference only), any strides; gate is
    changed in place. Has no gradients, and autograd does not say so: neither may need any. Nothing waits for a GPU.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(gate, up)
    check_apart(OPERATOR, {"gate": gate}, {"up": up})
    if gate.numel() == 0:
        return
    together = gate.is_contiguous() and up.is_contiguous()
    launch = choose_launch(SWIGLU, gate) if together else swiglu_reference
    launch(gate, up)


@swiglu_.register_fake
def _(gate: Tensor, up: Tensor) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_tensors(gate, up)


def check_tensors(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"swiglu: gate is {gate.dtype} {list(gate.shape)} on {gate.device}, "
            f"up {up.dtype} {list(up.shape)} on {up.device}; they need to be alike"
        )
    check_kind(OPERATOR, "gate", gate, FLOATS)
    check_kind(OPERATOR, "up", up, FLOATS)


def launch_triton(gate: Tensor, up: Tensor) -> None:
    from ..triton_kernels.swiglu import swiglu_triton

    with torch.cuda.device(gate.device):
        swiglu_triton(gate, up)


# Shape: that of the gate
SWIGLU = Operator(
    OPERATOR,
    versions={"swiglu_": 1},
    kernels={
        "triton": Kernel(launch_triton, (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, *TRITON)),
        "reference": Kernel(swiglu_reference),
    },
)
