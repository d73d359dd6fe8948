"""Lock of an unfinished output: one process at a time works there, and the lock ends with it."""

import errno
import fcntl
import logging
import os
from pathlib import Path

from ..errors import InputError

logger = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class FolderLock:
    """An exclusive lock on a folder, until `release` or the end of the process, however it ends.

    Raises:
        InputError: another process holds it, or renamed the folder meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        taken = InputError(f"{folder}: another run is at work there; wait for it, or name another output")
        try:
            self._descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError as error:
            raise taken from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise taken from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(self._descriptor)
                raise
            logger.warning("%s: this file system has no locks: do not start two runs on one output", folder)
        if not self._is(folder):
            self.release()
            raise taken

    def _is(self, folder: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(folder))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        os.close(self._descriptor)
