"""stdout and stderr of every kind: closed, full, without a reader, or in an encoding that lacks characters.

Printing never raises. stderr only accompanies the work: text that it does not take is dropped. A loss on stdout is
remembered, and the program decides whether it is a failure.
"""

import codecs
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO

# Spellings of the characters that we print, for encodings without them.
_SPELLINGS = {
    "→": "->",
    "×": "x",
    "·": "*",
    "±": "+-",
    "Δ": "delta",
    "…": "...",
    "—": "-",
    "–": "-",
    "━": "-",
    "•": "*",
}
_ERRORS = "pyprune-spelled"


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """For one character that cannot be encoded: another spelling, or the very byte that a file's name holds."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # how Python carries a byte that is no text
        return bytes([ord(character) & 0xFF]), error.start + 1
    return _SPELLINGS.get(character, "?"), error.start + 1


codecs.register_error(_ERRORS, _spelled)


class Stream:
    """Text stream that takes everything; after the first fault it discards.

    `fault` is what went wrong, None while nothing did.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = io.TextIOWrapper(io.BytesIO(), "utf-8") if stream is None else stream
        self.fault: Exception | None = OSError(errno.EBADF, "it is closed") if stream is None else None

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, do: Callable[..., object], *arguments: object) -> None:
        if self.fault is not None:
            return
        try:
            do(*arguments)
        except (OSError, ValueError) as error:  # ValueError: closed from inside this process
            self.fault = error
            _send_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def spelled(self) -> Iterator[None]:
        """Make no character an encoding error within the context."""
        before = getattr(self._stream, "errors", None)
        with suppress(OSError, ValueError, AttributeError):  # AttributeError: no stream of bytes, so nothing is encoded
            self._stream.reconfigure(errors=_ERRORS)
        try:
            yield
        finally:
            with suppress(OSError, ValueError, AttributeError):
                self._stream.reconfigure(errors=before)


class Out(Stream):
    """stdout. `lost`: what it did not take, where that is a failure."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._forgiven = False

    @property
    def lost(self) -> Exception | None:
        self.flush()
        return None if self._forgiven else self.fault

    def forgive(self) -> None:
        self._forgiven = True


_out: Out | None = None


def forgive() -> None:
    """The work is done and its result is kept: a summary of it that stdout does not take is no failure."""
    if _out is not None:
        _out.forgive()


def is_lost() -> bool:
    """Return whether nobody will see what is printed, so that work done for that alone can end."""
    return _out is not None and _out.lost is not None


@contextmanager
def mended() -> Iterator[Out]:
    """Replace sys.stdout and sys.stderr by streams that accept everything within the context."""
    global _out
    reserve_descriptors()
    before, outer = (sys.stdout, sys.stderr), _out
    out, err = Out(sys.stdout), Stream(sys.stderr)
    with ExitStack() as stack:
        stack.enter_context(out.spelled())
        stack.enter_context(err.spelled())
        new: Any = (out, err)
        sys.stdout, sys.stderr = new
        _out = out
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before
            _out = outer


def reserve_descriptors() -> None:
    """Open what is closed of stdin, stdout and stderr, for reading alone: no other file may take their numbers.

    Else a shard would be stdout to a library that prints. Writing to them still fails.
    """
    with suppress(OSError):  # none to be had: then none of the three is free either
        while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)


def _send_nowhere(stream: Any) -> None:
    """Redirect the stream to /dev/null, so that Python's flush at its end does not fail again."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)
