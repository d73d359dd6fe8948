"""`pyprune export`."""

from pathlib import Path

import click

from .command import OUTPUT, SETTINGS, Choice, Command, option, quiet_transformers, revision_option, shard_size_option
from .console import Console

FORMATS = ("stock", "remote-code", "gguf", "padded")
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@revision_option
@option(
    "--format",
    "layout",
    type=Choice(FORMATS),
    metavar="NAME",
    required=True,
    group=OUTPUT,
    help="One of the above.",
)
@option(
    "--dtype",
    type=Choice(GGUF_DTYPES),
    metavar="TYPE",
    group=OUTPUT,
    help="gguf: f32, f16, bf16, q8_0.  [default: f16]",
)
@shard_size_option
@option("--no-verify", is_flag=True, group=OUTPUT, help="Do not load the result and compare its logits with MODEL's.")
@option("--json", "as_json", is_flag=True, group=OUTPUT, help="Print one JSON document on stdout.")
def export(
    model: str,
    output: Path,
    revision: str | None,
    layout: str,
    dtype: str | None,
    shard_size: int | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Write the pruned MODEL as OUTPUT in a layout that other programs load.

    \b
    stock        a transformers class that every engine knows; needs the same sizes in every layer
    remote-code  as it is, with its model code beside it: loads with trust_remote_code=True, without pyprune
    gguf         one file for llama.cpp and Ollama; layers may differ
    padded       zeros up to the widest layer, in a stock class: to evaluate it, no smaller and no faster

    OUTPUT appears whole or not at all, once a fresh process has loaded it and its logits are those of MODEL.
    """
    quiet_transformers()
    from .. import api

    console = Console(as_json)
    with console.progress() as progress:
        result = api.export(
            model,
            output,
            layout,
            revision=revision,
            dtype=dtype,
            shard_size=shard_size,
            verify=not no_verify,
            progress=progress,
        )
    console.exported(result)
