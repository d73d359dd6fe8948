"""Ministral 3 (2025), the text model: Llama's layers with queries scaled by position."""

from .declaration import FULL, SLIDING
from .family import Family

MINISTRAL3 = Family(
    name="ministral3",
    prefix="Ministral3",
    kind=lambda config, layer: FULL if config.sliding_window is None else SLIDING,
    computes_llama=lambda config: False,
)
