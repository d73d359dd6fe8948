"""Gemma 3, the text model: Gemma 2's layers without bounds, norms of heads, rotary embeddings by kind of layer."""

from .declaration import RMS_PLUS_ONE, SHARED, Attention, Scales, by_layer_type
from .family import Family
from .gemma import scaled_by_root
from .gemma2 import SANDWICH, soft_capped

GEMMA3 = Family(
    name="gemma3_text",
    prefix="Gemma3",
    module="gemma3",
    classes={"Model": "TextModel", "Config": "TextConfig"},
    attention=Attention(head_norms=SHARED),
    norm=RMS_PLUS_ONE,
    wiring=SANDWICH,
    scales=Scales(embed=scaled_by_root, logits=soft_capped),
    kind=by_layer_type,
    rotary_by_kind=True,
)
