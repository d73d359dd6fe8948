"""Qwen3.5 (dense), the text model: linear attention in three of four layers, gated attention in the others.

The FFN loses channels everywhere, the attention KV groups where there are any.
"""

from .declaration import RMS_PLUS_ONE, SHARED, Attention, by_layer_type
from .family import Family

QWEN3_5 = Family(
    name="qwen3_5_text",
    prefix="Qwen3_5",
    module="qwen3_5",
    classes={"Model": "TextModel", "Config": "TextConfig", "RotaryEmbedding": "TextRotaryEmbedding"},
    attention=Attention(
        head_norms=SHARED,
        gated=True,
        linear=tuple(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
    ),
    norm=RMS_PLUS_ONE,
    kind=by_layer_type,
    position_axes=3,
)
