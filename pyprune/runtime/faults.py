"""Every error that reaches the command line, as the one line that the user reads and the exit status."""

import errno
import os
import resource
from collections.abc import Callable

import torch
from safetensors import SafetensorError

from ..errors import InputError, VerificationError
from .device import oom_summary
from .files import reason_of

_MEMORY = "out of memory{limit}: free some, or ask for less (fewer --samples, a shorter --sequence-length)"
# Refusals by a limit of the system: words, the limit that may be meant, the shell's name of it.
_LIMITS: dict[int, tuple[str, int, str]] = {
    errno.EFBIG: ("larger than a file may be{limit}: raise the limit", resource.RLIMIT_FSIZE, "ulimit -f"),
    errno.EMFILE: ("too many open files{limit}: raise the limit", resource.RLIMIT_NOFILE, "ulimit -n"),
    errno.ENOMEM: (_MEMORY, resource.RLIMIT_AS, "ulimit -v"),
    errno.EAGAIN: ("no further thread or process{limit}: raise the limit", resource.RLIMIT_NPROC, "ulimit -u"),
}
# Errors of a file or folder that the user named, or of one in it: the user can mend them.
_PLACES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.EXDEV, errno.EBUSY, errno.ETXTBSY, errno.ENXIO),
}
_FULL = {errno.ENOSPC, errno.EDQUOT}
# Words of PyTorch, numpy and the C library in errors that say no more than these.
_WORDS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("unable to mmap", "allocate", "not enough memory", "bad_alloc", "cannot map"), errno.ENOMEM),
    (("can't start new thread", "resource temporarily unavailable", "thread creation failed"), errno.EAGAIN),
    (("too many open files",), errno.EMFILE),
    (("file too large",), errno.EFBIG),
    (("no space left",), errno.ENOSPC),
)


def explain(error: BaseException) -> tuple[str, int] | None:
    """(line, status): 2 for what the user or the machine's limits are to blame for, else 1. None: an error of ours."""
    for kind, words in _EXPLAINED:
        if isinstance(error, kind):
            return words(error)
    return None


def is_limit(error: BaseException | None) -> bool:
    """Return whether the system refused something to this process, and not what a file holds is to blame."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _LIMITS)


def _device(error: BaseException) -> tuple[str, int]:
    assert isinstance(error, torch.OutOfMemoryError)
    return f"the device is out of memory: {oom_summary(error)}; free some, or give --device-memory", 2


def _system(error: BaseException) -> tuple[str, int]:
    assert isinstance(error, OSError)
    where = error.filename if error.filename is not None else "operating system"
    where = os.fsdecode(where) if isinstance(where, bytes) else where
    if error.errno in _LIMITS:
        return f"{where}: {_beyond(error.errno)}", 2
    if error.errno in _FULL:
        return f"{where}: no space left on the device; free some", 2
    named = error.filename is not None and error.errno in _PLACES
    return f"{where}: {reason_of(error)}", 2 if named else 1


def _library(error: BaseException) -> tuple[str, int] | None:
    """Tell errors of libraries by their words: they have one class for everything."""
    said = str(error).lower()
    if "symlink loop" in said:  # pathlib's, with the path
        return reason_of(error), 2
    for words, number in _WORDS:
        if any(word in said for word in words):
            return _system(OSError(number, ""))
    return None


def _damaged(error: BaseException) -> tuple[str, int]:
    return _library(error) or (f"a safetensors file is damaged: {reason_of(error)}", 2)


def _panic(error: BaseException) -> tuple[str, int] | None:
    """Libraries in Rust panic where a file makes no sense: no Exception, and of no class that could be imported."""
    if type(error).__name__ != "PanicException":
        return None
    return f"a tokenizer's file is damaged: its library ends with {reason_of(error)!r}", 2


def _null_character(error: BaseException) -> tuple[str, int] | None:
    return ("a path holds a null character", 2) if "embedded null" in str(error) else None


def _encoding(error: BaseException) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = os.fsencode(error.object).decode("utf-8", "backslashreplace") if _is_path(error.object) else error.object
    return f"{text[:200]!r} cannot be written in {error.encoding}: name files and folders in UTF-8", 2


def _is_path(text: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in text)


def _beyond(number: int) -> str:
    """Words for a refusal by a limit of the process, with its value if there is one."""
    words, kind, shown = _LIMITS[number]
    soft, _ = resource.getrlimit(kind)
    return words.format(limit="" if soft == resource.RLIM_INFINITY else f" ({shown} is {soft:,} here)")


# The first class that fits speaks; one that has nothing to say about an error has None.
_EXPLAINED: tuple[tuple[type[BaseException], Callable[[BaseException], tuple[str, int] | None]], ...] = (
    (InputError, lambda error: (str(error), 2)),
    (VerificationError, lambda error: (str(error), 1)),
    (torch.OutOfMemoryError, _device),
    (MemoryError, lambda _: (_beyond(errno.ENOMEM), 2)),
    (RecursionError, lambda _: ("the input is nested deeper than Python follows", 2)),
    (OSError, _system),
    (SafetensorError, _damaged),
    (UnicodeEncodeError, _encoding),
    (ValueError, _null_character),
    (RuntimeError, _library),
    (BaseException, _panic),
)
