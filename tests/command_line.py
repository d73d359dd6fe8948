"""Runs the command line inside the test process."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import transformers

from pyprune.cli import main


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """`pyprune ARGUMENTS`: exit status, stdout, stderr."""
    capsys.readouterr()
    verbosity = transformers.logging.get_verbosity()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    transformers.logging.set_verbosity(verbosity)  # the program quietens transformers for its whole process
    captured = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return Outcome(stop.value.code, captured.out, captured.err)
