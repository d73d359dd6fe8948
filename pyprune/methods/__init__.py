"""The pruning methods. A new one is one file beside these, or a module that a package names as an entry point."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..errors import InputError
from .base import LayerStatistics, Method, ScoringMethod, UnitMethod
from .mask_learning import LearnedMethod
from .options import flag_of, options_of
from .registry import METHODS, describe, load_entry_points, methods_with, register
from .second_order import SecondOrderMethod
from .weight_sparsity import SemiStructuredMethod

# The order of listings; files that are not named here come last.
LISTED = ("magnitude", "wanda_sp", "flap", "slimgpt", "obs", "disp", "policy", "wanda", "sparsegpt", "dass")
for module in dict.fromkeys([*LISTED, *(found.name for found in iter_modules(__path__))]):
    import_module(f"{__name__}.{module}")


def make_method(name: str, options: dict[str, Any]) -> Method:
    """Make a method with its options. InputError: an unknown name, or an option that the method does not have."""
    if name not in METHODS:
        load_entry_points()
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    method = METHODS[name]
    known = options_of(method)
    aliases = {alias: own.name for own in known.values() for alias in own.aliases}
    given: dict[str, Any] = {}
    for option, value in options.items():
        own = aliases.get(option, option)
        if own not in known:
            flags = ", ".join(flag_of(each) for each in sorted(known)) or "none"
            having = [other for other, _ in methods_with(option)]
            others = f", which {', '.join(having)} {'has' if len(having) == 1 else 'have'}" if having else ""
            raise InputError(f"method {name} has no option {flag_of(option)}{others}; its options: {flags}")
        if own in given:
            raise InputError(f"{flag_of(own)} is given twice, by its old name too; leave one of them out")
        given[own] = value
    uniform_defaults = method.uniform_defaults if given.get("uniform") else {}
    return method(**(uniform_defaults | given))


def list_methods() -> dict[str, dict[str, Any]]:
    """List the pruning methods: by name a `summary`, whether it `needs_text`, and its `options`."""
    load_entry_points()
    return {name: describe(method) for name, method in METHODS.items()}


def resolve_ratio(method: Method, ratio: float | None) -> float:
    """Return the given ratio, or the one that the method implies; InputError where there is neither."""
    if ratio is not None:
        return ratio
    if method.implied_ratio is None:
        raise InputError(
            "Missing option '--ratio': the share of the decoder layers' weights to remove, in (0, 1); or give "
            "--target-size or --parameters"
        )
    return method.implied_ratio


__all__ = [
    "METHODS",
    "LayerStatistics",
    "LearnedMethod",
    "Method",
    "ScoringMethod",
    "SecondOrderMethod",
    "SemiStructuredMethod",
    "UnitMethod",
    "describe",
    "list_methods",
    "load_entry_points",
    "make_method",
    "register",
    "resolve_ratio",
]
