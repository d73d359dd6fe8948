"""Files of a cache: named by what their contents follow from, written whole or not at all."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """safetensors' save_file, with a full disk raised as the OSError that it is."""
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        if "os error 28" in str(error):  # ENOSPC; safetensors hands the number on in its text only
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
        raise


def save_cached(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a file of a cache, whole or not at all; two runs may write the same one at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_tensors(tensors, temporary, metadata)
    temporary.replace(file)


def digest(identity: dict[str, Any]) -> str:
    """A file name's worth of everything that a file's contents follow from."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
