"""Parts that commands share: one value an option, memory sizes, options of device and output."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import click
from click.core import ParameterSource

SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


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


shard_size_option = click.option(
    "--shard-size", type=MemorySize(), help="Size of the safetensors files, at most.  [default: 5GB]"
)


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


def quiet_transformers() -> None:
    """Silence transformers' notes on reading a pruned configuration's global sizes, and its own progress bars."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def given(option: str, value: Any) -> Any:
    """The value that the user typed; None for the option's default."""
    source = click.get_current_context().get_parameter_source(option)
    return None if source is ParameterSource.DEFAULT else value
