"""Ministral 8B (2024): Llama's layers with a sliding window by layer."""

from .declaration import by_layer_type
from .family import Family

MINISTRAL = Family(name="ministral", prefix="Ministral", kind=by_layer_type)
