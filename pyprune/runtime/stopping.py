"""Signals that ask the program to end: Ctrl-C, SIGTERM, SIGHUP. Nothing here imports more than Python's own.

While the program works, the first of them is an exception, so that everything begun is ended and tidied on the way out.
Before that, while the libraries are imported, there is nothing to tidy, and it ends the process at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

REASONS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated (SIGTERM)",
    signal.SIGHUP: "ended with its terminal (SIGHUP)",
}
# Seconds after the first signal in which later ones are the same wish (an impatient user, a terminal and torchrun
# both). After that they mean that tidying takes too long.
PATIENCE = 3.0


class Stopped(BaseException):
    """A signal arrived. Neither Exception nor KeyboardInterrupt: a library would handle those.

    Notes (`add_note`) become part of the line that the user reads.
    """

    def __init__(self, number: int) -> None:
        super().__init__(REASONS[signal.Signals(number)])
        self.number = number

    @property
    def status(self) -> int:
        """Exit status that a shell reports for a process ended by the signal."""
        return 128 + self.number


def is_program() -> bool:
    """Return whether this process runs `pyprune` or `python -m pyprune`; true while its modules are imported."""
    if not getattr(sys, "argv", None):
        return False
    if sys.argv[0] != "-m":
        return os.path.basename(sys.argv[0]) == "pyprune"
    # The name of the module stands before its arguments: `-m pyprune ...` or `-mpyprune ...`
    return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "pyprune"


def guard_start() -> None:
    """Until `Stops` takes over, a signal ends the process with its line and nothing else."""
    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:
            _end_at_once(number)
        end_by(number)

    _install(end)


def end_by(number: int) -> None:
    """Let a signal end this process as if nobody had ever handled it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class Stops:
    """Within it signals are handled: between `arm` and `disarm` the first one raises Stopped in the main thread.

    One that comes before is raised by `arm`; one that comes later is too late to matter. Signals that were ignored, as
    under nohup, stay ignored; the handlers of before are put back at the end.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._armed = False
        self._first: float | None = None
        self._number = 0
        self._raised: int | None = None

    def __enter__(self) -> "Stops":
        self._dropped = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        self._before = _install(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._dropped

    @property
    def raised(self) -> int | None:
        """The signal for which Stopped was raised, if one came while armed."""
        return self._raised

    def arm(self) -> None:
        self._armed = True
        if self._first is not None:
            self._stop()

    def disarm(self) -> None:
        self._armed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # of a worker that a library forked
            end_by(number)
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._number = now, number
            if self._armed:
                self._stop()
        elif now - self._first > PATIENCE:
            _end_at_once(number)

    def _stop(self) -> NoReturn:
        self._raised = self._number
        raise Stopped(self._number)

    def _unraisable(self, dropped: Any) -> None:
        """Python drops what is raised in a destructor or a callback of the collector: raise it again a little later."""
        if not isinstance(dropped.exc_value, Stopped):
            self._dropped(dropped)
            return
        self._first = None
        again = threading.Timer(0.05, os.kill, (self._process, dropped.exc_value.number))
        again.daemon = True
        again.start()


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle the signals so, unless they are ignored; the handlers of before. Only the main thread may."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in REASONS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    return before


def _end_at_once(number: int) -> None:
    stopped = Stopped(number)
    try:
        os.write(2, f"pyprune: {stopped}\n".encode())
    except OSError:  # nobody is there to read it
        pass
    finally:
        os._exit(stopped.status)
