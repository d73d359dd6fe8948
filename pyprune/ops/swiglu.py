"""The middle of a gated FFN (Shazeer 2020), gate ← f(gate) · up with silu or gelu as f, in place, in one pass.

The operator is `pyprune::swiglu_`; `swiglu_reference` says in plain PyTorch what it computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import FLOATS, check_apart, check_kind
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .requirements import AMPERE_OR_LATER, KERNEL_DTYPE, ON_NVIDIA_GPU, TRITON

OPERATOR = "swiglu"
SILU, GELU_TANH = "silu", "gelu_tanh"
ACTIVATIONS = (SILU, GELU_TANH)


def swiglu_reference(gate: Tensor, up: Tensor, activation: str = SILU) -> None:
    """gate ← f(gate) · up; f and the product are each rounded to gate's type.

    activation: silu, x / (1 + e^−x), or gelu_tanh, x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))) (Hendrycks & Gimpel).
    """
    if activation == SILU:
        gate.copy_(torch.nn.functional.silu(gate) * up)
    else:
        gate.copy_(torch.nn.functional.gelu(gate, approximate="tanh") * up)


@torch.library.custom_op(
    "pyprune::swiglu_", mutates_args=("gate",), schema='(Tensor(a!) gate, Tensor up, str activation="silu") -> ()'
)
def swiglu_(gate: Tensor, up: Tensor, activation: str = SILU) -> None:
    """gate ← f(gate) · up on the backend that pyprune.ops.dispatch chooses; activation: f, silu or gelu_tanh.

    gate, up: of one shape, type and device, bfloat16, float16, float32 (float64: reference only), any strides; gate is
    changed in place. Has no gradients, and autograd does not say so: neither may need any. Nothing waits for a GPU.
    Raises ValueError for arguments that do not fit each other, InputError as choose_backend does.
    """
    check_tensors(gate, up, activation)
    if gate.numel() == 0:
        return
    if not are_halves(gate, up):
        check_apart(OPERATOR, {"gate": gate}, {"up": up})
    rows = as_matrices(gate, up)
    if rows is None:
        swiglu_reference(gate, up, activation)
    else:
        choose_launch(SWIGLU, rows[0])(*rows, activation)


def are_halves(gate: Tensor, up: Tensor) -> bool:
    """Whether both are columns of one matrix, one beside the other: they share memory's range, and no element."""
    width = gate.shape[-1] if gate.dim() else 0
    return (
        gate.dim() > 1
        and gate.stride() == up.stride()
        and gate.stride(-1) == 1
        and gate.stride(-2) >= 2 * width
        and gate.storage_offset() - up.storage_offset() in (width, -width)
    )


def as_matrices(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """Views [rows, channels] with neighbouring channels, one row where both are contiguous. None: there are none."""
    if gate.is_contiguous() and up.is_contiguous():
        return gate.view(1, -1), up.view(1, -1)
    if gate.dim() < 2 or gate.stride(-1) != 1 or up.stride(-1) != 1:
        return None
    try:
        return gate.view(-1, gate.shape[-1]), up.view(-1, gate.shape[-1])
    except RuntimeError:  # the leading dimensions do not flatten
        return None


@swiglu_.register_fake
def _(gate: Tensor, up: Tensor, activation: str = SILU) -> None:
    """Check the arguments while tracing. Nothing is returned: the schema says what changes."""
    check_tensors(gate, up, activation)


def check_tensors(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"swiglu: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"swiglu: gate is {gate.dtype} {list(gate.shape)} on {gate.device}, "
            f"up {up.dtype} {list(up.shape)} on {up.device}; they need to be alike"
        )
    check_kind(OPERATOR, "gate", gate, FLOATS)
    check_kind(OPERATOR, "up", up, FLOATS)


def launch_triton(gate: Tensor, up: Tensor, activation: str) -> None:
    from ..triton_kernels.swiglu import swiglu_triton

    with torch.cuda.device(gate.device):
        swiglu_triton(gate, up, activation == GELU_TANH)


# Shape: [rows, channels], of a contiguous gate one row
SWIGLU: Operator[Callable[[Tensor, Tensor, str], None]] = Operator(
    OPERATOR,
    versions={"swiglu_": 2},
    kernels={
        "triton": Kernel(launch_triton, (ON_NVIDIA_GPU, KERNEL_DTYPE, AMPERE_OR_LATER, *TRITON)),
        "reference": Kernel(swiglu_reference),
    },
)
