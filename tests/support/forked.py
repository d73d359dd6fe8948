"""Runs the command line, or a script, in a process forked from one that has the libraries loaded: with its own
descriptors, signals and limits, and without the seconds that importing takes."""

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 (as the next ones: once, not in every process)
import torch

import pyprune.benchmark.run
import pyprune.exporters
import pyprune.pipeline.run  # noqa: F401
from pyprune.cli.main import main


@dataclass
class Running:
    """A process under way; what it prints is in `out` and `err`."""

    pid: int
    out: Path
    err: Path
    status: int | None = field(default=None)  # its exit status, minus the signal's number if one ended it

    def wait(self, seconds: float = 60) -> int:
        """The exit status; a process that takes longer is killed."""
        deadline = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                deadline += 10
            else:
                time.sleep(0.005)
        return self.status

    @property
    def lines(self) -> list[str]:
        """What the program itself says on stderr; no traceback is among the rest."""
        said = self.err.read_text(errors="replace")
        assert "Traceback" not in said, said
        assert "Exception ignored" not in said, said
        return [line for line in said.splitlines() if line.startswith("pyprune: ")]


def start(folder: Path, *arguments: object, first: Callable[[], object] = lambda: None, **how: Any) -> Running:
    """`pyprune ARGUMENTS` after `first()`; `how`: as of `start_function`."""

    def command() -> None:
        first()
        main([str(argument) for argument in arguments])

    return start_function(folder, command, **how)


def start_function(
    folder: Path,
    what: Callable[[], object],
    *,
    out: int | None = None,
    err: int | None = None,
    encoding: str = "utf-8",
) -> Running:
    """`what()` as a program. out, err: descriptors instead of files in `folder`, -1: closed."""
    number = len(list(folder.glob("*.out")))
    running = Running(0, folder / f"{number}.out", folder / f"{number}.err")
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for path in (running.out, running.err)]
    sys.stdout.flush()
    sys.stderr.flush()
    running.pid = os.fork()
    if running.pid:
        for file in files:
            os.close(file)
        return running
    code = 0
    try:
        given = [own if asked is None else asked for own, asked in zip(files, (out, err), strict=True)]
        _enter(given, encoding)
        what()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 97
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except OSError:
                code = 120  # as Python itself ends when the rest of stdout cannot be written
        os._exit(code)


def run(folder: Path, *arguments: object, **how: Any) -> Running:
    running = start(folder, *arguments, **how)
    running.wait()
    return running


def run_script(folder: Path, script: Path, *arguments: object, first: Callable[[], object] = lambda: None) -> Running:
    """`python SCRIPT ARGUMENTS` in the folder, after `first()`."""

    def program() -> None:
        os.chdir(folder)
        sys.argv = [str(script), *map(str, arguments)]
        first()
        runpy.run_path(str(script), run_name="__main__")

    running = start_function(folder, program)
    running.wait(300)
    return running


def _enter(given: list[int], encoding: str) -> None:
    """The state of a process that has just been started."""
    os.setsid()
    torch.set_num_threads(1)
    streams = []
    for number, descriptor in zip((1, 2), given, strict=True):
        if descriptor == -1:
            os.close(number)
            streams.append(None)
        else:
            os.dup2(descriptor, number)
            streams.append(os.fdopen(number, "w", encoding=encoding, closefd=False))
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
