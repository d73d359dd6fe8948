"""ERNIE 4.5 (dense): Llama's layers with rotary embeddings of neighbouring channels."""

from .declaration import NEIGHBOURS
from .family import Family

ERNIE4_5 = Family(name="ernie4_5", prefix="Ernie4_5", rotary=NEIGHBOURS)
