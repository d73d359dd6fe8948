"""Options that say which texts are read, and how."""

from collections.abc import Callable
from typing import Any

import click

from ..calibration import CONCATENATE, PACKINGS
from .command import Choice, option, options


def text_options(group: str) -> Callable[[Any], Any]:
    """How the rows of a text become windows: `--text-column` and `--packing`, in a group of the help."""
    return options(
        option(
            "--text-column",
            metavar="NAME",
            group=group,
            help="Column of its rows.  [default: text, messages, conversations]",
        ),
        option(
            "--packing",
            type=Choice(PACKINGS),
            metavar="HOW",
            default=CONCATENATE,
            group=group,
            help="Windows start anywhere; separate: at documents.",
        ),
    )


def evaluation_texts(words: tuple[str, ...]) -> Any:
    """The text of `--text`, or several by their names; None without one."""
    if len(set(words)) < len(words):
        raise click.UsageError(f"--text names {max(words, key=words.count)} twice")
    return None if not words else words[0] if len(words) == 1 else {word: word for word in words}
