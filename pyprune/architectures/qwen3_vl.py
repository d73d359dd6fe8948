"""Qwen3-VL, the text model: Qwen3's layers, with rotary embeddings of three positions, which are one for text."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from .declaration import SHARED, Attention
from .family import Family


@cache
def _with_head(body: Any) -> Any:
    """A causal language model of a body's class; transformers has none of the text model alone."""

    class WithHead(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.model = body(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    WithHead.__name__ = WithHead.__qualname__ = f"{body.__name__}WithHead"
    return WithHead


@dataclass(frozen=True)
class InnerFamily(Family):
    """A family that transformers has inside of other models only."""

    @property
    def causal_lm_class(self) -> Any:
        return _with_head(self.model_class)


# Not among the families: no checkpoint holds it alone.
QWEN3_VL = InnerFamily(
    name="qwen3_vl_text",
    prefix="Qwen3VLText",
    module="qwen3_vl",
    attention=Attention(head_norms=SHARED),
    position_axes=3,
)
