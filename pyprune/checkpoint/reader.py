"""Reads a Hugging Face checkpoint folder one decoder layer at a time."""

import errno
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..architectures import Family, LayerShape, family_of
from ..errors import InputError
from ..runtime.files import read_json, reason_of
from .content import Content, Digests, FileStates, digest_of, digests_of_files, file_states
from .headers import StoredTensor, explain, header_of, read_headers, weight_files
from .names import assign_names, check_layer_count

_SAMPLES, _SAMPLE_BYTES = 16, 4096


class CheckpointReader:
    """A checkpoint folder: configuration, family, and tensors by name, read when asked for.

    `tensors` go by the names of transformers' class, whatever the files call them; `unused` names those that it does
    not use. A head that is stored beside tied embeddings and differs from them is the model's: then
    `config.tie_word_embeddings` becomes False. `content` is what has been read.

    Raises InputError, naming file and tensor, if anything that the configuration calls for is missing, truncated,
    of another shape, or stored in a type other than float32, bfloat16 or float16. Only headers are read for that,
    and the head where it is stored beside tied embeddings.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fields = read_fields(folder)
        self.family = _prunable_family(folder, fields)
        stored = read_headers(weight_files(folder, fields))
        check_layer_count(folder, fields, stored)
        self.config = _checked_config(folder, self.family)
        self.shapes: list[LayerShape]
        try:
            self.shapes = self.family.shapes(self.config)
            expected = self._expected()
        except Exception as error:
            raise _refused(folder, error) from error
        described = f"a {self.config.model_type} model as config.json describes it"
        prefix = self.family.layers.partition(".")[0] + "."
        self.tensors, self.unused = assign_names(stored, expected, prefix, described)
        self._settle_head()
        self._check(expected)
        _check_rotary(folder, self.family, self.config)
        self.content = Content(folder)

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
        """Places of a decoder layer's tensors, named within the layer."""
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
                    tensors |= {name: f.get_tensor(self.tensors[name].name) for name in inside}
            except SafetensorError as error:  # it was whole when this reader was made
                raise OSError(errno.EIO, f"changed since it was opened: {explain(file, error)}", str(file)) from error
        return tensors

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Tensors of one decoder layer, named within the layer, in their stored type, on the CPU."""
        prefix = self.layer_prefix(layer)
        read = self.read([prefix + name for name in self.layer_tensors(layer)])
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    def stream_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Read a layer one tensor at a time: a caller that converts and drops each holds one stored tensor at most."""
        for name in self.layer_tensors(layer):
            full = self.layer_prefix(layer) + name
            yield name, self.read([full])[full]

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids [...] -> [..., hidden_size], stored type; touches only the rows that occur."""
        table = self.read([self.family.embeddings])[self.family.embeddings]
        return table[ids]

    def read_outside(self) -> dict[str, Tensor]:
        """The tensors outside the layers, as `read`, entered in `content`."""
        tensors = self.read(self.outside_layers())
        for name, tensor in tensors.items():
            self.content.saw(name, digest_of(tensor))
        return tensors

    def file_states(self) -> FileStates:
        """States of the files with the weights; the weights count as unchanged while these are."""
        return file_states(tensor.file for tensor in self.tensors.values())

    def differing(self, digests: Digests) -> str | None:
        """Find the first tensor whose stored bytes have another digest, or None. Reads them all."""
        known = {name: self.tensors[name] for name in digests if name in self.tensors}
        found = digests_of_files(known)
        return next((name for name in digests if found.get(name) != digests[name]), None)

    def all_digests(self) -> Digests:
        """Digests of every tensor, which are read for it."""
        return digests_of_files(self.tensors)

    def fingerprint(self) -> str:
        """sha256 over the configuration, every header, and samples of every tensor: 16 of 4 KiB spread over it.

        It names a run's caches, so that models which were trained differently have different ones. 70 B parameters cost
        50 MB of reads. The digests of `content` tell checkpoints apart for certain.
        """
        result = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted({t.file for t in self.tensors.values()}):
            result.update(f"{file.name}:{file.stat().st_size}".encode())
            entries, start = header_of(file)
            result.update(repr(sorted(entries.items())).encode())
            with file.open("rb") as f:
                for _, entry in sorted(entries.items()):
                    begin, end = entry["data_offsets"]
                    for k in range(_SAMPLES):
                        first = begin + (end - begin) * k // _SAMPLES
                        f.seek(start + first)
                        result.update(f.read(min(_SAMPLE_BYTES, end - first)))
        return result.hexdigest()

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the class may have, the head always among them."""
        vocabulary, hidden = self.config.vocab_size, self.config.hidden_size
        expected = {
            self.family.embeddings: (vocabulary, hidden),
            self.family.final_norm: (hidden,),
            self.family.head: (vocabulary, hidden),
        }
        for layer in range(self.layers):
            for name, shape in self.family.layer_state_shapes(self.config, layer).items():
                expected[self.layer_prefix(layer) + name] = shape
        return expected

    def _settle_head(self) -> None:
        """Choose embeddings and head of a tied model as transformers does if the file has a head as well, or alone."""
        if not self.tied:
            return
        embeddings, head = (self.tensors.get(name) for name in (self.family.embeddings, self.family.head))
        if embeddings is None and head is not None:
            self.tensors[self.family.embeddings] = self.tensors.pop(self.family.head)
        elif embeddings is not None and head is not None and not self._same_values(embeddings, head):
            self.config.tie_word_embeddings = False
        elif head is not None:
            del self.tensors[self.family.head]

    def _same_values(self, one: StoredTensor, other: StoredTensor) -> bool:
        if one.shape != other.shape or not (one.readable and other.readable):
            return False
        pair = self.read([self.family.embeddings, self.family.head])
        rows = zip(*(tensor.split(8192) for tensor in pair.values()), strict=True)
        return all(bool(torch.equal(a.float(), b.float())) for a, b in rows)

    def _check(self, expected: dict[str, tuple[int, ...]]) -> None:
        for name in expected:
            if name == self.family.head and self.tied:
                continue
            stored = self.tensors.get(name)
            if stored is None:
                raise InputError(f"{self.folder}: tensor {name} is missing from the checkpoint")
            _check_type(stored)
            if stored.shape != expected[name]:
                raise InputError(
                    f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, "
                    f"but config.json calls for {list(expected[name])}"
                )


def _check_type(stored: StoredTensor) -> None:
    if not stored.readable or not stored.dtype.is_floating_point:
        raise InputError(
            f"{stored.file}: tensor {stored.name} is stored as {stored.kind}; float32, bfloat16 or float16 is needed"
        )


def read_fields(folder: Path) -> dict[str, Any]:
    """config.json as it is written; InputError where there is none or it is no model's."""
    path = folder / "config.json"
    try:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give a checkpoint folder or a hub id such as org/name")
        if not path.is_file():
            if (folder / "adapter_config.json").is_file():
                raise InputError(
                    f"{folder}: a LoRA adapter, no model; merge it into its base model first (peft: merge_and_unload), "
                    "and save that"
                )
            raise InputError(f"{folder}: no config.json there; a Hugging Face checkpoint folder is needed")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: cannot be opened: {reason_of(error)}") from error
    fields = read_json(path)
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
    return InputError(f"{folder / 'config.json'}: transformers refuses this configuration: {reason_of(error)}")


def _named_family(folder: Path, model_type: str | None) -> Family:
    try:
        return family_of(model_type)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error


def _prunable_family(folder: Path, fields: dict[str, Any]) -> Family:
    family = _named_family(folder, fields.get("model_type"))
    if fields.get("quantization_config"):
        path = folder / "config.json"
        raise InputError(f"{path}: a quantised checkpoint cannot be pruned; prune first, quantise afterwards")
    return family


def _checked_config(folder: Path, family: Family) -> Any:
    config, path = _transformers_config(folder), folder / "config.json"
    try:
        if config.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}")
        family.layer_state_shapes(config, 0)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        family.check(config)
        _check_numbers(config)
    except InputError:
        raise
    except Exception as error:
        raise _refused(folder, error) from error
    if heads % groups:
        raise InputError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    return config


def _check_numbers(config: Any) -> None:
    """ValueError for a number that transformers accepts and no model can compute with."""
    if not 0 < float(config.rms_norm_eps) < math.inf:
        raise ValueError(f"rms_norm_eps is {config.rms_norm_eps}")
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype}")
    if not 0 < int(config.max_position_embeddings) < 2**31:
        raise ValueError(f"max_position_embeddings is {config.max_position_embeddings}")


def _check_rotary(folder: Path, family: Family, config: Any) -> None:
    """Make the rotary embedding: what it refuses of the configuration it refuses now. InputError."""
    try:
        frequencies = family.rotary_class(config).inv_freq
        if not bool(torch.isfinite(frequencies).all()) or not bool((frequencies >= 0).all()):
            raise ValueError("the rotary embedding has frequencies that are not finite and positive")
    except Exception as error:
        raise _refused(folder, error) from error
