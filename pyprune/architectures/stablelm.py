"""StableLM 2 and StableLM 3B: LayerNorms, rotary embeddings of a part of each head, attention and FFN side by side
where `use_parallel_residual` says so. Heads stay."""

from typing import Any

from ..errors import InputError
from .cohere import SIDE_BY_SIDE
from .declaration import LAYER
from .family import Family
from .gpt_neox import check_head_dim


def check_layers(config: Any) -> None:
    """InputError: norms that each head owns, or heads of another width than the class makes."""
    if config.qk_layernorm:
        raise InputError("qk_layernorm in config.json: stablelm models with it are not supported")
    check_head_dim(config)


STABLELM = Family(
    name="stablelm",
    prefix="StableLm",
    parallel_wiring=SIDE_BY_SIDE,
    norm=LAYER,
    heads_in_stock=False,
    check=check_layers,
)
