"""`pyprune export`: a checkpoint in the layouts that other programs load, each proved by loading it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibration.tokenizer_check import check_tokenizer
from ..checkpoint import (
    SHARD_SIZE,
    CheckpointReader,
    CheckpointWriter,
    check_disk_space,
    check_output_free,
    check_shard_size,
    partial_of,
)
from ..checkpoint.auxiliary_files import copy_companions
from ..checkpoint.headers import on_meta
from ..checkpoint.special_ids import check_generation_config, check_special_ids, generation_fields
from ..errors import InputError, VerificationError
from ..evaluation.roundtrip import Verification, verify_roundtrip
from ..modeling.saving import save_config
from ..runtime.progress import Progress, silent
from .gguf_export import export_gguf
from .layout import Layout
from .padded import padded_layout
from .remote_code import remote_code_layout
from .state_dict import check_state_dict
from .stock import stock_layout

# format -> what makes its layout, and the loader that proves it
_LAYOUTS: dict[str, tuple[Callable[[CheckpointReader], Layout], str]] = {
    "stock": (stock_layout, "transformers"),
    "padded": (padded_layout, "transformers"),
    "remote-code": (remote_code_layout, "remote-code"),
}
FORMATS = (*_LAYOUTS, "gguf")


def export(
    source: Path,
    output: Path,
    format: str,
    dtype: str | None = None,
    progress: Progress = silent,
    verified: bool = True,
    shard_size: int | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `source` as `output` in one of FORMATS: a folder, or for gguf a file.

    dtype: gguf's only (f32, f16, bf16, q8_0); the others keep the stored types. `verified`: compare its logits with the
    source's before it becomes `output`. shard_size: bytes of tensors in a file at most; None: SHARD_SIZE.

    Returns `output`, `format`, `class` (or gguf's architecture), `bytes` (before, after), `notes` and `verification`
    (`verify_roundtrip`'s). InputError: what cannot be exported so; VerificationError: our failure. Both leave nothing.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if shard_size is not None:
        check_shard_size(shard_size)
        if format == "gguf":
            raise InputError("--shard-size is for folders of safetensors: gguf is one file")
    reader = CheckpointReader(source)
    if reader.wrapping is not None:
        raise InputError(
            f"{source}: a {reader.wrapping.wrapper.name} model is not exported: transformers loads it as it is"
        )
    check_generation_config(source)
    check_special_ids(reader.config, generation_fields(source), source)
    if format == "gguf":
        return export_gguf(reader, output, dtype, progress, verified)
    if dtype is not None:
        raise InputError(f"--dtype is for gguf: {format} keeps the types that {source} stores")
    check_output_free(output)
    partial = partial_of(output)
    if partial.exists():
        raise InputError(f"{partial}: what a killed run left; delete that folder")
    make, loader = _LAYOUTS[format]
    layout = make(reader)
    parts = _parts(reader, layout)
    check_disk_space(output, sum(tensor.nbytes for part in parts for tensor in part.values()))
    writer = CheckpointWriter(output, {"source": str(source), "format": format}, resume=False)
    try:
        writer.begin()
        writer.lay_out(parts, SHARD_SIZE if shard_size is None else shard_size)
    except InputError:  # another process has begun it: that folder is not ours
        writer.close()
        raise
    except BaseException:
        writer.discard()
        raise
    try:
        notes = [*layout.notes, *_write(reader, layout, writer, progress)]
        check_state_dict(partial, writer.prove())
        check_tokenizer(reader.folder, partial, False)
        verification: Verification = {"verified": False, "reason": "--no-verify"}
        if verified:
            verification = verify_roundtrip(source, partial, loader, progress)
        writer.finish()
    except BaseException:  # an interruption as well: there is nothing to go on with
        writer.discard()
        raise
    return {
        "output": str(output),
        "format": format,
        "class": layout.class_name,
        "bytes": [reader.bytes, writer.tensor_bytes],
        "notes": notes,
        "verification": verification,
    }


def _write(reader: CheckpointReader, layout: Layout, writer: CheckpointWriter, progress: Progress) -> list[str]:
    """Everything of the output, layer by layer, into the writer's partial folder; what was left out, for people."""
    names = reader.outside_layers()
    writer.write(0, reader.read(names[:1]))
    for layer in range(reader.layers):
        progress("export", layer, reader.layers)
        prefix = reader.layer_prefix(layer)
        converted = layout.convert(reader.read_layer(layer))
        writer.write(layer + 1, {prefix + name: tensor for name, tensor in converted.items()})
    writer.write(reader.layers + 1, reader.read(names[1:]))
    save_config(layout.config, writer.partial)
    for name, text in layout.files.items():
        (writer.partial / name).write_text(text, encoding="utf-8")
    left_out = copy_companions(reader.folder, writer.partial)
    writer.write_index()
    progress("export", reader.layers, reader.layers)
    return left_out


def _parts(reader: CheckpointReader, layout: Layout) -> list[dict[str, Tensor]]:
    """The output's tensors without contents: embeddings, each layer, the rest."""
    parts = [on_meta({name: reader.tensors[name]}) for name in reader.outside_layers()[:1]]
    for layer in range(reader.layers):
        prefix = reader.layer_prefix(layer)
        converted = layout.convert(on_meta(reader.layer_tensors(layer)))
        parts.append({prefix + name: tensor for name, tensor in converted.items()})
    return [*parts, on_meta({name: reader.tensors[name] for name in reader.outside_layers()[1:]})]


__all__ = ["FORMATS", "VerificationError", "export", "verify_roundtrip"]
