"""Options that several commands share, and those of the methods."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import click

from ..methods import METHODS, load_entry_points
from ..methods.options import Option, flag_of
from ..methods.registry import methods_with, option_names

SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}

# Modules of other packages with methods of their own: their options are options of the commands too.
load_entry_points()


class Command(click.Command):
    """A command whose options are given once: click would take the last value of several without a word."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for argument in args:
            check_text(argument)
        if args and not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for option, times in Counter(each for each in order if isinstance(each, click.Option)).items():
                if times > 1 and not (option.multiple or option.is_flag or option.count):
                    raise click.UsageError(f"{option.opts[0]} is given {times} times; it takes one value", ctx)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """The commands of the program."""

    command_class = Command


def check_text(argument: str) -> None:
    """UsageError for what is no text, and so the name of no file that other programs could open."""
    if "\0" in argument:
        raise click.UsageError(f"{argument!r} holds a null character")
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise click.UsageError(
            f"{argument!r} is not UTF-8: rename that file or folder, or name a link to it"
        ) from error


class MemorySize(click.ParamType):
    """Bytes: a number with an optional KB, MB, GB (powers of 1000), KiB, MiB or GiB."""

    name = "size"
    units: ClassVar[dict[str, int]] = {
        "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
        if match is None or match[2] not in self.units or float(match[1]) <= 0:
            self.fail(f"{value!r} is no size; write it as 24GB or 16GiB", param, ctx)
        return int(float(match[1]) * self.units[match[2]])


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("--trust-remote-code", is_flag=True, help="Run a tokenizer's or model's own Python code."),
        click.option("--dtype", default="auto", help="Compute type: auto, float32, bfloat16, float16."),
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
        click.option(
            "--seed", type=click.IntRange(0, 2**63 - 2), default=0, help="Seed of windows and of sampled text."
        ),
    ):
        command = option(command)
    return command


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
    """Which methods have the option, unless all have it, what it does, its values, and its defaults.

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
            metavar="TEXT",
            help="A .txt, a .jsonl with a `text` field, or `self`: sampled from the model (loads it whole).",
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
