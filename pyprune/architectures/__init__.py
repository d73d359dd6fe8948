"""The model families. A new one is one file beside these, or a module that a package names as an entry point."""

from collections.abc import Callable, Iterable
from typing import Any

from ..errors import InputError
from ..runtime.entry_points import load_entry_points
from .apertus import APERTUS
from .arcee import ARCEE
from .cohere import COHERE
from .cohere2 import COHERE2
from .cwm import CWM
from .description import describe, nearest_family
from .ernie4_5 import ERNIE4_5
from .exaone4 import EXAONE4
from .family import BIAS_FLAGS, Family, expand, without_layers
from .gemma import GEMMA
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .glm import GLM
from .glm4 import GLM4
from .gpt_neox import GPT_NEOX
from .granite import GRANITE
from .hunyuan_v1_dense import HUNYUAN_V1_DENSE
from .llama import LLAMA
from .ministral import MINISTRAL
from .ministral3 import MINISTRAL3
from .mistral import MISTRAL
from .nemotron import NEMOTRON
from .olmo import OLMO
from .olmo2 import OLMO2
from .olmo3 import OLMO3
from .opt import OPT
from .phi import PHI
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_5 import QWEN3_5
from .seed_oss import SEED_OSS
from .shape import ATTENTION, FFN, SUBLAYERS, LayerShape
from .smollm3 import SMOLLM3
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

# Of a family from elsewhere only its description is known.
BUILT_IN = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GRANITE,
    SMOLLM3,
    APERTUS,
    ARCEE,
    COHERE,
    COHERE2,
    CWM,
    ERNIE4_5,
    EXAONE4,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GLM,
    GLM4,
    GPT_NEOX,
    HUNYUAN_V1_DENSE,
    MINISTRAL,
    MINISTRAL3,
    NEMOTRON,
    OLMO,
    OLMO2,
    OLMO3,
    OPT,
    PHI,
    PHI3,
    QWEN3_5,
    SEED_OSS,
    STABLELM,
    STARCODER2,
)
FAMILIES = {family.name: family for family in BUILT_IN}
# The entry-point group in which an installed package names modules with families.
ENTRY_POINTS = "pyprune.families"
SELECTED_PREFIX = "pyprune_selected_"  # begins the model_type of DISP models
PRUNED_PREFIX = "pyprune_"  # begins the model_type of what pyprune writes when layers differ or have biases

_followers: list[Callable[[Family], None]] = []


def register(family: Family) -> Family:
    """Make a family known by its `name`. ValueError: another family has that name."""
    known = FAMILIES.get(family.name, family)
    if known is not family:
        raise ValueError(f"there is a family {family.name!r} already: {known.prefix}")
    for follow in _followers:
        follow(family)
    FAMILIES[family.name] = family  # last: one that a follower refuses stays unknown
    return family


def for_every_family(follow: Callable[[Family], None]) -> None:
    """Call `follow` with every family: now with the known ones, later with each that is registered."""
    _followers.append(follow)
    for family in list(FAMILIES.values()):
        follow(family)


def list_families() -> dict[str, dict[str, Any]]:
    """List the model families: by name the `class` in transformers, `units` that may go, `wiring` and `exports`."""
    return {name: describe(family) for name, family in FAMILIES.items()}


def family_of(model_type: str | None, tensors: Callable[[], Iterable[str]] = tuple) -> Family:
    """The family of a config's `model_type`; a model that pyprune wrote can be pruned again.

    tensors: gives names of the model's tensors, by which the nearest family is named in the refusal of an unknown one.
    """
    base = (model_type or "").removeprefix(PRUNED_PREFIX)
    if (model_type or "").startswith(SELECTED_PREFIX):
        raise InputError(
            "a DISP model, whose blocks select channels of the residual stream: it cannot be pruned or exported again; "
            "start from the dense model"
        )
    if base not in FAMILIES:
        raise InputError(
            f"unknown architecture {model_type!r} (model_type in config.json): of the {len(FAMILIES)} known ones the "
            f"nearest is {nearest_family(FAMILIES, base, tensors())}; `pyprune families` lists them, and "
            "docs/families.md says how to add one"
        )
    return FAMILIES[base]


# Last: the modules may import any name of this one.
load_entry_points(ENTRY_POINTS)


__all__ = [
    "ATTENTION",
    "BIAS_FLAGS",
    "BUILT_IN",
    "FAMILIES",
    "FFN",
    "PRUNED_PREFIX",
    "SELECTED_PREFIX",
    "SUBLAYERS",
    "Family",
    "LayerShape",
    "describe",
    "expand",
    "family_of",
    "for_every_family",
    "list_families",
    "register",
    "without_layers",
]
