"""Find a checkpoint's weight files and the place of each tensor. Safetensors only: no pickle is opened."""

import errno
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from ..runtime.files import parse_json, read_json, reason_of
from .links import stays_inside

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
# By safetensors' names, in the order in which it stores them: wide types first, so that none needs a gap before it.
DTYPES = {
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_PICKLES = ("*.bin", "*.pth", "*.pt")


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor: `bytes` bytes of the file from byte `offset` on, row-major, little-endian.

    `name` is what the file calls it; `kind` is safetensors' name of its type, `dtype` PyTorch's, None of a type that
    pyprune does not read. Of a tensor in memory `file` is the model's name in messages, and `offset` is 0.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]

    @property
    def readable(self) -> bool:
        return self.kind in DTYPES


def weight_files(folder: Path, fields: dict[str, Any]) -> list[Path]:
    """The files that transformers would load: model.safetensors if it is there, else what the index names.

    fields: of config.json, whose `transformers_weights` names another file or index.

    Raises:
        InputError: none there, or one that is missing or outside the folder.
    """
    named = fields.get("transformers_weights")
    if isinstance(named, str):
        return _indexed(folder, named) if named.endswith(".index.json") else [_inside(folder, named, "config.json")]
    if (folder / SINGLE).is_file():
        return [_inside(folder, SINGLE, "")]
    if (folder / INDEX).is_file():
        return _indexed(folder, INDEX)
    raise InputError(f"{folder}: {_what_is_there_instead(folder)}")


def _what_is_there_instead(folder: Path) -> str:
    if (folder / ADAPTER).exists():
        return f"only {ADAPTER}: a LoRA adapter; merge it into its base model first (peft: merge_and_unload), and save"
    if any(file for pattern in _PICKLES for file in folder.glob(pattern)):
        convert = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')"
        )
        return f'only pickled weights there, which are never loaded; convert them: python -c "{convert}"'
    return f"neither {SINGLE} nor {INDEX} there"


def _indexed(folder: Path, name: str) -> list[Path]:
    index = _inside(folder, name, "config.json")
    document = read_json(index)
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise InputError(f"{index}: not a safetensors index: a weight_map of tensors to files is needed")
    return [_inside(folder, file, index.name) for file in sorted(set(names.values()))]


def _inside(folder: Path, name: str, source: str) -> Path:
    """The file of that name. InputError: it is missing, or lies elsewhere."""
    file = folder / name
    said = f"{file}: listed in {source} but" if source else f"{file}:"
    if not stays_inside(folder, file):
        raise InputError(f"{said} outside the checkpoint folder; copy it there")
    try:
        missing = not file.is_file()
    except OSError as error:  # too long a name
        raise InputError(f"{said} cannot be opened: {reason_of(error)}") from error
    if missing:
        raise InputError(f"{said} missing")
    return file


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read every tensor's header by name; of a name in two files the last one counts, as in transformers.

    Raises:
        InputError: naming the file, which is no safetensors file, is cut short, or cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            tensors |= read_header(file)
        except (OSError, MemoryError) as error:
            raise InputError(f"{file}: cannot be read: {reason_of(error)}") from error
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, by name.

    Raises:
        InputError: naming the file, which is no safetensors file, or is cut short.
        OSError: the system refuses to read it.
    """
    try:
        with open_safetensors(file):  # checks the header and the file's length against it
            entries, start = header_of(file)
    except SafetensorError as error:
        raise InputError(f"{file}: {explain(file, error)}") from error
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(file, name, tuple(entry["shape"]), entry["dtype"], start + begin, end - begin)
    return tensors


def open_safetensors(file: Path) -> Any:
    """Open a file as safetensors' safe_open does. OSError: with the file's name and the system's reason.

    safe_open (0.8.0) raises FileNotFoundError without a number whatever the system said, a lack of descriptors too.
    """
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        os.close(os.open(file, os.O_RDONLY))  # for the reason
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(file)) from error  # another thread's file is closed


def load_stored(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Tensors by the names given, on the CPU, as views of mapped files.

    A file is opened anew on every call, so that dropping the tensors drops the mapping. OSError, with the file's name:
    it cannot be read, or is not what it was when its header was.
    """
    by_file: dict[Path, list[str]] = {}
    for name, stored in tensors.items():
        by_file.setdefault(stored.file, []).append(name)
    loaded: dict[str, Tensor] = {}
    for file, names in by_file.items():
        try:
            with open_safetensors(file) as f:
                loaded |= {name: f.get_tensor(tensors[name].name) for name in names}
        except SafetensorError as error:
            raise OSError(errno.EIO, f"changed since it was opened: {explain(file, error)}", str(file)) from error
    return loaded


def on_meta(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Tensors of the same names, shapes and types without contents, to follow what becomes of them."""
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file by tensor, and the byte that their offsets count from.

    The layout: 8 bytes of length, little-endian; that many bytes of JSON; the tensors.
    """
    with file.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        entries = parse_json(f.read(length), f"{file}: its header")
    entries.pop("__metadata__", None)
    return entries, 8 + length


def explain(file: Path, error: SafetensorError) -> str:
    """Why safetensors refuses a file, with the first tensor that a truncation cuts off."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = f.read(length) if length < size else b""
    try:
        entries = {k: v["data_offsets"] for k, v in json.loads(header).items() if k != "__metadata__"}
        for name, (_, end) in sorted(entries.items(), key=lambda item: item[1]):
            if 8 + length + end > size:
                return f"truncated: tensor {name} ends at byte {8 + length + end}, the file at {size}"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return f"not a complete safetensors file ({reason_of(error)})"
    return f"not a valid safetensors file ({reason_of(error)})"
