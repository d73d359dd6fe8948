"""StableLM 2 and StableLM 3B: LayerNorms, rotary embeddings of a part of each head, attention and FFN side by side
where `use_parallel_residual` says so. Heads stay."""

from typing import Any

from ..errors import InputError
from .declaration import LAYER, Attention
from .family import Family


def check_layers(config: Any) -> None:
    """InputError: layers that are not wired one after the other, or norms that each head owns."""
    for name in ("use_parallel_residual", "qk_layernorm"):
        if getattr(config, name, False):
            raise InputError(f"{name} in config.json: stablelm models with it are not supported")


STABLELM = Family(
    name="stablelm",
    prefix="StableLm",
    attention=Attention(square=True),
    norm=LAYER,
    check=check_layers,
)
