"""`pyprune prune`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .command import (
    DEVICE,
    EVALUATION,
    OUTPUT,
    SETTINGS,
    MemorySize,
    device_options,
    given,
    option,
    quiet_transformers,
    shard_size_option,
)
from .console import Console
from .log import log_options, logged
from .options import options_given, prune_options
from .run_file import FileCommand, config_option

SAME = (
    "revision",
    *("method", "ratio", "target_size", "parameters", "packing", "text_column", "samples", "seed"),
    *("device", "dtype", "device_memory", "trust_remote_code"),
)


@click.command(cls=FileCommand, context_settings=SETTINGS)
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@prune_options
@device_options
@option("--device-memory", type=MemorySize(), metavar="SIZE", group=DEVICE, help="Use at most this GPU memory: 24GB.")
@option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    group=DEVICE,
    help="Folder of statistics to reuse.  [default: beside OUTPUT]",
)
@option(
    "--resume",
    is_flag=True,
    group=DEVICE,
    help="Finish a stopped run; --allow-other-bits: on another processor.",
)
@option("--allow-other-bits", is_flag=True, group=DEVICE, hidden=True)
@option("--allow-nonfinite", is_flag=True, group=DEVICE, help="Count NaN and Inf that the layers compute as zero.")
@config_option
@option("--dry-run", is_flag=True, group=OUTPUT, help="Only print sizes, time and memory, as pyprune estimate does.")
@shard_size_option
@option(
    "--verify/--no-verify",
    default=None,
    envvar="PYPRUNE_VERIFY",
    group=OUTPUT,
    help="Load OUTPUT and compare its logits.  [default: up to 8 GiB]",
)
@log_options
@option(
    "--evaluate",
    "text",
    metavar="TEXT",
    group=EVALUATION,
    help="Perplexity before and after on a text, as --calibration.",
)
@option(
    "--evaluation-length",
    type=click.IntRange(2),
    metavar="N",
    default=1024,
    show_default=False,
    group=EVALUATION,
    help="Tokens in a window.  [default: 1024, or as many as MODEL takes]",
)
@option("--max-windows", type=click.IntRange(1), metavar="N", group=EVALUATION, help="Windows at most.  [default: all]")
def prune(model: str, output: Path, **options: Any) -> None:
    """Prune MODEL, a checkpoint folder or hub id, into the new folder OUTPUT: a smaller checkpoint, plan.json and
    report.html (results), run.yaml (options). OUTPUT appears whole or not at all.
    """
    quiet_transformers()
    if options["dry_run"]:
        from .estimate import print_estimate

        print_estimate(model, None, options)
        return
    from .. import api
    from ..calibration.mixture import spelled_texts

    same = (*SAME, "cache", "resume", "allow_other_bits", "allow_nonfinite", "max_windows", "verify", "shard_size")
    console = Console(options["as_json"])
    with console.progress() as progress, _resumable(output), logged(options, progress) as progress:
        record = api.prune(
            model,
            output,
            calibration=spelled_texts(options["calibration"]),
            sequence_length=given("sequence_length", options["sequence_length"]),
            evaluate_on=options["text"],
            evaluation_length=given("evaluation_length", options["evaluation_length"]),
            progress=progress,
            **{name: options[name] for name in same},
            **options_given(options),
        )
    console.pruned(record.to_json(), output)


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """A run that is stopped within it says how to go on, once there is something to go on with."""
    from ..checkpoint import JOURNAL, partial_of

    try:
        yield
    except BaseException as stop:  # a library may have put an error of its own in the place of the signal's
        partial = partial_of(output)
        if (partial / JOURNAL).is_file():
            stop.add_note(f"{partial} keeps what is finished: repeat with --resume")
        raise
