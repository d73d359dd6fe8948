"""Runs the command line inside the test process."""

import json
from dataclasses import dataclass
from typing import Any

import click
import pytest
import transformers

from pyprune.cli.main import cli, main


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def varied(*arguments: object) -> list[str]:
    """A command whose options a test gives anew after common ones: of each that takes one value, the last alone."""
    words = [str(argument) for argument in arguments]
    command = cli.get_command(click.Context(cli), words[0]) if words else None
    if command is None:
        return words
    single = {
        name
        for option in command.params
        if isinstance(option, click.Option) and not (option.is_flag or option.multiple)
        for name in option.opts
    }
    last = {word: place for place, word in enumerate(words) if word in single}
    stale = {place for place, word in enumerate(words) if last.get(word, place) != place}
    return [word for place, word in enumerate(words) if place not in stale and place - 1 not in stale]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """`pyprune ARGUMENTS`, as `varied` makes them: exit status, stdout, stderr."""
    capsys.readouterr()
    verbosity = transformers.logging.get_verbosity()
    with pytest.raises(SystemExit) as stop:
        main(varied(*arguments))
    transformers.logging.set_verbosity(verbosity)  # the program quietens transformers for its whole process
    captured = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return Outcome(stop.value.code, captured.out, captured.err)
