"""Hunyuan (dense, V1): Llama's layers with norms of each head's queries and keys after the rotary embedding."""

from .declaration import SHARED, Attention
from .family import Family

HUNYUAN_V1_DENSE = Family(
    name="hunyuan_v1_dense",
    prefix="HunYuanDenseV1",
    attention=Attention(head_norms=SHARED),
    computes_llama=lambda _: False,
)
