"""Options of the methods: each is a dataclass field, declared once; checks, listings and the command line follow."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from ..errors import InputError

_KEY = "option"
# Kind -> values of it, and what they are called.
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


@dataclass(frozen=True)
class Option:
    """One option of one method class.

    kind: bool, int, float or str. nullable: whether None is a value: the default, which then follows from the model or
    from other options. choices: the values allowed, or None for any. minimum, maximum: bounds that are allowed; above:
    one that is not. meaning: ends the refusal of a number. default_text: the default in words, where the value does not
    say it. aliases: older names, which are accepted.
    """

    name: str
    kind: type
    nullable: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    meaning: str = ""
    default_text: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    def describe(self) -> dict[str, Any]:
        """Default, the same in words where the value does not say it, choices, help and type."""
        return {
            "default": self.default,
            "default_text": self.default_text,
            "choices": None if self.choices is None else list(self.choices),
            "help": self.help,
            "type": self.kind.__name__ + (" or null" if self.nullable else ""),
        }

    def check(self, method: str, value: Any) -> None:
        """Raise InputError unless `value` is one that the option of the named method takes."""
        if value is None and self.nullable:
            return
        types, called = _KINDS[self.kind]
        wrong_kind = not isinstance(value, types) or (isinstance(value, bool) and self.kind is not bool)
        if wrong_kind:
            raise InputError(f"{self.flag} {value!r} is not {called}")
        if self.choices is not None and value not in self.choices:
            raise InputError(f"{method} has no {self.name} {value!r}; one of {', '.join(self.choices)}")
        if self.kind in (int, float):
            self._check_number(value)

    def _check_number(self, value: float) -> None:
        low = self.minimum if self.above is None else self.above
        if low is None:
            return
        fits = (value >= low if self.above is None else value > low) and value < math.inf  # NaN is neither
        ending = f": {self.meaning}" if self.meaning else ""
        if self.maximum is not None and not (fits and value <= self.maximum):
            interval = f"{'[' if self.above is None else '('}{low:g}, {self.maximum:g}]"
            raise InputError(f"{self.name.replace('_', ' ')} {value:g} is outside {interval}{ending}")
        if not fits:
            wrong = f"is less than {low:g}" if self.above is None else "is not positive and finite"
            raise InputError(f"{self.flag} {value} {wrong}{ending}")


def option(
    default: Any,
    *,
    help: str,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    meaning: str = "",
    default_text: str | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is an option of a method; the arguments are those of `Option`."""
    declared = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "meaning": meaning,
        "default_text": default_text,
        "aliases": aliases,
    }
    return field(default=default, metadata={_KEY: declared})


@cache
def options_of(method: type) -> Mapping[str, Option]:
    """The options of a method class by name, in the order of its fields. TypeError: a field is not an `option`."""
    hints, found = get_type_hints(method), {}
    for own in fields(method):
        if _KEY not in own.metadata:
            raise TypeError(f"{method.__name__}.{own.name} is not an option: declare it as option(default, help=…)")
        kinds = get_args(hints[own.name]) or (hints[own.name],)
        (kind,) = (kind for kind in kinds if kind is not type(None))
        if kind not in _KINDS:
            raise TypeError(f"{method.__name__}.{own.name} is of no type that an option has: bool, int, float, str")
        nullable = len(kinds) > 1 and own.default is None
        found[own.name] = Option(own.name, kind, nullable, own.default, **own.metadata[_KEY])
    return found


def flag_of(name: str) -> str:
    """An option as the command line spells it."""
    return "--" + name.replace("_", "-")
