"""Descriptions of families, for listings, documents and the refusal of an unknown one."""

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

from .family import Family

_IN_LAYER = re.compile(r"\.\d+\.(.+)\.(?:weight|bias)$")  # a tensor's name behind the layer's number
_ALIKE = 0.6  # difflib's own bound of close matches


def describe(family: Family) -> dict[str, Any]:
    """Name, class, units that may go, wiring, matrices and exports of a family.

    units: as `--units` has them; kv-groups are heads in models whose query heads all share one key and value head.
    """
    attention, ffn, wirings = family.attention, family.ffn, family.wirings()
    places = [place for place, norms in (("before", wirings[0].before), ("behind", wirings[0].after)) if norms]
    order = " or ".join("side by side" if wiring.parallel else "in turn" for wiring in wirings)
    return {
        "name": family.name,
        "class": family.class_name("ForCausalLM"),
        "units": ["channels"] if attention.keeps_heads else ["kv-groups", "channels"],
        "heads_in_stock": family.heads_in_stock,
        "linear_attention": bool(attention.linear),
        "wiring": f"{order}, norms {' and '.join(places)}",
        "attention": [*attention.inputs, attention.output],
        "ffn": [*ffn.inputs, ffn.output],
        "norm": family.norm,
        "head_norms": attention.head_norms,
        "rotary": family.rotary,
        "exports": exports(family),
    }


def exports(family: Family) -> list[str]:
    """Formats of `pyprune export` that the family may be written in, and vllm where a plugin loads its outputs."""
    further = {"remote-code": family.remote_code, "gguf": bool(family.gguf), "vllm": family.vllm}
    return ["stock", "padded", *(name for name, written in further.items() if written)]


def nearest_family(families: Mapping[str, Family], model_type: str, tensors: Iterable[str]) -> str:
    """Name of the family whose layers have these tensors' names most; of equals the one named alike, or the first."""
    found = {match[1] for match in map(_IN_LAYER.search, tensors) if match}

    def likeness(family: Family) -> tuple[float, float]:
        described = describe(family)
        own = {
            *described["attention"],
            *described["ffn"],
            *(n for w in family.wirings() for n in (*w.before, *w.after)),
        }
        own |= set(family.attention.norms) if family.attention.head_norms else set()
        alike = SequenceMatcher(None, model_type, family.name).ratio()
        return (len(own & found) / len(own | found), alike if alike >= _ALIKE else 0)

    return max(families.values(), key=likeness).name
