"""GLM-4-0414 and GLM-Z1: GLM's layers with a norm behind each sublayer as well."""

from .declaration import NEIGHBOURS, Gated, Wiring
from .family import Family

GLM4 = Family(
    name="glm4",
    prefix="Glm4",
    ffn=Gated(fused="mlp.gate_up_proj"),
    wiring=Wiring(after=("post_self_attn_layernorm", "post_mlp_layernorm")),
    rotary=NEIGHBOURS,
)
