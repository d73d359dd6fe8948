"""`pyprune evaluate`."""

from pathlib import Path
from typing import Any

import click

from ..runtime.names import split_names
from .command import (
    DEVICE,
    EVALUATION,
    MODEL,
    OUTPUT,
    SETTINGS,
    Command,
    device_options,
    given,
    option,
    quiet_transformers,
    seed_option,
)
from .console import Console
from .texts import evaluation_texts, text_options


@click.command(cls=Command, groups=(MODEL, EVALUATION, DEVICE, OUTPUT), context_settings=SETTINGS)
@click.argument("model")
@option(
    "--text",
    metavar="TEXT",
    multiple=True,
    group=EVALUATION,
    help="As --calibration of pyprune prune: a file, a data set of the hub, builtin or self. Repeatable.",
)
@text_options(EVALUATION)
@option(
    "--sequence-length",
    type=click.IntRange(2),
    metavar="N",
    default=2048,
    show_default=False,
    group=EVALUATION,
    help="Tokens in a window.  [default: 2048, or as many as MODEL takes]",
)
@option(
    "--max-windows",
    type=click.IntRange(1),
    metavar="N",
    group=EVALUATION,
    help="Windows at most.  [default: all; 64 for self]",
)
@option(
    "--reference",
    metavar="DENSE",
    group=EVALUATION,
    help="A model to compare with: KL divergence and agreement of the likeliest tokens on TEXT, accuracy on tasks.",
)
@option("--tasks", metavar="NAME,NAME", group=EVALUATION, help="Tasks of lm-eval (pip install 'pyprune[eval]').")
@option(
    "--include-path",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    group=EVALUATION,
    help="Folder of more tasks, in lm-eval's YAML.",
)
@option("--limit", type=click.IntRange(1), metavar="N", group=EVALUATION, help="Examples of each task at most.")
@option(
    "--few-shot",
    type=click.IntRange(0),
    metavar="N",
    group=EVALUATION,
    help="Solved examples before each one.  [default: as the task says]",
)
@option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    default=8,
    group=EVALUATION,
    help="Sequences of a task that go through the model at once.",
)
@seed_option("Seed of sampled text.", EVALUATION)
@device_options
def evaluate(
    model: str, as_json: bool, tasks: str | None, text: tuple[str, ...], sequence_length: int, **options: Any
) -> None:
    """Measure perplexity of MODEL on texts, its accuracy on tasks, or both. MODEL is a checkpoint folder or hub id.

    A window is a run of consecutive tokens; windows do not overlap. Perplexity is exp of the mean over windows of each
    window's mean cross-entropy. self samples the text from DENSE if it is given, else from MODEL.
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
