"""Gemma 2: norms before and behind each sublayer, logits of attention and head bounded by tanh."""

from typing import Any

import torch
from torch import Tensor

from .declaration import RMS_PLUS_ONE, Scales, Wiring, by_layer_type
from .family import Family
from .gemma import scaled_by_root

SANDWICH = Wiring(
    before=("input_layernorm", "pre_feedforward_layernorm"),
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
)


def soft_capped(config: Any, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


GEMMA2 = Family(
    name="gemma2",
    prefix="Gemma2",
    norm=RMS_PLUS_ONE,
    wiring=SANDWICH,
    scales=Scales(embed=scaled_by_root, logits=soft_capped),
    kind=by_layer_type,
    attention_backend="eager",
)
