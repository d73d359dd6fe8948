"""Arcee (AFM): Llama's layers with an FFN without a gate, ReLU²."""

from .declaration import Plain
from .family import Family

ARCEE = Family(name="arcee", prefix="Arcee", ffn=Plain())
