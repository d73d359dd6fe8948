"""Plan of the output's files: which tensor lies in which file at which byte, from shapes and types alone."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from .headers import KINDS, SINGLE, StoredTensor

SHARD_SIZE = 5 * 10**9  # bytes; huggingface_hub's default
_RANK = {dtype: rank for rank, dtype in enumerate(KINDS)}


def check_shard_size(shard_size: Any) -> None:
    """Refuse what is not a number of bytes that a file can have. InputError."""
    if not isinstance(shard_size, int) or isinstance(shard_size, bool) or shard_size < 1:
        raise InputError(f"shard size {shard_size!r}: a whole number of bytes is needed, at least 1, e.g. 5GB")


@dataclass(frozen=True)
class ShardPlan:
    """Files of an output.

    `parts`: the tensors that are written together, a layer's say. `tensors`: the place of each. `headers`: by file, the
    bytes before its tensors. `sizes`: by file, its bytes.
    """

    parts: tuple[tuple[str, ...], ...]
    tensors: dict[str, StoredTensor]
    headers: dict[Path, bytes]
    sizes: dict[Path, int]


def plan_shards(folder: Path, parts: Sequence[Mapping[str, Tensor]], shard_size: int) -> ShardPlan:
    """Distribute tensors over files of up to `shard_size` bytes of tensors, in the order of the parts.

    Args:
        folder: of the files: model.safetensors, or model-0000x-of-0000N.safetensors where there are several.
        parts: tensors by name, of a type in KINDS, on any device, meta included.
        shard_size: bytes; a tensor above it has a file to itself.

    Raises:
        ValueError: a tensor of another type.
    """
    tensors = {name: part[name] for part in parts for name in sorted(part)}
    for name, tensor in tensors.items():
        if tensor.dtype not in KINDS:
            raise ValueError(f"tensor {name} is {tensor.dtype}; float32, bfloat16, float16, int32 or int64 is needed")
    plan = ShardPlan(tuple(tuple(sorted(part)) for part in parts), {}, {}, {})
    shards = _divided(tensors, shard_size)
    for number, names in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _lay_out(plan, folder / name, {name: tensors[name] for name in names})
    return plan


def _divided(tensors: Mapping[str, Tensor], shard_size: int) -> list[list[str]]:
    """Names by file, as huggingface_hub's split_torch_state_dict_into_shards distributes them."""
    shards: list[list[str]] = []
    shard: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > shard_size:
            shards.append([name])
            continue
        if filled + tensor.nbytes > shard_size:
            shards.append(shard)
            shard, filled = [], 0
        shard.append(name)
        filled += tensor.nbytes
    return [*shards, shard] if shard or not shards else shards


def _lay_out(plan: ShardPlan, file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Enter a file and its tensors in the plan."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    order = sorted(tensors, key=lambda name: (_RANK[tensors[name].dtype], name))
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    plan.headers[file] = struct.pack("<Q", len(text)) + text
    offset = len(plan.headers[file])
    for name in order:
        tensor = tensors[name]
        kind, shape = KINDS[tensor.dtype], tuple(tensor.shape)
        plan.tensors[name] = StoredTensor(file, name, shape, kind, offset, tensor.nbytes)
        offset += tensor.nbytes
    plan.sizes[file] = offset
