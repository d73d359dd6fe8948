"""Options that say which texts are read, and how."""

from collections.abc import Callable
from typing import Any

import click

from ..calibration.packing import CONCATENATE, PACKINGS


def text_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the rows of a text become windows: `--text-column` and `--packing`."""
    for option in (
        click.option(
            "--packing",
            type=click.Choice(PACKINGS),
            default=CONCATENATE,
            help="Windows start anywhere in the joined documents, or each at a document.",
        ),
        click.option(
            "--text-column",
            metavar="NAME",
            help="Column of the rows.  [default: text, else messages or conversations, by the chat template]",
        ),
    ):
        command = option(command)
    return command


def evaluation_texts(words: tuple[str, ...]) -> Any:
    """The text of `--text`, or several by their names; None without one."""
    if len(set(words)) < len(words):
        raise click.UsageError(f"--text names {max(words, key=words.count)} twice")
    return None if not words else words[0] if len(words) == 1 else {word: word for word in words}
