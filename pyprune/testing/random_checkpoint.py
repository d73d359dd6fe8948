"""Make a checkpoint of any size with random weights, for tests and benchmarks that need no trained model.

    python -m pyprune.testing.random_checkpoint OUT --shape llama-2-7b
    python -m pyprune.testing.random_checkpoint OUT --family qwen3 --hidden-size 1024 --layers 8 --heads 16

Weights are made and written layer by layer, so a checkpoint may be larger than the memory. They are made on the GPU
where there is one (`--device`), while the layer before is written: the disk sets the pace. The same seed gives the
same tensors on the same kind of device. The names and the shapes of the tensors, and config.json, are transformers'
own: they come from the family's configuration class and from its model built on the meta device.
"""

import argparse
import json
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ..architectures import FAMILIES, SUBLAYERS
from ..architectures.declaration import RMS_PLUS_ONE
from ..benchmark.models import SHAPES

DEFAULT_SHAPE = "llama-1.5b"

DTYPES = ("bfloat16", "float16", "float32")
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def checkpoint_config(
    *,
    family: str = "llama",
    hidden_size: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int = 160,
    vocab_size: int = 256,
    head_dim: int | None = None,
    tie: bool = False,
    dtype: str = "bfloat16",
    **attributes: Any,
) -> PreTrainedConfig:
    """The family's own configuration of these sizes. `head_dim` None means hidden_size / heads.

    `attributes` are other attributes of the configuration. ValueError: sizes that do not fit together.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    own = FAMILIES[family]
    of_heads, of_groups, of_channels = own.sizes
    counts = {of_heads: heads, of_channels: intermediate_size} | ({of_groups: kv_heads} if of_groups else {})
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} KV heads")
    if hidden_size % heads and (head_dim is None or family == "llama"):  # LlamaConfig insists on it
        raise ValueError(f"hidden size {hidden_size} is not a multiple of {heads} heads")
    if family == "mistral":
        attributes.setdefault("sliding_window", None)  # as in the published models since 0.2
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        attributes.setdefault("rms_norm_eps", 1e-5)
    config: PreTrainedConfig = own.config_class(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        head_dim=head_dim or hidden_size // heads,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=tie,
        dtype=dtype,
        architectures=[own.causal_lm_class.__name__],
        **counts,
        **attributes,
    )
    return config


def make_checkpoint(
    out: str | Path,
    *,
    shard_layers: int = 0,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    device: str | torch.device = "cpu",
    headers_only: bool = False,
    **sizes: Any,
) -> Path:
    """Write a random checkpoint of `sizes` (see `checkpoint_config`) into the folder `out`; return its path.

    `shard_layers` K puts K layers into each file, with an index; 0 writes one file. The same seed gives the
    same tensors whatever the sharding. `tokenizer` is a folder whose tokenizer is saved beside the weights
    and whose BOS, EOS and number of tokens go into config.json. `headers_only` leaves the weights out: files of the
    full length that occupy no disk and read as zeros. ValueError: as `checkpoint_config`, or a `vocab_size` smaller
    than the tokenizer.
    """
    folder = Path(out)
    if tokenizer is not None:
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        sizes = {
            "vocab_size": len(loaded),
            "bos_token_id": loaded.bos_token_id,
            "eos_token_id": loaded.eos_token_id,
        } | sizes
        if sizes["vocab_size"] < len(loaded):
            raise ValueError(f"{sizes['vocab_size']} tokens are fewer than the tokenizer's {len(loaded)}")
        loaded.save_pretrained(folder)
    config = checkpoint_config(**sizes)
    config.save_pretrained(folder)
    weights = RandomWeights(config, seed, torch.device(device))
    _write_weights(folder, weights, shard_layers, headers_only)
    return folder


def _tensor_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Name → shape of every tensor of the family's checkpoint, in the model's order."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del state[FAMILIES[config.model_type].head]
    return {name: tensor.shape for name, tensor in state.items()}


def _layer_groups(names: list[str], layers: str) -> list[list[str]]:
    """The names in runs that are made and written together: embeddings, each layer, what follows them."""

    def place(name: str) -> str:
        return name.removeprefix(layers).split(".")[1] if name.startswith(layers + ".") else "outside"

    return [list(run) for _, run in groupby(names, key=place)]


class RandomWeights:
    """The tensors of a random checkpoint by name, made anew whenever one is asked for.

    Each has a seed of its own, so they can be made side by side and in any order.
    """

    def __init__(self, config: PreTrainedConfig, seed: int, device: torch.device) -> None:
        self.shapes = _tensor_shapes(config)
        self.dtype, self.device = config.dtype, device
        self.family = FAMILIES[config.model_type]
        self._layers = config.num_hidden_layers
        self._outputs = tuple(self.family.output_proj(sublayer) + ".weight" for sublayer in SUBLAYERS)
        # The factor is more than any model has tensors, and small, because torch's CPU generator reads only the low
        # 32 bits of a seed.
        self._seeds = {name: 10_007 * seed + number for number, name in enumerate(self.shapes)}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the device. Gains are near 1 at every size, so hidden states stay near unit scale.

        Linears and embeddings: N(0, 1/in) (0.022² at 2048 inputs), o_proj and down_proj divided by √(2·layers)
        as in GPT-2 so that the residual stream stays in scale: after 80 layers its root mean square is 0.7
        (measured at 512 wide). Norms: N(1, 0.02²), those that add one N(0, 0.02²). Biases: N(0, 0.1²).
        """
        generator = torch.Generator(self.device).manual_seed(self._seeds[name])
        shape = self.shapes[name]
        mean, std = 0.0, 1 / math.sqrt(shape[-1])
        if name.endswith("norm.weight"):
            mean, std = 0.0 if self.family.norm == RMS_PLUS_ONE else 1.0, 0.02
        elif name.endswith(".bias"):
            std = 0.1
        elif name.endswith(self._outputs):
            std /= math.sqrt(2 * self._layers)
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(mean, std, generator=generator)


def _write_weights(folder: Path, weights: RandomWeights, shard_layers: int, headers_only: bool) -> None:
    groups = _layer_groups(list(weights.shapes), weights.family.layers)
    layers = groups[1:-1]
    per_file = shard_layers or len(layers)
    shards = [layers[start : start + per_file] for start in range(0, len(layers), per_file)]
    shards[0] = [groups[0], *shards[0]]
    shards[-1] = [*shards[-1], groups[-1]]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        tensors = iter(()) if headers_only else _made_ahead(threads, weights, groups)
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shapes = {name: weights.shapes[name] for group in shard for name in group}
            _write_safetensors(folder / file, shapes, weights.dtype, islice(tensors, len(shapes)))
            weight_map.update(dict.fromkeys(shapes, file))
    if len(shards) > 1:
        total_size = weights.dtype.itemsize * sum(shape.numel() for shape in weights.shapes.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _made_ahead(threads: ThreadPoolExecutor, weights: RandomWeights, groups: list[list[str]]) -> Iterator[torch.Tensor]:
    """The tensors of all groups, on the CPU; those of the next group are made while a group is consumed."""
    under_way: deque[Iterator[torch.Tensor]] = deque()
    for group in groups:
        under_way.append(threads.map(lambda name: weights.tensor(name).cpu(), group))
        if len(under_way) > 1:
            yield from under_way.popleft()
    yield from under_way.popleft()


def _write_safetensors(
    path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, tensors: Iterator[torch.Tensor]
) -> None:
    """Stream `tensors`, one for each of `shapes`, into a safetensors file; with no tensors it stays sparse.

    safetensors' own writer takes all tensors at once; its format is a header's length (8 bytes, little
    endian), the header (JSON: dtype, shape, byte range of each tensor), and the bytes in order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.view(torch.uint8).numpy().data)
        file.truncate(8 + len(text) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a checkpoint with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default=DEFAULT_SHAPE,
        help="the sizes; the options below change single ones",
    )
    parser.add_argument("--family", choices=FAMILIES)
    sizes = ("hidden-size", "layers", "heads", "kv-heads", "head-dim", "intermediate-size", "vocab-size")
    for size in sizes:
        parser.add_argument(f"--{size}", type=int, metavar="N")
    parser.add_argument("--tie", action=argparse.BooleanOptionalAction, help="embeddings serve as lm_head too")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shard-layers", type=int, default=0, metavar="K", help="layers a file; 0: one file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="makes the weights")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="folder to copy the tokenizer from")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    shape = SHAPES[given.pop("shape")]
    try:
        folder = make_checkpoint(given.pop("out"), **(shape | given))
    except ValueError as error:
        parser.error(str(error))
    print(folder)


if __name__ == "__main__":
    main()
