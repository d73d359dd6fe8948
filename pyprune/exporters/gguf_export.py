"""`pyprune export --format gguf`: the file, and what llama.cpp may differ by from a float32 forward of its weights."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointReader
from ..checkpoint.special_ids import generation_fields
from ..errors import InputError
from ..evaluation.roundtrip import TOKENS, Rounding, Verification, verify_roundtrip
from ..runtime.progress import Progress
from .exclusive import exclusive_file


def q8_0(matrix: Tensor) -> Tensor:
    """A matrix [..., n] as llama.cpp reads it from q8_0: in blocks of 32, round(w / d) · d with d = max |w| / 127.

    d is stored in float16. Rows that are no multiple of 32 are f16 in such a file.
    """
    if matrix.shape[-1] % 32:
        return f16(matrix)
    blocks = matrix.unflatten(-1, (-1, 32))  # [..., n / 32, 32]
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale > 0, blocks / scale, 0).round()
    return (steps * scale.half().float()).flatten(-2)


def f16(matrix: Tensor) -> Tensor:
    return matrix.half().float()


def bf16(matrix: Tensor) -> Tensor:
    return matrix.bfloat16().float()


# By type: what a file of it holds of a matrix. llama.cpp on a CPU rounds what the matrix is multiplied by likewise.
ROUNDINGS: dict[str, Rounding | None] = {"f32": None, "f16": f16, "bf16": bf16, "q8_0": q8_0}


# Settings of generation_config.json that a Modelfile has, by their names there.
_PARAMETERS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}


def modelfile_of(file: Path, generation: dict[str, Any]) -> str:
    """Ollama's Modelfile beside a GGUF file: the model, and the sampling that its generation settings ask for.

    The chat template and the context length are in the GGUF file, where Ollama finds them.
    """
    lines = [f"FROM ./{file.name}"]
    if generation.get("do_sample"):  # else transformers does not read them
        for name, own in _PARAMETERS.items():
            value = generation.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                lines.append(f"PARAMETER {own} {value:g}")
    return "\n".join(lines) + "\n"


def export_gguf(
    reader: CheckpointReader, output: Path, dtype: str | None, progress: Progress, verified: bool
) -> dict[str, Any]:
    """Write the checkpoint as the file `output`; as `pyprune.exporters.export`. dtype None: f16."""
    from .gguf import check_target, fill_gguf
    from .gguf_architecture import context_length

    if output.suffix != ".gguf":
        raise InputError(f"{output}: a file that ends in .gguf is needed; llama.cpp and Ollama look for that")
    dtype = dtype or "f16"
    check_target(output, dtype)
    notes = []
    with exclusive_file(output) as unverified:
        written = fill_gguf(reader.folder, unverified, dtype, progress)
        verification: Verification = {"verified": False, "reason": "--no-verify"}
        if verified:
            length, _ = context_length(reader.family, reader.config)
            tokens = min(TOKENS, length)
            verification = verify_roundtrip(reader.folder, unverified, "gguf", progress, ROUNDINGS[dtype], tokens)
    modelfile = output.with_suffix(".Modelfile")
    if os.path.lexists(modelfile):
        notes.append(f"{modelfile}: kept as it was")
    else:
        with exclusive_file(modelfile) as partial:
            partial.write_text(modelfile_of(output, generation_fields(reader.folder) or {}), encoding="utf-8")
        notes.append(f"for Ollama: ollama create {output.stem} -f {modelfile}")
    return {
        "output": str(output),
        "format": "gguf",
        "class": f"{written['architecture']}, {dtype}",
        "bytes": [reader.bytes, written["bytes"]],
        "notes": [*written["warnings"], *notes],
        "verification": verification,
    }
