"""Files of a cache: named by what their contents follow from, written whole or not at all, checked when read."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..runtime.faults import is_limit
from ..runtime.files import parse_json, reason_of
from .content import digest_of
from .headers import open_safetensors

_DIGEST, _IDENTITY = "digest", "identity"


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """safetensors' save_file, with what the system refuses raised as the OSError that it is."""
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # safetensors hands it on in its text only
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def save_cached(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str], identity: dict[str, Any] | None = None
) -> None:
    """Write a file of a cache, whole or not at all; two runs may write the same one at once.

    identity: what the contents follow from; `load_cached` compares it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = metadata | {_IDENTITY: json.dumps(identity, sort_keys=True)}
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_tensors(tensors, temporary, metadata | {_DIGEST: _digest(tensors, metadata)})
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def load_cached(
    file: Path, what: str, identity: dict[str, Any] | None = None, finite: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load tensors, as copies, and metadata of a file that `save_cached` wrote for the same identity.

    Raises:
        InputError: naming the file; it is damaged, follows from something else, or holds NaN or Inf where `finite`.
        FileNotFoundError: there is none.
    """
    try:
        with open_safetensors(file) as f:
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
            metadata = dict(f.metadata() or {})
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if is_limit(error):
            raise
        raise InputError(f"{file}: damaged {what} ({reason_of(error)}); delete it") from error
    if metadata.pop(_DIGEST, None) != _digest(tensors, metadata):
        raise InputError(f"{file}: damaged {what} (not what a run wrote there); delete it")
    if metadata.pop(_IDENTITY) != json.dumps(identity, sort_keys=True):
        raise InputError(f"{file}: {what} of something else than its name says; delete it")
    for name, tensor in tensors.items():
        if finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{file}: damaged {what} (NaN or Inf in {name}); delete it")
    return tensors, metadata


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    described = [(name, str(t.dtype), list(t.shape), digest_of(t.cpu().contiguous())) for name, t in tensors.items()]
    return xxhash.xxh3_128_hexdigest(json.dumps([sorted(described), sorted(metadata.items())]).encode())


def metadata_of(metadata: dict[str, str], name: str, file: Path) -> Any:
    """A JSON document in a file's metadata. InputError: it is not there, or none."""
    return parse_json(metadata.get(name, ""), f"{file}: its {name}")


def digest(identity: dict[str, Any]) -> str:
    """A file name's worth of everything that a file's contents follow from."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
