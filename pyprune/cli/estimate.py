"""`pyprune estimate`."""

from typing import Any

import click

from .command import DEVICE, SETTINGS, MemorySize, device_options, given, option, quiet_transformers
from .console import Console
from .options import options_given, prune_options
from .run_file import FileCommand, config_option

ASKED = ("revision", "method", "ratio", "target_size", "parameters", "samples", "device", "dtype", "device_memory")


class Gpu(click.ParamType):
    """The name of a GPU whose rates are known, in any spelling: RTX 4090, rtx4090."""

    name = "gpu"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..errors import InputError
        from ..estimation.time import gpu_named

        try:
            return gpu_named(value)
        except InputError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        from ..estimation.time import GPU_RATES

        return [CompletionItem(name) for name in GPU_RATES if name.startswith(incomplete.lower())]


@click.command(cls=FileCommand, context_settings=SETTINGS)
@click.argument("model")
@prune_options
@device_options
@option(
    "--on",
    type=Gpu(),
    metavar="GPU",
    group=DEVICE,
    help="A GPU that is not here: a100, h100, h200, b200, l40s, rtx4090 or rtx5090.",
)
@option("--device-memory", type=MemorySize(), metavar="SIZE", group=DEVICE, help="Use at most this GPU memory: 24GB.")
@config_option
def estimate(model: str, on: str | None, **options: Any) -> None:
    """Predict sizes, parameters, time and peak memory of a pruning of MODEL, a checkpoint folder or hub id.

    Reads no weights and writes nothing. The options are those of pyprune prune.
    """
    quiet_transformers()
    print_estimate(model, on, options)


def print_estimate(model: str, on: str | None, options: dict[str, Any]) -> None:
    from .. import api
    from ..calibration.mixture import spelled_texts

    console = Console(options["as_json"])
    result = api.estimate(
        model,
        calibration=spelled_texts(options["calibration"]),
        sequence_length=given("sequence_length", options["sequence_length"]),
        note=console.note,
        on=on,
        **{name: options[name] for name in ASKED},
        **options_given(options),
    )
    console.estimated(result.to_json())
