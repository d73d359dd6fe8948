"""Apertus: an FFN without a gate, xIELU with trained factors, norms of each head's queries and keys."""

from .declaration import SHARED, Attention, Plain, Wiring
from .family import Family

APERTUS = Family(
    name="apertus",
    prefix="Apertus",
    attention=Attention(head_norms=SHARED),
    ffn=Plain(),
    wiring=Wiring(before=("attention_layernorm", "feedforward_layernorm")),
)
