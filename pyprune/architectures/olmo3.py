"""OLMo 3: OLMo 2's layers, with a sliding window and rotary embeddings by kind of layer."""

from .declaration import OTHER_ROTARY, WHOLE, Attention, by_layer_type
from .family import Family
from .olmo2 import BEHIND

OLMO3 = Family(
    name="olmo3",
    prefix="Olmo3",
    attention=Attention(head_norms=WHOLE),
    wiring=BEHIND,
    kind=by_layer_type,
    rotary=OTHER_ROTARY,  # in float32, as OLMo 2
    rotary_by_kind=True,
)
