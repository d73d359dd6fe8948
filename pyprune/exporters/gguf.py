"""Writes a checkpoint, dense or pruned, as one GGUF file: the format of llama.cpp and of what is built on it."""

import errno
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import CheckpointReader, check_disk_space, check_output_creatable
from ..errors import InputError
from ..runtime.optional import import_extra
from ..runtime.progress import Progress, silent
from .exclusive import exclusive_file, refuse_existing
from .gguf_architecture import (
    Architecture,
    RopeScaling,
    add_rope,
    add_sizes,
    check_shapes,
    check_written,
    choose_architecture,
    context_length,
    rope_scaling,
)
from .gguf_vocabulary import read_vocabulary

DTYPES = ("f32", "f16", "bf16", "q8_0")
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
# Elements converted at a time, which bounds the float32 copy of a large embedding; 64 MiB of it.
_SLICE = 1 << 24


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name, shape (rows first), and where its values come from."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_gguf(source: Path, output: Path, dtype: str = "f16", progress: Progress = silent) -> dict[str, Any]:
    """Write the checkpoint in the folder `source` as the file `output`, whole or not at all.

    dtype: f32, f16, bf16 or q8_0, of the matrices; vectors (norms, biases) are float32. A matrix whose rows are no
    multiple of q8_0's 32 weights is written in f16, as llama.cpp's own converter does. One tensor is in memory at a
    time. `progress` gets ("export", tensors written, all tensors).

    Returns `output`, `architecture` (llama.cpp's), `dtype`, `tensors`, `bytes` (of the file), `pre_tokenizer`,
    `fallback` (names of the tensors written in f16 instead of q8_0) and `warnings` (lines).

    InputError: the file exists already; the checkpoint or its tokenizer is damaged, or nothing that llama.cpp can run
    (gguf_architecture.py); a weight is not finite, or too large for float16.
    """
    check_target(output, dtype)
    with exclusive_file(output) as partial:
        written = fill_gguf(source, partial, dtype, progress)
    return {"output": str(output), **written}


def check_target(output: Path, dtype: str) -> None:
    """InputError unless such a file can be written there."""
    import_extra("gguf")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    refuse_existing(output)
    check_output_creatable(output)


def fill_gguf(source: Path, file: Path, dtype: str, progress: Progress) -> dict[str, Any]:
    """Write the checkpoint into a file that is the caller's; as `write_gguf` otherwise, whose result lacks `output`."""
    gguf = import_extra("gguf")
    reader = CheckpointReader(source)
    check_written(reader)
    if reader.config.hidden_act not in ("silu", "swish"):
        raise InputError(f"{source}: hidden_act {reader.config.hidden_act}: llama.cpp has silu in these architectures")
    check_shapes(reader.shapes)
    scaling = rope_scaling(reader.family, reader.config)
    architecture = choose_architecture(reader, scaling)
    length, window = context_length(reader.family, reader.config)
    vocabulary = read_vocabulary(source, reader.config)

    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type("model")
    writer.add_name(source.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, architecture, reader, length)
    add_rope(writer, reader.config, reader.shapes[0].head_dim, scaling)
    vocabulary.add_to(writer)

    entries = list(_entries(reader, architecture, scaling))
    types = [_type(entry.shape, dtype) for entry in entries]
    fallback = [e.name for e, kind in zip(entries, types, strict=True) if dtype == "q8_0" and kind == "f16"]
    _write(writer, file, entries, types, progress)

    warnings = list(vocabulary.warnings)
    if window is not None:
        warnings.append(
            f"llama.cpp has no sliding window here: the context length is cut from "
            f"{reader.config.max_position_embeddings} to the window's {window} tokens, up to which nothing changes"
        )
    if fallback:
        warnings.append(
            f"{len(fallback)} matrices are f16, their rows being no multiples of 32 ({fallback[0]} is the first)"
        )
    return {
        "architecture": architecture.name,
        "dtype": dtype,
        "tensors": len(entries),
        "bytes": file.stat().st_size,
        "pre_tokenizer": vocabulary.pre,
        "fallback": fallback,
        "warnings": warnings,
    }


def _entries(reader: CheckpointReader, architecture: Architecture, scaling: RopeScaling | None) -> Iterator[_Entry]:
    """Every tensor of the file, in order: embeddings, final norm, head, rotary factors, layers."""
    gguf = import_extra("gguf")
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(known, reader.layers)

    def single(name: str, heads: int | None = None) -> _Entry:
        """One tensor of the checkpoint; `heads`: permuted head by head."""

        def read() -> Tensor:
            tensor = reader.read([name])[name]
            return tensor if heads is None else paired(tensor, heads)

        return _Entry(names.get_name(name, (".weight", ".bias")), reader.tensors[name].shape, read)

    for name in reader.outside_layers():
        yield single(name)
    if scaling is not None and scaling.factors is not None:
        factors = scaling.factors
        yield _Entry("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    family = reader.family
    for layer, shape in enumerate(reader.shapes):
        prefix = reader.layer_prefix(layer)
        attention = family.attention
        heads = {attention.query: shape.heads, attention.key: shape.key_value_heads}
        fused = [f"{prefix}{linear}.weight" for linear in (attention.query, attention.key, attention.value)]
        if architecture.fused:
            yield _fused(reader, f"blk.{layer}.attn_qkv.weight", fused)
        for name in reader.layer_tensors(layer):
            if architecture.fused and prefix + name in fused:
                continue
            yield single(prefix + name, heads.get(name.rpartition(".")[0]) if architecture.paired else None)


def _fused(reader: CheckpointReader, name: str, parts: list[str]) -> _Entry:
    shapes = [reader.tensors[part].shape for part in parts]

    def read() -> Tensor:
        return torch.cat(list(reader.read(parts).values()))

    return _Entry(name, (sum(shape[0] for shape in shapes), shapes[0][1]), read)


def paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection, weight [heads · d, in] or bias [heads · d], with i beside i + d/2 in each head.

    transformers turns channels i and i + d/2 of a head together, `llama` and `deci` of llama.cpp 2i and 2i + 1.
    """
    split = tensor.reshape(heads, 2, -1, *tensor.shape[1:])  # [heads, 2, d/2, ...]
    return split.transpose(1, 2).reshape(tensor.shape)


def _type(shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) == 1:
        return "f32"
    block = import_extra("gguf").GGML_QUANT_SIZES[_ggml_type(dtype)][0]
    return dtype if shape[-1] % block == 0 else "f16"


def _ggml_type(dtype: str) -> Any:
    return import_extra("gguf").GGMLQuantizationType[dtype.upper()]


def _write(writer: Any, file: Path, entries: list[_Entry], types: list[str], progress: Progress) -> None:
    """Header, metadata and tensor infos, then tensor by tensor, down to the disk."""
    sizes = import_extra("gguf").GGML_QUANT_SIZES
    total = 0
    for entry, kind in zip(entries, types, strict=True):
        block, size = sizes[_ggml_type(kind)]
        nbytes = math.prod(entry.shape) // block * size
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, _ggml_type(kind))
        total += nbytes
    check_disk_space(file, total)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (entry, kind) in enumerate(zip(entries, types, strict=True)):
            progress("export", done, len(entries))
            writer.write_tensor_data(encode(entry.read(), kind, entry.name))
        progress("export", len(entries), len(entries))
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    except OSError as error:
        raise _named(error, file) from error
    finally:
        with suppress(OSError):  # after an error it says it once more
            writer.close()


def _named(error: OSError, file: Path) -> OSError:
    """The error with the file in it. numpy says how much it wrote, not why no more: the disk or the limit says that."""
    if error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename or str(file))
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and file.stat().st_size >= limit:
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(file))
    if shutil.disk_usage(file).free < 1 << 20:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    return OSError(errno.EIO, f"cannot be written whole ({error})", str(file))


def encode(tensor: Tensor, dtype: str, name: str) -> np.ndarray:
    """The bytes of a tensor (float32, bfloat16 or float16, [..., n]) in a type of GGUF: uint8 [rows, bytes of a row].

    InputError, naming the tensor: a value that is not finite, or that float16 does not reach (f16, q8_0's scales).
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    block, size = import_extra("gguf").GGML_QUANT_SIZES[_ggml_type(dtype)]
    encoded = np.empty((len(rows), rows.shape[1] // block * size), np.uint8)
    step = max(1, _SLICE // rows.shape[1])
    for begin in range(0, len(rows), step):
        encoded[begin : begin + step] = _encode(rows[begin : begin + step], dtype, name)
    return encoded


def _encode(rows: Tensor, dtype: str, name: str) -> np.ndarray:
    low, high = (bound.item() for bound in rows.aminmax())
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise InputError(f"tensor {name} holds NaN or infinite weights")
    # The scale of a block of q8_0 is its largest weight over 127, in float16.
    if largest > {"f16": 1, "q8_0": 127}.get(dtype, math.inf) * torch.finfo(torch.float16).max:
        raise InputError(f"tensor {name} holds weights of up to {largest:g}, too large for {dtype}: use bf16 or f32")
    if dtype == "q8_0":
        gguf = import_extra("gguf")
        return gguf.quantize(rows.float().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
    stored = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    return rows.to(stored).contiguous().view(torch.uint8).numpy()
