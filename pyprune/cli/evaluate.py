"""`pyprune evaluate`."""

from pathlib import Path
from typing import Any

import click

from ..runtime.names import split_names
from .command import SETTINGS, Command, device_options, given, quiet_transformers
from .console import Console
from .texts import evaluation_texts, text_options


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model")
@click.option("--text", metavar="TEXT", multiple=True, help="A text as --calibration of `pyprune prune`. Repeatable.")
@text_options
@click.option("--sequence-length", type=click.IntRange(2), default=2048, help="Tokens in a window.")
@click.option("--max-windows", type=click.IntRange(1), help="Windows at most.  [default: all; 64 for `self`]")
@click.option("--reference", metavar="DENSE", help="Also KL divergence and top-1 agreement with this model; its tasks.")
@click.option("--tasks", metavar="NAME,NAME", help="Tasks of lm-eval (pip install 'pyprune[eval]').")
@click.option("--include-path", type=click.Path(path_type=Path), help="Folder of more tasks, in lm-eval's YAML.")
@click.option("--limit", type=click.IntRange(1), help="Examples of each task at most.")
@click.option("--few-shot", type=click.IntRange(0), help="Solved examples before each.  [default: as the task says]")
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Sequences of a task in a forward pass.")
@device_options
def evaluate(
    model: str, as_json: bool, tasks: str | None, text: tuple[str, ...], sequence_length: int, **options: Any
) -> None:
    """Measure perplexity of MODEL in consecutive windows of each text, its accuracy on tasks, or both.

    Perplexity is exp of the mean over windows of each window's mean cross-entropy. `self` samples the text from DENSE
    if it is given, else from MODEL.
    """
    quiet_transformers()
    from .. import api
    from ..errors import InputError

    if tasks is not None and not split_names(tasks):
        raise InputError("no task is named")
    console = Console(as_json)
    with console.progress() as progress:
        result = api.evaluate(
            model,
            evaluation_texts(text),
            sequence_length=given("sequence_length", sequence_length),
            tasks=split_names(tasks),
            progress=progress,
            note=console.note,
            **options,
        )
    console.evaluated(result)
