"""Choose the llama.cpp architecture of a model, and the sizes and rotary settings that it reads.

What an architecture takes is read off llama.cpp's `src/models/*.cpp` as in llama-cpp-python 0.3.36.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures import FAMILIES, Family, LayerShape
from ..checkpoint import CheckpointReader
from ..errors import InputError
from ..runtime.optional import import_extra

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Below one block of Q8_0 no quantised type of llama.cpp has a whole row of down_proj.
MINIMUM_CHANNELS = 32


@dataclass(frozen=True)
class Architecture:
    """Models that an architecture of llama.cpp accepts.

    `per_layer`: heads, KV heads and FFN channels may differ by layer. `paired`: its rotary embedding turns channels
    2i and 2i + 1 of a head together, where transformers turns i and i + head_dim / 2: q and k are permuted.
    `rope_factors`: it reads `rope_freqs.weight`. `biases`: the linears that may have one. `square`: heads · head_dim
    must be the hidden size. `fused`: q, k and v are one tensor. `tied`: the embeddings must be the output head.
    """

    name: str
    biases: tuple[str, ...] = ()
    per_layer: bool = False
    paired: bool = False
    rope_factors: bool = False
    square: bool = False
    fused: bool = False
    tied: bool = False


# llama.cpp would load biases with `llama` as well; other readers of that architecture (transformers, vLLM) drop them
# in silence, and refuse `deci`.
LLAMA = Architecture("llama", paired=True, rope_factors=True)
DECI = Architecture("deci", biases=LINEARS, per_layer=True, paired=True, rope_factors=True)
QWEN2 = Architecture("qwen2", biases=LINEARS[:3], square=True)
QWEN3 = Architecture("qwen3", biases=LINEARS[:3])
# OpenELM's layers are those of Qwen3: norms over each head's queries and keys, the same rotary embedding, SwiGLU.
OPENELM = Architecture("openelm", per_layer=True, fused=True, tied=True)

ARCHITECTURES = {own.name: own for own in (LLAMA, DECI, QWEN2, QWEN3, OPENELM)}


@dataclass(frozen=True)
class RopeScaling:
    """A rotary embedding stretched beyond its pretraining length, as llama.cpp describes it.

    kind: `linear`, `yarn`, or `llama3`. `factors` float32 [head_dim / 2] divide the frequencies (`llama3` only);
    `attention_factor` is multiplied into YaRN's scaling of queries and keys.
    """

    kind: str
    factor: float
    original_length: int | None = None
    attention_factor: float = 1.0
    factors: Tensor | None = None


def check_written(reader: CheckpointReader) -> None:
    """InputError: GGUF is not written for models of the family, or that compute what this one does."""
    family = reader.family
    if not family.gguf:
        known = ", ".join(name for name, other in FAMILIES.items() if other.gguf)
        raise InputError(f"{reader.folder}: GGUF is written for {known}, not for {family.name}")
    if not family.computes_llama(reader.config):
        raise InputError(
            f"{reader.folder}: GGUF is written for {family.name} models that compute what Llama does, without factors "
            "of their own and with rotary embeddings in every layer"
        )


def choose_architecture(reader: CheckpointReader, scaling: RopeScaling | None) -> Architecture:
    """The first architecture for the family that takes everything that the model has.

    InputError: none does; the line says what each does not take.
    """
    check_written(reader)
    refusals = []
    for architecture in (ARCHITECTURES[name] for name in reader.family.gguf):
        obstacles = list(_obstacles(architecture, reader, scaling))
        if not obstacles:
            return architecture
        refusals.append(f"{architecture.name} takes no {', no '.join(obstacles)}")
    # The two biases that pruning may have added are the one thing that a user can leave out.
    hint = " (--compensation none or weights makes no biases)" if "bias" in refusals[-1] else ""
    raise InputError(f"{reader.folder}: llama.cpp cannot hold this model: {'; '.join(refusals)}{hint}")


def _obstacles(architecture: Architecture, reader: CheckpointReader, scaling: RopeScaling | None) -> Iterator[str]:
    shapes = reader.shapes
    if not architecture.per_layer and len(set(shapes)) > 1:
        yield "layers of different sizes"
    if architecture.square and any(s.kv_groups * s.group_width != s.hidden_size for s in shapes):
        yield "heads whose channels do not add up to the hidden size"
    foreign = [name for name in LINEARS if name in biased_linears(reader) and name not in architecture.biases]
    if foreign:
        yield f"bias on {' and '.join(foreign)}"
    if scaling is not None and scaling.kind == "llama3" and not architecture.rope_factors:
        yield "llama3 rope scaling"
    if architecture.tied and not reader.tied:
        yield "output head of its own"


def biased_linears(reader: CheckpointReader) -> set[str]:
    """Names of the linears that have a bias in some layer (`q_proj`, ...)."""
    names = (name for layer in range(reader.layers) for name in reader.layer_tensors(layer))
    return {name.split(".")[-2] for name in names if name.endswith(".bias")}


def check_shapes(shapes: list[LayerShape]) -> None:
    """Refuse sizes that llama.cpp loads and then computes wrongly, or not at all.

    A layer of `deci` with attention and no FFN leaves its attention out; one without attention has no such norm.
    """
    for layer, shape in enumerate(shapes):
        if shape.kv_groups == 0:
            raise InputError(f"layer {layer} has no attention heads: llama.cpp needs at least 1 KV group in each layer")
        if shape.intermediate_channels < MINIMUM_CHANNELS:
            raise InputError(
                f"layer {layer} has {shape.intermediate_channels} FFN channels: llama.cpp needs at least "
                f"{MINIMUM_CHANNELS}; prune less, or round channels up to a multiple of {MINIMUM_CHANNELS}"
            )
    if len({shape.head_dim for shape in shapes}) > 1:
        raise InputError("the head dimension differs by layer: llama.cpp has one for all")


def rope_scaling(family: Family, config: Any) -> RopeScaling | None:
    """The rope scaling of a configuration; None where there is none.

    InputError: a kind, or a setting of YaRN, that llama.cpp does not compute as transformers does.
    """
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("partial_rotary_factor: llama.cpp turns whole heads in this architecture")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, rope["factor"])
    if kind == "llama3":
        # The frequencies are transformers' own, so that nothing of the formula is written twice.
        frequencies = family.rotary_class(config).inv_freq  # [head_dim / 2]
        steps = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float) / (2 * len(frequencies))
        return RopeScaling(kind, rope["factor"], factors=1.0 / rope["rope_theta"] ** steps / frequencies)
    if kind == "yarn":
        for name, default in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
            value = rope.get(name)
            if value is not None and value != default:
                raise InputError(f"rope scaling yarn with {name} {value}: llama.cpp has {default} and reads no other")
        length = rope["original_max_position_embeddings"]
        factor = rope["factor"] or config.max_position_embeddings / length
        own = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
        return RopeScaling(kind, factor, length, family.rotary_class(config).attention_scaling / own)
    raise InputError(f"rope scaling {kind}: not exported to GGUF; linear, llama3 and yarn are")


def context_length(family: Family, config: Any) -> tuple[int, int | None]:
    """Tokens that the file may promise, and the sliding window that cut them (None: none did).

    llama.cpp has full attention in these architectures. Up to the window's length the two are the same.
    """
    length = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    layers = range(config.num_hidden_layers)
    if window is None or window >= length or not any(family.sliding(config, layer) for layer in layers):
        return length, None
    return window, window


def add_sizes(writer: Any, architecture: Architecture, reader: CheckpointReader, length: int) -> None:
    """Enter the sizes: arrays by layer where the architecture takes them, else the numbers of every layer."""
    shapes, config = reader.shapes, reader.config
    heads = [shape.heads for shape in shapes]
    groups = [shape.key_value_heads for shape in shapes]
    channels = [shape.intermediate_channels for shape in shapes]
    writer.add_block_count(reader.layers)
    writer.add_context_length(length)
    writer.add_embedding_length(shapes[0].hidden_size)
    writer.add_feed_forward_length(channels if architecture.per_layer else channels[0])
    writer.add_head_count(heads if architecture.per_layer else heads[0])
    writer.add_head_count_kv(groups if architecture.per_layer else groups[0])
    writer.add_key_length(shapes[0].head_dim)
    writer.add_value_length(shapes[0].head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_rope(writer: Any, config: Any, head_dim: int, scaling: RopeScaling | None) -> None:
    """Enter the rotary settings; the factors of `llama3` are a tensor, which is not written here."""
    kinds = import_extra("gguf").RopeScalingType
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if scaling is None or scaling.kind == "llama3":
        return
    writer.add_rope_scaling_type(kinds.LINEAR if scaling.kind == "linear" else kinds.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.original_length is not None:
        writer.add_rope_scaling_orig_ctx_len(scaling.original_length)
    if not math.isclose(scaling.attention_factor, 1.0, rel_tol=1e-6):
        writer.add_rope_scaling_attn_factors(scaling.attention_factor)
