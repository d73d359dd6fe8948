"""Runs the command line, or a function, in several processes at once, as torchrun starts them."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from support.figures import leave_blank

# A clean process that has the libraries loaded forks the processes: each starts at once, none inherits a thread.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pyprune.api", "pyprune.cli.prune", "matplotlib.pyplot", "transformers.generation"])


@dataclass
class Ended:
    """One process: its exit status (minus the signal's number if it was killed), stdout and stderr."""

    status: int | None
    out: str
    err: str


def _enter(rank: int, size: int, port: int, logs: Path, what: Callable[[], object]) -> None:
    os.environ.update(
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank),
    )  # fmt: skip
    for stream in (sys.stdout, sys.stderr):
        file = os.open(logs / f"{rank}.{stream.fileno()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    torch.set_num_threads(1)
    leave_blank()
    what()


def start(logs: Path, *what: Callable[[], object]) -> list[Any]:
    """One process for each function, all of one run; every function has to be picklable."""
    logs.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SERVER.Process(target=_enter, args=(rank, len(what), port, logs, own)) for rank, own in enumerate(what)
    ]
    for process in processes:
        process.start()
    return processes


def ended(logs: Path, processes: list[Any]) -> list[Ended]:
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            process.kill()
    return [Ended(p.exitcode, *((logs / f"{k}.{n}").read_text() for n in (1, 2))) for k, p in enumerate(processes)]


def run_together(logs: Path, *what: Callable[[], object]) -> list[Ended]:
    return ended(logs, start(logs, *what))
