"""Replace RMSNorm, rotary embedding and SwiGLU of a decoder layer by fused kernels on a GPU.

In transformers' modules these are a dozen passes over the activations in PyTorch, a fifth of a layer's time at 13 B.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..architectures import FFN, Family
from ..architectures.declaration import HALVES, RMS, Gated
from ..ops import dispatch as backends
from ..ops import rms_norm, rotate_, swiglu_

OPERATORS = ("rms_norm", "rotary", "swiglu")


class FusedRMSNorm(nn.Module):
    """A family's RMSNorm, by the operator `rms_norm`."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps)


class FusedMLP(nn.Module):
    """A family's gated FFN with silu, by the operator `swiglu_`; the linears are the family's own."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        middle = self.gate_proj(x)
        swiglu_(middle, self.up_proj(x))
        return self.down_proj(middle)


def runs_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the backend table has kernels for all of them here; on a CPU transformers' own code runs."""
    if device.type != "cuda":
        return False
    sample = torch.empty(1, 1, 1, 8, device=device, dtype=dtype)
    return all(backends.choose_backend(operator, sample) != "reference" for operator in OPERATORS)


def fuse(block: nn.Module, family: Family, activation: str) -> None:
    """Put FusedRMSNorm in the place of every RMSNorm of the layer, FusedMLP in that of its FFN; names and weights stay.

    activation: the FFN's, as the configuration names it; with another one than silu the FFN stays as it is.
    """
    own = family.norm_class if family.norm == RMS else ()
    norms = [(name, module) for name, module in block.named_modules() if own and type(module) is own]
    for name, module in norms:
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, FusedRMSNorm(module.weight, module.variance_epsilon))
    if activation in ("silu", "swish") and isinstance(family.ffn, Gated) and not family.ffn.fused:
        linears = (block.get_submodule(name) for name in (*family.ffn.inputs, family.output_proj(FFN)))
        setattr(block, family.output_proj(FFN).split(".")[0], FusedMLP(*linears))


@contextmanager
def fused_rotary(family: Family) -> Iterator[None]:
    """Let the family's attention rotate queries and keys by the operator `rotate_`, in place, where it turns halves."""
    if family.rotary != HALVES:
        yield
        return
    source = family.source()
    original = source.apply_rotary_pos_emb

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1:
            return original(q, k, cos, sin, unsqueeze_dim)
        rotate_(q, cos, sin)
        rotate_(k, cos, sin)
        return q, k

    source.apply_rotary_pos_emb = apply
    try:
        yield
    finally:
        source.apply_rotary_pos_emb = original
