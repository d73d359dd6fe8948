"""Reads a Hugging Face checkpoint folder one decoder layer at a time. Safetensors only; no pickle, no remote code."""

import errno
import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..architectures import SELECTED_PREFIX, Family, LayerShape, family_of
from ..errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old Llama checkpoints saved; computed from the config today
_SAMPLES, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: `bytes` bytes of the file from byte `offset` on, row-major, little-endian."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


class CheckpointReader:
    """A checkpoint folder: configuration, family, and tensors by name, read when asked for.

    Raises InputError, naming file and tensor, if anything that the configuration calls for is missing, truncated,
    of another shape, or stored in a type other than float32, bfloat16 or float16. Only headers are read for that.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.family = _read_config(folder)
        self.tensors = _read_headers(folder)
        self.shapes: list[LayerShape] = self.family.shapes(self.config)
        self._check()

    @property
    def layers(self) -> int:
        return len(self.shapes)

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """Stored type of the decoder linears."""
        return self.tensors[f"{self.layer_prefix(0)}{self.family.query}.weight"].dtype

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    def layer_prefix(self, layer: int) -> str:
        return f"{self.family.layers}.{layer}."

    def layer_tensors(self, layer: int) -> dict[str, StoredTensor]:
        """Where the tensors of a decoder layer are, named within the layer."""
        prefix = self.layer_prefix(layer)
        return {name: self.tensors[prefix + name] for name in self.family.layer_state_shapes(self.config, layer)}

    def outside_layers(self) -> list[str]:
        """Names of the tensors that pruning copies as they are: embeddings, final norm, output head."""
        names = [self.family.embeddings, self.family.final_norm]
        return names if self.tied else [*names, self.family.head]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by full name, in their stored type, on the CPU.

        They are views of a mapped file: pages count as memory only while the tensors live. A file is opened
        anew on every call, so that dropping the tensors drops the mapping.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            try:
                with safe_open(file, framework="pt") as f:
                    tensors |= {name: f.get_tensor(name) for name in inside}
            except SafetensorError as error:  # it was whole when this reader was made
                raise OSError(errno.EIO, f"changed since it was opened: {_explain(file, error)}", str(file)) from error
        return tensors

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Tensors of one decoder layer, named within the layer, in their stored type, on the CPU."""
        prefix = self.layer_prefix(layer)
        read = self.read([prefix + name for name in self.layer_tensors(layer)])
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    def stream_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """As `read_layer`, one tensor at a time: whoever converts and drops each holds one stored tensor at most."""
        for name in self.layer_tensors(layer):
            full = self.layer_prefix(layer) + name
            yield name, self.read([full])[full]

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids [...] -> [..., hidden_size], stored type; touches only the rows that occur."""
        table = self.read([self.family.embeddings])[self.family.embeddings]
        return table[ids]

    def fingerprint(self) -> str:
        """sha256 over the configuration, every header, and samples of every tensor: 16 of 4 KiB spread over it.

        So no tensor can be exchanged or trained unseen, and 70 B parameters cost 50 MB of reads.
        """
        result = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted({t.file for t in self.tensors.values()}):
            result.update(f"{file.name}:{file.stat().st_size}".encode())
            with file.open("rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                header = f.read(length)
                result.update(header)
                for name, entry in sorted(json.loads(header).items()):
                    if name == "__metadata__":
                        continue
                    begin, end = entry["data_offsets"]
                    for k in range(_SAMPLES):
                        start = begin + (end - begin) * k // _SAMPLES
                        f.seek(8 + length + start)
                        result.update(f.read(min(_SAMPLE_BYTES, end - start)))
        return result.hexdigest()

    def _expected(self) -> dict[str, tuple[int, ...]]:
        vocabulary, hidden = self.config.vocab_size, self.config.hidden_size
        outside = {
            self.family.embeddings: (vocabulary, hidden),
            self.family.final_norm: (hidden,),
            self.family.head: (vocabulary, hidden),
        }
        expected = {name: outside[name] for name in self.outside_layers()}
        for layer in range(self.layers):
            for name, shape in self.family.layer_state_shapes(self.config, layer).items():
                expected[self.layer_prefix(layer) + name] = shape
        return expected

    def _check(self) -> None:
        expected = self._expected()
        for name, shape in expected.items():
            stored = self.tensors.get(name)
            if stored is None:
                raise InputError(f"{self.folder}: tensor {name} is missing from the checkpoint")
            if stored.shape != shape:
                raise InputError(
                    f"{stored.file}: tensor {name} has shape {list(stored.shape)}, "
                    f"but config.json calls for {list(shape)}"
                )
        spare = {self.family.head} if self.tied else set()
        for name in self.tensors.keys() - expected.keys() - spare:
            if not name.endswith(_IGNORED):
                raise InputError(
                    f"{self.tensors[name].file}: tensor {name} is not part of a {self.config.model_type} model as "
                    "config.json describes it"
                )


def stored_model(folder: Path) -> tuple[Any, torch.dtype]:
    """Configuration and stored type of any model that pyprune loads; of those that cannot be pruned too: DISP models.

    InputError: as of CheckpointReader, for what can be told from config.json and the headers alone.
    """
    model_type = read_fields(folder).get("model_type", "")
    if not model_type.startswith(SELECTED_PREFIX):
        reader = CheckpointReader(folder)
        return reader.config, reader.dtype
    family = _named_family(folder, model_type.removeprefix(SELECTED_PREFIX))
    config = _transformers_config(folder)
    tensors = _read_headers(folder, indices=True)
    query = f"{family.layers}.0.{family.query}.weight"
    if query not in tensors:
        raise InputError(f"{folder}: tensor {query} is missing from the checkpoint")
    return config, tensors[query].dtype


def read_fields(folder: Path) -> dict[str, Any]:
    """config.json as it is written; InputError where there is none or it is no model's."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a checkpoint folder or a hub id such as org/name")
    if not path.is_file():
        raise InputError(f"{folder}: no config.json there; a Hugging Face checkpoint folder is needed")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type", ""), str):
        raise InputError(f"{path}: not a model's configuration: an object with a model_type is needed")
    return fields


def _transformers_config(folder: Path) -> Any:
    from transformers import AutoConfig

    from .. import modeling as modeling  # registers the configurations of already pruned models

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: Exception) -> InputError:
    reason = " ".join((str(error) or repr(error)).split())
    return InputError(f"{folder / 'config.json'}: transformers refuses this configuration: {reason}")


def _named_family(folder: Path, model_type: str | None) -> Family:
    try:
        return family_of(model_type)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error


def _read_config(folder: Path) -> tuple[Any, Family]:
    fields, path = read_fields(folder), folder / "config.json"
    family = _named_family(folder, fields.get("model_type"))
    if fields.get("quantization_config"):
        raise InputError(f"{path}: a quantised checkpoint cannot be pruned; prune first, quantise afterwards")
    config = _transformers_config(folder)
    try:
        if config.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}")
        family.layer_state_shapes(config, 0)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        family.check(config)
    except InputError:
        raise
    except Exception as error:
        raise _refused(folder, error) from error
    if heads % groups:
        raise InputError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    return config, family


def _read_headers(folder: Path, indices: bool = False) -> dict[str, StoredTensor]:
    """Where every tensor is; with `indices` those of selections, int32, are left out."""
    tensors: dict[str, StoredTensor] = {}
    for file in _files(folder):
        if not file.is_file():
            raise InputError(f"{file}: listed in {INDEX} but missing")
        try:
            with safe_open(file, framework="pt"):  # checks the header and the file's length against it
                entries, start = _header(file)
        except SafetensorError as error:
            raise InputError(f"{file}: {_explain(file, error)}") from error
        for name, entry in entries.items():
            if indices and entry["dtype"] == "I32":
                continue
            if entry["dtype"] not in _DTYPES:
                raise InputError(
                    f"{file}: tensor {name} is stored as {entry['dtype']}; float32, bfloat16 or float16 is needed"
                )
            begin = start + entry["data_offsets"][0]
            tensors[name] = StoredTensor(file, tuple(entry["shape"]), _DTYPES[entry["dtype"]], begin)
    return tensors


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file by tensor, and the byte that their offsets count from.

    The layout: 8 bytes of length, little-endian; so many bytes of JSON; the tensors.
    """
    with file.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        entries = json.loads(f.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not a safetensors index ({error!r})") from error
        return [folder / name for name in sorted(names)]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        raise InputError(
            f"{folder}: only pickled weights there, which are never loaded; convert them to safetensors first"
        )
    raise InputError(f"{folder}: neither {SINGLE} nor {INDEX} there")


def _explain(file: Path, error: SafetensorError) -> str:
    """Why safetensors refuses a file, with the first tensor that a truncation cuts off."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = f.read(length) if length < size else b""
    try:
        entries = {k: v["data_offsets"] for k, v in json.loads(header).items() if k != "__metadata__"}
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"not a complete safetensors file ({error})"
    for name, (_, end) in sorted(entries.items(), key=lambda item: item[1]):
        if 8 + length + end > size:
            return f"truncated: tensor {name} ends at byte {8 + length + end}, the file at {size}"
    return f"not a valid safetensors file ({error})"
