"""`pyprune push`."""

from pathlib import Path

import click

from .command import SETTINGS, Command
from .console import Console


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it has to be made.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def push(output: Path, repository: str, private: bool, message: str | None, as_json: bool) -> None:
    """Upload OUTPUT, a folder that `pyprune prune` finished, to the model repository ORG/NAME of the hub.

    The folder is uploaded as it is, with README.md as the model card. The repository is made unless it exists, and is
    public unless --private is given or the organisation says otherwise. Repeat the command after an interruption: what
    the hub has is not sent again. Log in first by `hf auth login`, or set HF_TOKEN.
    """
    from ..publishing.push import push as upload

    console = Console(as_json)
    console.pushed(upload(output, repository, private, message))
