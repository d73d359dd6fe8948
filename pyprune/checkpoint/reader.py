"""Reads a Hugging Face checkpoint folder one decoder layer at a time."""

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..runtime.files import read_json, reason_of
from .auxiliary_files import copy_companions
from .content import Digests, FileStates, digests_of_files, file_states
from .headers import header_of, load_stored, read_headers, weight_files
from .model_config import prunable_family, refused
from .names import check_layer_count
from .source import ModelSource
from .wrapping import TEXT, parts_of, wrapper_of

_SAMPLES, _SAMPLE_BYTES = 16, 4096


class CheckpointReader(ModelSource):
    """A checkpoint folder: tensors in safetensors files, of which only headers are read until they are asked for.

    InputError, beyond those of every source: a file that is missing or truncated, named with the tensor.
    """

    config_name = "config.json"

    def __init__(self, folder: Path) -> None:
        self.folder = self.origin = folder
        place, fields = str(folder / "config.json"), read_fields(folder)
        family = prunable_family(place, fields, partial(_stored_names, folder, fields))
        stored = read_headers(weight_files(folder, fields))
        wrapper = wrapper_of(place, fields)
        if wrapper is None:
            check_layer_count(place, fields, stored, family.layers)
            super().__init__(place, family, stored, partial(_transformers_config, folder))
        else:
            parts = parts_of(place, wrapper, fields, stored)
            check_layer_count(place, fields[TEXT], parts.text, family.layers)
            super().__init__(place, family, parts.text, partial(_text_config, folder), parts)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by full name, in their stored type, on the CPU.

        They are views of a mapped file: pages count as memory only while the tensors live. A file is opened
        anew on every call, so that dropping the tensors drops the mapping.
        """
        return load_stored({name: self.tensors[name] for name in names})

    def file_states(self) -> FileStates:
        return file_states(tensor.file for tensor in self.tensors.values())

    def digests(self, names: Iterable[str]) -> Digests:
        return digests_of_files({name: self.tensors[name] for name in names})

    def fingerprint(self) -> str:
        """sha256 over the configuration, every header, and samples of every tensor: 16 of 4 KiB spread over it.

        It gives the caches of models that were trained differently different names: 70 B parameters cost 50 MB of
        reads. What tells one checkpoint from another for good are the digests of `content`.
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

    def write_companions(self, folder: Path) -> list[str]:
        return copy_companions(self.folder, folder)


def _stored_names(folder: Path, fields: dict[str, Any]) -> Iterable[str]:
    """Names of the tensors in a folder, none where it has no safetensors."""
    return read_headers(weight_files(folder, fields)) if any(folder.glob("*.safetensors")) else ()


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


def _text_config(folder: Path) -> Any:
    """The text model's configuration in a vision-language model's, which says by itself whether the head is tied."""
    whole = _transformers_config(folder)
    config = whole.text_config
    config.tie_word_embeddings = bool(getattr(whole, "tie_word_embeddings", False))
    return config


def _transformers_config(folder: Path) -> Any:
    from transformers import AutoConfig

    from .. import modeling as modeling  # registers the configurations of already pruned models

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise refused(str(folder / "config.json"), error) from error
