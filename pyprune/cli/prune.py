"""`pyprune prune`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .command import SETTINGS, Command, MemorySize, device_options, given, quiet_transformers, shard_size_option
from .console import Console
from .options import method_options, options_given


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@method_options
@click.option("--device-memory", type=MemorySize(), help="Prune within so much GPU memory, e.g. 24GB.")
@shard_size_option
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of cached statistics.  [default: beside OUTPUT]")
@click.option("--resume", is_flag=True, help="Finish a run that was killed or ran out of disk space.")
@click.option("--allow-other-bits", is_flag=True, help="With --resume: on another processor or other versions too.")
@click.option("--allow-nonfinite", is_flag=True, help="Count NaN and Inf activations as zero.")
@click.option(
    "--verify/--no-verify",
    default=None,
    envvar="PYPRUNE_VERIFY",
    show_envvar=True,
    help="Load OUTPUT in a fresh process and compare its logits.  [default: up to 8 GiB in float32]",
)
@click.option("--evaluate", "text", metavar="TEXT", help="Perplexity before and after on a text, or `self`.")
@click.option("--evaluation-length", type=click.IntRange(2), default=1024, help="Tokens in an evaluation window.")
@click.option("--max-windows", type=click.IntRange(1), help="Evaluation windows at most.")
@device_options
def prune(model: str, output: Path, **options: Any) -> None:
    """Prune MODEL into the new folder OUTPUT, which holds a checkpoint, plan.json and report.html.

    OUTPUT appears whole or not at all. Load it with `import pyprune` and
    AutoModelForCausalLM.from_pretrained(OUTPUT).

    Started by torchrun, processes split the calibration windows, each on its own GPU:

        torchrun --nproc-per-node=8 -m pyprune prune MODEL OUTPUT ...
    """
    quiet_transformers()
    from .. import api

    same = (
        *(
            "method",
            "ratio",
            "calibration",
            "samples",
            "seed",
            "device",
            "dtype",
            "device_memory",
            "shard_size",
            "cache",
        ),
        *("resume", "allow_other_bits", "allow_nonfinite", "trust_remote_code", "max_windows", "verify"),
    )
    console = Console(options["as_json"])
    with console.progress() as progress, _resumable(output):
        record = api.prune(
            model,
            output,
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
