"""Options of a pruning: what to calibrate on, how much to remove, and those that the methods declare."""

from collections.abc import Callable
from typing import Any

import click

from ..methods import METHODS, load_entry_points
from ..methods.base import ROUNDED, ROUNDED_FROM
from ..methods.options import Option, flag_of
from ..methods.registry import methods_with, option_names
from .command import CALIBRATION, METHOD, Choice, MemorySize, ParameterCount, option, options, seed_option
from .texts import text_options

# Modules of other packages with methods of their own: their options are options of the commands too.
load_entry_points()

# The help of options that most methods share; `pyprune methods NAME` explains every other one.
SHARED = {
    "uniform": "The same sizes in every layer, as programs for stock models need.",
    "round_to": "Keep FFN channels (rows of gate, up) in multiples of N: fast on GPUs.  "
    f"[default: {ROUNDED} from {ROUNDED_FROM} channels in a layer on, else 1]",
    "layers": "Layers to prune, counted from 0: 4-29, or 2-5,8,10-.  [default: all]",
}
METAVARS: dict[type, str] = {int: "N", float: "NUMBER", str: "TEXT"}


def method_option(name: str) -> Callable[[Any], Any]:
    """The command's option for an option of methods, from the fields of all methods that have it."""
    declared = [own for _, own in methods_with(name)]
    return declared_option(declared[0].flag, declared, name in SHARED, SHARED.get(name))


def declared_option(flag: str, declared: list[Option], shown: bool, help: str | None = None) -> Callable[[Any], Any]:
    kind = declared[0].kind
    look: dict[str, Any] = {"group": METHOD, "hidden": not shown, "help": help}
    if kind is bool:
        names = f"{flag}/--no-{flag[2:]}" if declared[0].nullable else flag
        return option(names, is_flag=True, default=None, **look)
    choices = dict.fromkeys(value for own in declared for value in own.choices or ())
    if choices and all(own.choices for own in declared):
        return option(flag, type=Choice(list(choices)), metavar="NAME", **look)
    whole = kind is int and all(own.minimum is not None for own in declared)
    least = min(int(own.minimum or 0) for own in declared)
    metavar = "LAYERS" if flag == "--layers" else METAVARS[kind]
    return option(flag, type=click.IntRange(least) if whole else kind, metavar=metavar, **look)


def _aliases() -> dict[str, Option]:
    """Older names of the methods' options."""
    return {alias: own for name in option_names() for _, own in methods_with(name) for alias in own.aliases}


def prune_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `prune` and `estimate` share."""
    of_methods = [method_option(name) for name in sorted(option_names(), key=lambda name: name not in SHARED)]
    aliases = [declared_option(flag_of(alias), [own], False) for alias, own in _aliases().items()]
    return options(CALIBRATION_OPTIONS, METHOD_OPTIONS, *of_methods, *aliases)(command)


CALIBRATION_OPTIONS = options(
    option(
        "--calibration",
        metavar="TEXT",
        multiple=True,
        group=CALIBRATION,
        help="File, hub data set, builtin or self; several with shares: TEXT=0.3.",
    ),
    text_options(CALIBRATION),
    option(
        "--samples",
        type=click.IntRange(1),
        metavar="N",
        default=128,
        group=CALIBRATION,
        help="Windows of consecutive tokens to take from the text.",
    ),
    option(
        "--sequence-length",
        type=click.IntRange(2),
        metavar="N",
        default=2048,
        show_default=False,
        group=CALIBRATION,
        help="Tokens in a window.  [default: 2048, or as many as MODEL takes]",
    ),
    seed_option("Seed of the choice of windows and of sampled text.", CALIBRATION),
)
METHOD_OPTIONS = options(
    option(
        "--method",
        type=Choice(list(METHODS)),
        metavar="NAME",
        default="obs",
        group=METHOD,
        help=f"{', '.join(METHODS)}; pyprune methods NAME: its options.",
    ),
    option(
        "--ratio",
        type=float,
        metavar="SHARE",
        group=METHOD,
        help="Share of the decoder layers' weights to remove, between 0 and 1.",
    ),
    option(
        "--target-size",
        type=MemorySize(),
        metavar="SIZE",
        group=METHOD,
        help="In place of --ratio: size of OUTPUT's weights, 4.2GB or 3.9GiB.",
    ),
    option(
        "--parameters",
        type=ParameterCount(),
        metavar="COUNT",
        group=METHOD,
        help="In place of --ratio: parameters of OUTPUT, 5.0B or 350M.",
    ),
)


def options_given(options: dict[str, Any]) -> dict[str, Any]:
    """The method options that the user typed."""
    return {name: options[name] for name in [*option_names(), *_aliases()] if options.get(name) is not None}
