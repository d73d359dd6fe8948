"""`pyprune methods` and `pyprune backends`."""

import click

from ..errors import InputError
from .command import SETTINGS, Command
from .console import Console


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def methods(name: str | None, as_json: bool) -> None:
    """List the pruning methods and their options, or those of the method NAME."""
    from ..methods import list_methods

    known = list_methods()
    if name is not None and name not in known:
        raise InputError(f"unknown method {name!r}; known: {', '.join(known)}")
    Console(as_json).methods(known if name is None else {name: known[name]})


@click.command(cls=Command, context_settings=SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def backends(as_json: bool) -> None:
    """Show which backend runs each operator here, and why the others do not."""
    from ..ops.dispatch import describe, describe_installation

    Console(as_json).backends(describe(), describe_installation())
