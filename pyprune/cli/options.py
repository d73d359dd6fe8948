"""Options of a pruning: what to calibrate on, and those that the methods declare."""

from collections.abc import Callable
from typing import Any

import click

from ..methods import METHODS, load_entry_points
from ..methods.options import Option, flag_of
from ..methods.registry import methods_with, option_names

# Modules of other packages with methods of their own: their options are options of the commands too.
load_entry_points()


def method_option(name: str) -> Callable[[Any], Any]:
    """The command's option for an option of methods, generated from the fields of all methods that have it."""
    having = dict(methods_with(name))
    options = list(having.values())
    kind, flag = options[0].kind, options[0].flag
    text = method_option_help(having)
    if kind is bool and options[0].nullable:
        return click.option(f"{flag}/--no-{flag[2:]}", default=None, help=text)
    if kind is bool:
        return click.option(flag, is_flag=True, default=None, help=text)
    whole = kind is int and all(option.minimum is not None for option in options)
    least = min(int(option.minimum or 0) for option in options)
    return click.option(flag, type=click.IntRange(least) if whole else kind, help=text)


def method_option_help(having: dict[str, Option]) -> str:
    """Help text of an option: the methods that have it unless all do, its meaning, values and defaults.

    having: by method. Where methods differ, each text, value and default is said with their names.
    """
    everywhere = len(having) == len(METHODS)
    helps = _by_value({method: option.help for method, option in having.items()})
    parts = [text if everywhere else f"{', '.join(names)}: {text}" for text, names in helps.items()]
    choices = {method: option.choices for method, option in having.items() if option.choices is not None}
    if len(set(choices.values())) == 1:
        parts.append(f"One of {', '.join(next(iter(choices.values())))}.")
    elif choices:
        values = dict.fromkeys(value for own in choices.values() for value in own)
        by_value = {value: [method for method, own in choices.items() if value in own] for value in values}
        parts.append("; ".join(f"{value}: {', '.join(names)}" for value, names in by_value.items()) + ".")
    defaults = _by_value({method: _default_of(method, option) for method, option in having.items()})
    if len(defaults) == 1:
        said = next(iter(defaults))
    else:
        said = ", ".join(f"{text or 'none'} for {', '.join(names)}" for text, names in defaults.items())
    return " ".join(parts) + (f"  [default: {said}]" if said else "")


def _by_value(texts: dict[str, str]) -> dict[str, list[str]]:
    """Methods by their text."""
    found: dict[str, list[str]] = {}
    for method, text in texts.items():
        found.setdefault(text, []).append(method)
    return found


def _default_of(method: str, option: Option) -> str:
    """The default in words; "" where there is nothing to say."""
    if option.default_text is not None:
        text = option.default_text
    elif option.default is None or option.kind is bool:
        text = ""
    else:
        text = f"{option.default:g}" if option.kind is float else str(option.default)
    uniform = METHODS[method].uniform_defaults
    return text + (f"; with --uniform {uniform[option.name]}" if option.name in uniform else "")


def _aliases() -> dict[str, Option]:
    """Older names of the methods' options."""
    return {alias: own for name in option_names() for _, own in methods_with(name) for alias in own.aliases}


def method_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for alias, own in _aliases().items():
        command = click.option(flag_of(alias), type=own.kind, hidden=True)(command)
    for name in reversed(option_names()):
        command = method_option(name)(command)
    for option in (
        click.option("--sequence-length", type=click.IntRange(2), default=2048, help="Tokens in a calibration window."),
        click.option("--samples", type=click.IntRange(1), default=128, help="Calibration windows."),
        click.option(
            "--calibration",
            metavar="TEXT[=SHARE]",
            multiple=True,
            help="A file (.txt, .jsonl, .json, .csv, .parquet, or one of these .gz), a data set of the hub "
            "(name[:config[:split]]), `builtin`, or `self`: sampled from the model (loads it whole). Repeatable.",
        ),
        click.option(
            "--ratio", type=float, help="Share of the decoder linears to remove, (0, 1); a pattern N:M says its own."
        ),
        click.option("--method", default="flap", help=f"One of {', '.join(METHODS)}."),
    ):
        command = option(command)
    return command


def options_given(options: dict[str, Any]) -> dict[str, Any]:
    """The method options that the user typed."""
    return {name: options[name] for name in [*option_names(), *_aliases()] if options.get(name) is not None}
