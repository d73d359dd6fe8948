"""`pyprune compare`."""

from pathlib import Path

import click

from .command import SETTINGS, Command
from .console import Console


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("outputs", metavar="OUTPUT OUTPUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--page", type=click.Path(path_type=Path), default=Path("comparison.html"), help="The page to write; a new file."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def compare(outputs: tuple[Path, ...], page: Path, as_json: bool) -> None:
    """Put several outputs of `pyprune prune` side by side: a table here, and one page with their layers.

    Figures are those that each run recorded; nothing is measured. Perplexities of different texts carry different
    letters, and runs of different base models are named.
    """
    from ..errors import InputError
    from ..exporters.exclusive import refuse_existing

    if len(outputs) < 2:
        raise InputError(f"{outputs[0]}: one output alone; name two or more")
    refuse_existing(page)
    from ..report.comparison import document_of, read_runs, summary_rows, write_comparison

    runs = read_runs(list(outputs))
    write_comparison(runs, page)
    Console(as_json).compared(document_of(runs) | {"page": str(page)}, summary_rows(runs), page)
