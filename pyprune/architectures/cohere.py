"""Cohere Command R: attention and FFN side by side behind one LayerNorm, logits times a factor."""

from .declaration import LAYER, OTHER_ROTARY, OWN, Attention, Scales, Wiring
from .family import Family

SIDE_BY_SIDE = Wiring(before=("input_layernorm", "input_layernorm"), parallel=True)
COHERE_SCALES = Scales(logits=lambda config, logits: logits * config.logit_scale)

COHERE = Family(
    name="cohere",
    prefix="Cohere",
    attention=Attention(head_norms=OWN),
    wiring=SIDE_BY_SIDE,
    norm=LAYER,
    scales=COHERE_SCALES,
    rotary=OTHER_ROTARY,
)
