"""Cohere Command R7B and Command A: Cohere's layers, rotary embeddings in those with a sliding window only."""

from .cohere import COHERE_SCALES, SIDE_BY_SIDE
from .declaration import LAYER, OTHER_ROTARY, by_layer_type
from .family import Family

COHERE2 = Family(
    name="cohere2",
    prefix="Cohere2",
    wiring=SIDE_BY_SIDE,
    norm=LAYER,
    scales=COHERE_SCALES,
    rotary=OTHER_ROTARY,
    kind=by_layer_type,
)
