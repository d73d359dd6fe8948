"""Which programs load an output, as docs/loading.md has it."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from .. import modeling as modeling  # registers the classes of pruned models
from ..architectures import PRUNED_PREFIX, SELECTED_PREFIX
from ..checkpoint import CheckpointReader
from ..errors import InputError
from ..exporters.gguf_architecture import check_shapes, check_written, choose_architecture, rope_scaling

# Stock classes whose own code in vLLM and in MLX takes a head dimension that is not hidden_size / heads.
_FREE_HEAD_DIM = ("llama", "mistral", "qwen3")


@dataclass(frozen=True)
class Loaders:
    """Programs that load an output.

    needs_pyprune: transformers and vLLM need the package beside them. auto: the class of transformers that loads it.
    task: the hub's word for what the model does.
    """

    needs_pyprune: bool
    vllm: bool
    gguf: bool
    mlx: bool
    auto: str = "AutoModelForCausalLM"
    task: str = "text-generation"


def loaders_of(folder: Path) -> Loaders:
    """Read an output's configuration and tensor names, and find what loads it."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type.startswith(SELECTED_PREFIX):  # only our class computes with selections
        return Loaders(needs_pyprune=True, vllm=False, gguf=False, mlx=False)
    reader = CheckpointReader(folder)
    if reader.wrapping is not None:  # other programs have not been tried
        auto, task = "AutoModelForImageTextToText", "image-text-to-text"
        return Loaders(needs_pyprune=False, vllm=False, gguf=False, mlx=False, auto=auto, task=task)
    pruned = config.model_type.startswith(PRUNED_PREFIX)
    square = all(shape.kv_groups * shape.group_width == shape.hidden_size for shape in reader.shapes)
    stock = config.model_type in _FREE_HEAD_DIM or (config.model_type == "qwen2" and square)
    # mlx-lm 0.32 attends to everything in layers with a sliding window.
    sliding = any(reader.family.sliding(reader.config, layer) for layer in range(reader.layers))
    return Loaders(needs_pyprune=pruned, vllm=pruned or stock, gguf=_has_gguf(reader), mlx=stock and not sliding)


def _has_gguf(reader: CheckpointReader) -> bool:
    """Whether `pyprune export --format gguf` has an architecture for the model."""
    try:
        check_written(reader)
        check_shapes(reader.shapes)
        choose_architecture(reader, rope_scaling(reader.family, reader.config))
    except InputError:
        return False
    return True
