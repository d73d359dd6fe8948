"""The pruning methods. A new one is one file beside these and one entry here."""

from dataclasses import fields
from typing import Any

from ..errors import InputError
from .base import LayerStatistics, Method, ScoringMethod
from .flap import Flap
from .learned import Disp, LearnedMethod, Policy
from .magnitude import Magnitude
from .obs import Obs
from .second_order import SecondOrderMethod
from .slimgpt import SlimGpt
from .wanda_sp import WandaSp

KNOWN: tuple[type[Method], ...] = (Magnitude, WandaSp, Flap, SlimGpt, Obs, Disp, Policy)
METHODS: dict[str, type[Method]] = {method.name: method for method in KNOWN}


def make_method(name: str, options: dict[str, Any]) -> Method:
    """A method with its options; an unknown name or an option that the method does not have is an InputError."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    method = METHODS[name]
    known = {field.name for field in fields(method)}
    for option in options:
        if option not in known:
            own = ", ".join("--" + o.replace("_", "-") for o in sorted(known)) or "none"
            raise InputError(f"method {name} has no option --{option.replace('_', '-')}; its options: {own}")
    with_uniform = method.with_uniform if options.get("uniform") else {}
    return method(**(with_uniform | options))


__all__ = [
    "METHODS",
    "Disp",
    "LayerStatistics",
    "LearnedMethod",
    "Method",
    "Policy",
    "ScoringMethod",
    "SecondOrderMethod",
    "make_method",
]
