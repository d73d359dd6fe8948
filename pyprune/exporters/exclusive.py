"""File that is made beside its place under a temporary name, and moved there only if the place is still free."""

import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError

# What file systems say that have no hard links, or forbid them: FAT, some network and FUSE ones.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EINVAL}
_NO_RENAME = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


@contextmanager
def exclusive_file(output: Path) -> Iterator[Path]:
    """Hand over an empty file `.<output>.<random>.partial`; what is in it at the end becomes `output`.

    If an exception leaves it, the file goes, and so do the folders that were made for it. What killed processes left
    there for the same output goes at the beginning. InputError: `output` exists by now.
    """
    refuse_existing(output)
    made = [parent for parent in output.absolute().parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        _remove_leftovers(output)
        with _claimed(output) as partial:
            yield partial
            _place(partial, output)
    except BaseException:
        with suppress(OSError):  # another process may have put something there
            for parent in made:
                parent.rmdir()
        raise


def refuse_existing(output: Path) -> None:
    """InputError if the name is taken, even by a link that leads nowhere."""
    if os.path.lexists(output):
        raise InputError(f"{output}: exists; name another output")


@contextmanager
def _claimed(output: Path) -> Iterator[Path]:
    """A new file, locked while this process makes it; it is gone afterwards."""
    while True:
        partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        try:
            _lock(descriptor)
            if os.fstat(descriptor).st_nlink:  # else another process took it for a leftover before it was locked
                yield partial
                return
        finally:
            partial.unlink(missing_ok=True)
            os.close(descriptor)


def _remove_leftovers(output: Path) -> None:
    """Remove the files of processes that are gone: their locks went with them."""
    start, end = f".{output.name}.", ".partial"
    for entry in list(output.parent.iterdir()):
        inside = entry.name.removeprefix(start).removesuffix(end)
        if entry.name != start + inside + end or len(inside) != 8:
            continue
        with suppress(OSError):  # somebody else's, or gone
            descriptor = os.open(entry, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if _lock(descriptor):
                    entry.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Return whether this process now has the lock. A file system without locks gives none, so leftovers stay there."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _place(partial: Path, output: Path) -> None:
    """Make the file `output`, in one step and never in the place of another."""
    try:
        try:
            os.link(partial, output)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _rename_exclusively(partial, output)
    except FileExistsError as error:
        raise InputError(f"{output}: exists; name another output") from error


def _rename_exclusively(partial: Path, output: Path) -> None:
    """Place a file on a system without hard links. FileExistsError: `output` exists."""
    at_folder, no_replace = -100, 1  # AT_FDCWD in fcntl.h, RENAME_NOREPLACE in linux/fs.h
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(at_folder, os.fsencode(partial), at_folder, os.fsencode(output), no_replace) == 0:
            return
        number = ctypes.get_errno()
        if number not in _NO_RENAME:
            raise OSError(number, os.strerror(number), str(output))
    os.close(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))  # takes the name
    os.replace(partial, output)
