"""Replace RMSNorm, rotary embedding and the gated FFN's middle of a decoder layer by fused kernels on a GPU.

In transformers' modules these are a dozen passes over the activations in PyTorch, a fifth of a layer's time at 13 B.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import Family
from ..architectures.declaration import HALVES, NEIGHBOURS, OTHER_ROTARY, RMS, RMS_PLUS_ONE, Gated
from ..ops import dispatch as backends
from ..ops import rms_norm, rotate_, swiglu_
from ..ops.swiglu import GELU_TANH, SILU
from .token_weights import norm_epsilon

OPERATORS = ("rms_norm", "rotary", "swiglu")


# The configuration's names of activations that `swiglu_` has.
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH}


class FusedRMSNorm(nn.Module):
    """A family's RMSNorm, by the operator `rms_norm`; plus_one: times 1 + weight."""

    def __init__(self, weight: nn.Parameter, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one = weight, eps, plus_one

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps, self.plus_one)


class FusedFFN(nn.Module):
    """A family's gated FFN, by the operator `swiglu_`; the linears are the family's own, under their own names."""

    def __init__(self, linears: dict[str, nn.Module], ffn: Gated, activation: str) -> None:
        super().__init__()
        for name, linear in linears.items():
            setattr(self, name, linear)
        self.inputs = [name.rpartition(".")[2] for name in ffn.inputs]
        self.output, self.activation = ffn.output.rpartition(".")[2], activation

    def forward(self, x: Tensor) -> Tensor:
        read = [getattr(self, name)(x) for name in self.inputs]
        gate, up = read[0].chunk(2, dim=-1) if len(read) == 1 else read
        swiglu_(gate, up, self.activation)
        result: Tensor = getattr(self, self.output)(gate)
        return result


def runs_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the backend table has kernels for all of them here; on a CPU transformers' own code runs."""
    if device.type != "cuda":
        return False
    sample = torch.empty(1, 1, 1, 8, device=device, dtype=dtype)
    return all(backends.choose_backend(operator, sample) != "reference" for operator in OPERATORS)


def activation_of(config: Any) -> str:
    """The FFN's activation, as the configuration names it."""
    return str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", ""))


def unfused(family: Family, config: Any) -> list[str]:
    """What of a family's layers no kernel computes, in words."""
    parts = []
    if family.norm not in (RMS, RMS_PLUS_ONE):
        parts.append("norms")
    if family.rotary == OTHER_ROTARY:
        parts.append("rotary embeddings")
    if not _fuses_ffn(family, activation_of(config)):
        parts.append("the middle of the FFN")
    return parts


def _fuses_ffn(family: Family, activation: str) -> bool:
    return isinstance(family.ffn, Gated) and family.ffn_forward is None and activation in ACTIVATIONS


def fuse(block: nn.Module, family: Family, activation: str) -> None:
    """Put FusedRMSNorm in the place of every RMSNorm of the layer, FusedFFN in that of its FFN; names and weights stay.

    activation: the FFN's, as the configuration names it; kinds of norms and FFNs that the kernels lack stay.
    """
    if family.norm in (RMS, RMS_PLUS_ONE):
        kind = family.norm_class
        for name, module in [(name, module) for name, module in block.named_modules() if type(module) is kind]:
            parent, _, own = name.rpartition(".")
            fused = FusedRMSNorm(module.weight, norm_epsilon(module), family.norm == RMS_PLUS_ONE)
            setattr(block.get_submodule(parent), own, fused)
    if _fuses_ffn(family, activation):
        assert isinstance(family.ffn, Gated)
        owner = family.ffn.output.rpartition(".")[0]
        names = [name.rpartition(".")[2] for name in (*family.ffn.inputs, family.ffn.output)]
        linears = {name: block.get_submodule(f"{owner}.{name}") for name in names}
        setattr(block, owner, FusedFFN(linears, family.ffn, ACTIVATIONS[activation]))


@contextmanager
def fused_rotary(family: Family) -> Iterator[None]:
    """Let the family's attention rotate queries and keys by the operator `rotate_`, in place, where that has its kind.

    As much of each head turns as there are angles.
    """
    if family.rotary not in (HALVES, NEIGHBOURS):
        yield
        return
    source = family.source()
    original, neighbours = source.apply_rotary_pos_emb, family.rotary == NEIGHBOURS

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1:
            return original(q, k, cos, sin, unsqueeze_dim)
        for heads in (q, k):
            rotate_(heads[..., : cos.shape[-1]], cos, sin, neighbours)
        return q, k

    source.apply_rotary_pos_emb = apply
    try:
        yield
    finally:
        source.apply_rotary_pos_emb = original
