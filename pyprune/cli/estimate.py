"""`pyprune estimate`."""

from typing import Any

import click

from ..estimation.time import GPU_RATES
from .command import SETTINGS, Command, MemorySize, device_options, given, quiet_transformers
from .console import Console
from .options import method_options, options_given
from .texts import text_options


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model")
@method_options
@text_options
@click.option("--on", type=click.Choice(list(GPU_RATES)), help="Ask about a GPU that is not here.")
@click.option("--device-memory", type=MemorySize(), help="As in `pyprune prune`.")
@device_options
def estimate(model: str, **options: Any) -> None:
    """Predict what a pruning of MODEL would do: sizes, parameters, time, peak memory.

    Reads no weights, writes nothing.
    """
    quiet_transformers()
    from .. import api

    console = Console(options["as_json"])
    result = api.estimate(
        model,
        sequence_length=given("sequence_length", options["sequence_length"]),
        note=console.note,
        **{name: options[name] for name in ("method", "ratio", "samples", "device", "dtype", "device_memory", "on")},
        **options_given(options),
    )
    console.estimated(result.to_json())
