"""GLM-4 9B (2024) and GLM-Edge: fused gate and up, rotary embeddings of neighbouring channels of half a head."""

from .declaration import NEIGHBOURS, Gated
from .family import Family

GLM = Family(name="glm", prefix="Glm", ffn=Gated(fused="mlp.gate_up_proj"), rotary=NEIGHBOURS)
