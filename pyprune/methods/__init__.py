"""The pruning methods. A new one is one file beside these and one entry here."""

from dataclasses import fields
from typing import Any

from ..errors import InputError
from .base import LayerStatistics, Method, ScoringMethod
from .dass import Dass
from .flap import Flap
from .magnitude import Magnitude
from .mask_learning import Disp, LearnedMethod, Policy
from .obs import Obs
from .second_order import SecondOrderMethod
from .slimgpt import SlimGpt
from .sparsegpt import SparseGpt
from .wanda import Wanda
from .wanda_sp import WandaSp
from .weight_sparsity import SemiStructuredMethod

METHOD_CLASSES: tuple[type[Method], ...] = (
    Magnitude,
    WandaSp,
    Flap,
    SlimGpt,
    Obs,
    Disp,
    Policy,
    Wanda,
    SparseGpt,
    Dass,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in METHOD_CLASSES}


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
    uniform_defaults = method.uniform_defaults if options.get("uniform") else {}
    return method(**(uniform_defaults | options))


def list_methods() -> dict[str, dict[str, Any]]:
    """List the pruning methods: by name a `summary`, whether it `needs_text`, and its `options` with their defaults."""
    return {
        name: {
            "summary": (method.__doc__ or "").strip().splitlines()[0],
            "needs_text": method.needs_text,
            "options": {field.name: field.default for field in fields(method)},
        }
        for name, method in METHODS.items()
    }


def resolve_ratio(method: Method, ratio: float | None) -> float:
    """The ratio asked for, or the method's own; InputError where there is neither."""
    if ratio is not None:
        return ratio
    if method.implied_ratio is None:
        raise InputError("Missing option '--ratio': the share of the decoder linears to remove, in (0, 1)")
    return method.implied_ratio


__all__ = [
    "METHODS",
    "Disp",
    "LayerStatistics",
    "LearnedMethod",
    "Method",
    "Policy",
    "ScoringMethod",
    "SecondOrderMethod",
    "SemiStructuredMethod",
    "list_methods",
    "make_method",
    "resolve_ratio",
]
