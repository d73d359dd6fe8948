"""Runs the command line in processes that are forked from one with every library loaded (fork_server.py)."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

_SERVER = Path(__file__).with_name("fork_server.py")
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYPRUNE_VERIFY": "0",  # of its own processes, which take seconds; who tests just that says --verify
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Ended:
    """A command: its exit status (minus the signal's number if one ended it; None: it was still running at the time
    limit), stdout and stderr."""

    status: int | None
    out: str
    err: str

    def __str__(self) -> str:
        lines = self.err.rstrip().splitlines()
        return f"status {self.status}, stderr ends {' / '.join(lines[-2:])[-500:]!r}"


class Running:
    """A command that was started."""

    def __init__(self, server: "ForkServer", number: int, logs: Path) -> None:
        self.server, self.number, self.logs = server, number, logs
        self.answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.pid = 0

    def send(self, number: int) -> None:
        """A signal, unless it has ended."""
        self.server.ask({"number": self.number, "signal": number})

    def wait(self, seconds: float = 60) -> Ended:
        """Its end, by SIGKILL after so many seconds."""
        status = self._status(seconds)
        if status is None:
            self.send(signal.SIGKILL)
            self._status(None)
        out, err = ((self.logs / name).read_text(errors="replace") for name in ("out", "err"))
        return Ended(status, out, err)

    def _status(self, seconds: float | None) -> int | None:
        try:
            answer = self.answers.get(timeout=seconds)
        except queue.Empty:
            return None
        if "status" not in answer:
            raise RuntimeError("the fork server ended")
        return int(answer["status"])

    def left_alive(self) -> list[str]:
        """Processes of its session that still run, killed by this."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _session(entry) == self.pid:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                os.kill(int(entry.name), signal.SIGKILL)
        return found


def _session(process: Path) -> int | None:
    """The session of a process that is no zombie."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return None
    return None if fields[0] == "Z" else int(fields[3])


class ForkServer:
    """A context; several threads may start commands of it at once."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.scratch = scratch
        self._numbers = count()
        self._running: dict[int, Running] = {}
        self._lock = threading.Lock()
        environment = os.environ | _ENVIRONMENT | {"MPLCONFIGDIR": str(scratch / "matplotlib")}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, _SERVER], stdin=pipe, stdout=pipe, env=environment)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("the fork server does not start")
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def start(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        stops: Mapping[str, int] | None = None,
    ) -> Running:
        """`pyprune ARGUMENTS` in a working directory.

        limits: of setrlimit, by name without RLIMIT_; AS is what may be added to what the process has. stops: where it
        dies as by SIGKILL, `parts` or `layers` (of a calibration pass) being done.
        """
        number = next(self._numbers)
        logs = self.scratch / f"{number}"
        logs.mkdir()
        for name in ("out", "err"):
            (logs / name).touch()
        running = self._running[number] = Running(self, number, logs)
        self.ask(
            {
                "number": number,
                "arguments": [str(argument) for argument in arguments],
                "folder": str(folder),
                "logs": str(logs),
                "environment": dict(environment or {}),
                "limits": dict(limits or {}),
                "stops": dict(stops or {}),
            }
        )
        running.pid = running.answers.get()["pid"]
        return running

    def run(self, arguments: Sequence[object], folder: Path, **options: Any) -> Ended:
        return self.start(arguments, folder, **options).wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            self._running[answer["number"]].answers.put(answer)
        for running in self._running.values():  # nobody waits for ever
            running.answers.put({})
