"""Phi-3, Phi-3.5 and Phi-4: Llama's layers with fused query, key and value, and fused gate and up."""

from .declaration import FULL, SLIDING, Attention, Gated
from .family import Family

PHI3 = Family(
    name="phi3",
    prefix="Phi3",
    attention=Attention(fused="self_attn.qkv_proj", reads_sizes=True),
    ffn=Gated(fused="mlp.gate_up_proj"),
    kind=lambda config, layer: FULL if config.sliding_window is None else SLIDING,
)
