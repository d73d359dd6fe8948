"""Parts that commands share: options in groups, choices with suggestions, sizes, options of device and output."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import click
from click.core import ParameterSource

SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
# The groups of a help page, in their order; what has none comes last.
GROUPS = ("Model", "Calibration", "Method", "Memory and device", "Output", "Evaluation")
MODEL, CALIBRATION, METHOD, DEVICE, OUTPUT, EVALUATION = GROUPS


class Option(click.Option):
    """An option in a group of the help page; the ranges of numbers are left to the refusal."""

    def __init__(self, *arguments: Any, group: str = "", **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


def option(*names: str, group: str, **attributes: Any) -> Callable[[Any], Any]:
    """`click.option` with the group of the help page that it stands in."""
    return click.option(*names, cls=Option, group=group, **attributes)


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, shown in this order."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class Command(click.Command):
    """A command with grouped options, each given once: click would take the last value of several without a word.

    groups: of options, in the order of the help page.
    """

    def __init__(self, *arguments: Any, groups: Sequence[str] = GROUPS, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.groups = groups

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for argument in args:
            check_text(argument)
        if args and not ctx.resilient_parsing:
            given, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for option, times in Counter(each for each in order if isinstance(each, click.Option)).items():
                if times > 1 and not (option.multiple or option.is_flag or option.count):
                    raise click.UsageError(f"{option.opts[0]} is given {times} times; it takes one value", ctx)
            args = self.prepare(ctx, args, given)
        return super().parse_args(ctx, args)

    def prepare(self, ctx: click.Context, args: list[str], given: Mapping[str, Any]) -> list[str]:
        """What a command does with its arguments before they are read; `given`: by the parameters' names."""
        return args

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options under their groups' headings, in one column: a page that fits a screen has no room for gaps."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in (*self.groups, "")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                rows[parameter.group if isinstance(parameter, Option) else ""].append(record)
        width = max(len(names) for own in rows.values() for names, _ in own)
        grouped = any(own for group, own in rows.items() if group)
        formatter.write_paragraph()
        for group, own in rows.items():
            if not own:
                continue
            if group or not grouped:
                formatter.write(f"{group or 'Options'}:\n")
            with formatter.indentation():
                formatter.write_dl([(names.ljust(width), text) for names, text in own], col_max=width)


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


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the nearest of the known words, or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class Choice(click.Choice[str]):
    """One of several words; a wrong one is answered with the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return f"{value!r} is not one of {', '.join(self.choices)}{suggestion(str(value), self.choices)}"


class Device(click.ParamType):
    """The name of a device; completion offers those that every machine may have."""

    name = "device"
    common = ("auto", "cpu", "cuda", "cuda:0")

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in self.common if word.startswith(incomplete)]


class Amount(click.ParamType):
    """A whole number, written with an optional unit.

    units: by their lower-case spellings. example: ends the refusal.
    """

    units: ClassVar[dict[str, int]]
    example: ClassVar[str]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
        if match is None or match[2] not in self.units or float(match[1]) <= 0:
            self.fail(f"{value!r} is no {self.name}; write it as {self.example}", param, ctx)
        return int(float(match[1]) * self.units[match[2]])


class MemorySize(Amount):
    """Bytes: a number with an optional KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB or TiB."""

    name = "size"
    example = "24GB or 16GiB"
    units: ClassVar[dict[str, int]] = {
        "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
        "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    }  # fmt: skip


class ParameterCount(Amount):
    """A number of parameters, with an optional K, M, B or T (powers of 1000)."""

    name = "number of parameters"
    example = "5.0B or 350M"
    units: ClassVar[dict[str, int]] = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


revision_option = option(
    "--revision", metavar="NAME", group=MODEL, help="Branch, tag or commit of MODEL on the hub; or MODEL@NAME."
)

DTYPES = ("auto", "float32", "bfloat16", "float16")

device_options = options(
    option(
        "--dtype",
        type=Choice(DTYPES),
        metavar="TYPE",
        default="auto",
        group=MODEL,
        help="To compute in: auto, float32, bfloat16, float16.",
    ),
    revision_option,
    option("--trust-remote-code", is_flag=True, group=MODEL, help="Run Python code that comes with the model."),
    option("--device", type=Device(), metavar="NAME", default="auto", group=DEVICE, help="auto, cpu, cuda or cuda:N."),
    option("--json", "as_json", is_flag=True, group=OUTPUT, help="Print one JSON document on stdout."),
)


shard_size_option = option(
    "--shard-size",
    type=MemorySize(),
    metavar="SIZE",
    group=OUTPUT,
    help="Bytes in a file of weights at most.  [default: 5GB]",
)


def seed_option(help: str, group: str) -> Callable[[Any], Any]:
    return option("--seed", type=click.IntRange(0, 2**63 - 2), metavar="N", default=0, group=group, help=help)


def quiet_transformers() -> None:
    """Silence transformers' notes on reading a pruned configuration's global sizes, and its own progress bars."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def given(option: str, value: Any) -> Any:
    """The value that the user gave, typed or in a file of options; None for the option's default."""
    source = click.get_current_context().get_parameter_source(option)
    return None if source is ParameterSource.DEFAULT else value
