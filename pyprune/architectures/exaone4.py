"""EXAONE 4: norms behind the sublayers only and of each head's queries and keys; no rotary in layers of full attention
where others have a window."""

from .declaration import SHARED, Attention, by_layer_type
from .family import Family
from .olmo2 import BEHIND

EXAONE4 = Family(
    name="exaone4", prefix="Exaone4", attention=Attention(head_norms=SHARED), wiring=BEHIND, kind=by_layer_type
)
