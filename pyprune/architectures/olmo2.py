"""OLMo 2: norms behind the sublayers only, and of queries and keys over all heads at once, so that heads stay.

Its rotary embeddings are multiplied in float32, which no kernel does.
"""

from .declaration import OTHER_ROTARY, WHOLE, Attention, Wiring
from .family import Family

BEHIND = Wiring(before=(), after=("post_attention_layernorm", "post_feedforward_layernorm"))
OLMO2 = Family(name="olmo2", prefix="Olmo2", attention=Attention(head_norms=WHOLE), wiring=BEHIND, rotary=OTHER_ROTARY)
