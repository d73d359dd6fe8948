"""What a token counts where a norm follows an output projection.

The stream gets n(y) = g · y / rms(y) of the projection's output y. To first order a change δ of y changes it by
g · δ / rms(y), so that the error of a token weighs 1 / rms(y)², and that of an output channel g².
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.declaration import RMS_PLUS_ONE

# Where a gain is less than this share of the largest, the channel's target is held at it: what the norm all but
# removes would otherwise ask for weights without bound.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class TokenWeights:
    """weight: float32 [tokens], 1 / rms(y) rounded to a power of two, which keeps products of bfloat16 exact; times
    rms(y) it is `residual`, float32 [tokens], the factor of an error of the stream."""

    weight: Tensor
    residual: Tensor


def token_weights(norm: nn.Module, output: Tensor) -> TokenWeights:
    """Weights of the tokens of a projection's output [..., hidden_size], which `norm` reads."""
    rms = (output.float().square().mean(-1) + norm_epsilon(norm)).sqrt().flatten()
    weight = torch.exp2(-rms.log2().round())
    return TokenWeights(weight, weight * rms)


def norm_epsilon(norm: Any) -> float:
    """The number that a norm adds to the mean square."""
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    raise TypeError(f"{type(norm).__name__} has no epsilon")


def norm_gain(norm: Any, kind: str) -> Tensor:
    """The factors of a norm's channels, float32 [channels], none of them too near to zero to divide by."""
    gain = norm.weight.detach().float()
    gain = gain + 1 if kind == RMS_PLUS_ONE else gain
    least = _LEAST_GAIN * gain.abs().max()
    return torch.where(gain.abs() < least, torch.where(gain < 0, -least, least), gain)
