"""The model families that pyprune knows. A new one is one file beside these."""

from ..errors import InputError
from .family import ATTENTION, FFN, SUBLAYERS, Family, LayerShape, expand
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .smollm3 import SMOLLM3

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE, SMOLLM3)}
SELECTED_PREFIX = "pyprune_selected_"  # begins the model_type of DISP models
PRUNED_PREFIX = "pyprune_"  # begins the model_type of what pyprune writes when layers differ or have biases


def family_of(model_type: str | None) -> Family:
    """The family of a config's `model_type`; a model that pyprune wrote can be pruned again."""
    base = (model_type or "").removeprefix(PRUNED_PREFIX)
    if (model_type or "").startswith(SELECTED_PREFIX):
        raise InputError(
            "a DISP model, whose blocks select channels of the residual stream: it cannot be pruned or exported again; "
            "start from the dense model"
        )
    if base not in FAMILIES:
        raise InputError(
            f"unknown architecture {model_type!r} (model_type in config.json); known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[base]


__all__ = [
    "ATTENTION",
    "FAMILIES",
    "FFN",
    "PRUNED_PREFIX",
    "SELECTED_PREFIX",
    "SUBLAYERS",
    "Family",
    "LayerShape",
    "expand",
    "family_of",
]
