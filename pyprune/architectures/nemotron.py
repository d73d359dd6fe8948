"""Nemotron 3 and 4, Minitron: LayerNorms times 1 + w, an FFN without a gate, ReLU², rotary embeddings of a half of
each head."""

from .declaration import LAYER, Plain
from .family import Family

NEMOTRON = Family(name="nemotron", prefix="Nemotron", ffn=Plain(), norm=LAYER)
