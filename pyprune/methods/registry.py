"""Registry of the methods: by name, with their options and descriptions."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ..runtime import entry_points
from .options import Option, options_of

if TYPE_CHECKING:
    from .base import Method

    Registered = TypeVar("Registered", bound=type[Method])

# The entry-point group in which an installed package names modules with methods of its own.
ENTRY_POINTS = "pyprune.methods"

METHODS: "dict[str, type[Method]]" = {}


def register(method: "Registered") -> "Registered":
    """Make a method class known by its `name`: a decorator. ValueError: another class has that name."""
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"there is a method {method.name!r} already: {METHODS[method.name].__name__}")
    options_of(method)  # a field that is no option shows here
    return method


def load_entry_points() -> None:
    """Import the modules that installed packages name in the group `pyprune.methods`; they register their methods."""
    entry_points.load_entry_points(ENTRY_POINTS)


def methods_with(option: str) -> Iterator[tuple[str, Option]]:
    """(method, its option) of every method that has an option of this name."""
    for name, method in METHODS.items():
        own = options_of(method).get(option)
        if own is not None:
            yield name, own


def option_names() -> list[str]:
    """Names of the options of all methods, each once, in the order of methods and fields."""
    return list(dict.fromkeys(name for method in METHODS.values() for name in options_of(method)))


def methods_of_choice(option: str, value: Any) -> list[str]:
    """Methods with an option of this name that has this value among its choices."""
    return [name for name, own in methods_with(option) if own.choices is not None and value in own.choices]


def describe(method: "type[Method]") -> dict[str, Any]:
    """Name, summary, source and options of a method class: {name: {default, default_text, choices, help, type}}."""
    return {
        "name": method.name,
        "summary": (method.__doc__ or "").strip().splitlines()[0],
        "source": method.source,
        "needs_text": method.needs_text,
        "options": {name: own.describe() for name, own in options_of(method).items()},
    }
