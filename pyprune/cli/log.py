"""`--verbose` and `--log-file`: each step of a run with its time, and what the run decided."""

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from ..runtime.progress import Progress
from .command import OUTPUT, option, options

LOGGER = logging.getLogger("pyprune")
FORMAT = "%(asctime)s %(levelname)s %(message)s"

log_options = options(
    option("--log-file", type=click.Path(path_type=Path), metavar="FILE", group=OUTPUT, help="Append each step to it."),
    option("-v", "--verbose", is_flag=True, group=OUTPUT, help="Print each step, its time and its settings on stderr."),
)


@contextmanager
def logged(options: dict[str, Any], progress: Progress) -> Iterator[Progress]:
    """Write the steps of a run where `--verbose` and `--log-file` say; yields the callback that reports progress.

    Of several processes the first one writes. InputError: the file cannot be written.
    """
    from ..runtime import distributed

    if not distributed.is_main_process() or not (options["verbose"] or options["log_file"]):
        yield progress
        return
    with ExitStack() as stack:
        if options["log_file"] is not None:
            stack.enter_context(handled(file_handler(options["log_file"])))
        # What stopped the run is the program's own last line there.
        shown = logging.StreamHandler(sys.stderr)
        shown.setLevel(logging.INFO if options["verbose"] else logging.WARNING)
        shown.addFilter(lambda record: record.levelno < logging.ERROR)
        stack.enter_context(handled(shown))
        LOGGER.info("%s", shlex.join(["pyprune", *sys.argv[1:]]))
        steps = Steps(progress)
        try:
            yield steps
        except BaseException as error:
            LOGGER.error("stopped: %s: %s", type(error).__name__, error)
            raise
        finally:
            steps.close()


class Steps:
    """A progress callback that logs when a step begins and ends, and hands everything on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.begun: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        name = what.split(":")[0]  # figures may follow, which change as it goes
        if name not in self.begun:
            self.begun[name] = perf_counter()
            LOGGER.info("%s: begun, %d steps", name, total)
        if done == total and self.begun[name] >= 0:
            LOGGER.info("%s: done in %.1f s", name, perf_counter() - self.begun[name])
            self.begun[name] = -1.0
        self.progress(what, done, total)

    def close(self) -> None:
        for name, start in self.begun.items():
            if start >= 0:
                LOGGER.info("%s: not finished after %.1f s", name, perf_counter() - start)


def file_handler(path: Path) -> logging.Handler:
    """A handler that appends to the file. InputError: it cannot be opened."""
    from ..errors import InputError
    from ..runtime.files import reason_of

    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--log-file {path}: cannot be written: {reason_of(error)}") from error
    handler.setFormatter(logging.Formatter(FORMAT))
    return handler


@contextmanager
def handled(handler: logging.Handler) -> Iterator[None]:
    """The package's logger at level INFO with one more handler."""
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        handler.close()
