"""OLMo 1: Llama's layers with LayerNorms that have no weights, queries, keys and values cut to a range."""

from .declaration import LAYER
from .family import Family

OLMO = Family(name="olmo", prefix="Olmo", norm=LAYER)
