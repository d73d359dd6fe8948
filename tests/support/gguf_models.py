"""Checkpoints for the GGUF tests: a tokenizer beside random weights, and layers pruned to different sizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pyprune.architectures import ATTENTION, FFN
from pyprune.checkpoint import CheckpointReader
from pyprune.modeling import pruned_config
from pyprune.passes.rewrite import rewrite_layer

WORDS = ["the", "of", "and", "a", "in", "to", "is", "was", "it", "for"]


def add_tokenizer(folder: Path, **special: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of fewer than 97 tokens (lower-case letters, digits, some words), GPT-2's splits."""
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "Ġ", *map(chr, range(97, 123))])}
    vocabulary |= {str(digit): len(vocabulary) + digit for digit in range(10)}
    merges = []
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            merges.append((left, letter))
            left += letter
            vocabulary.setdefault(left, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    given = {"bos_token": "<s>", "eos_token": "</s>"} | special
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)
    fast.save_pretrained(folder)
    return fast


def with_tokenizer(checkpoint: Path, target: Path) -> Path:
    """A copy of a checkpoint with `add_tokenizer`'s tokenizer."""
    shutil.copytree(checkpoint, target)
    add_tokenizer(target)
    return target


def pruned_copy(
    checkpoint: Path, target: Path, sizes: list[tuple[int, int]], biased: bool, seed: int = 9
) -> tuple[Path, Any]:
    """The checkpoint with (KV groups, FFN channels) kept in each layer, and the model of transformers, float32.

    biased: random biases on o_proj and down_proj, or more of them where the family has some.
    """
    reader, generator = CheckpointReader(checkpoint), torch.Generator().manual_seed(seed)
    shapes, tensors = [], reader.read(reader.outside_layers())
    for layer, (shape, counts) in enumerate(zip(reader.shapes, sizes, strict=True)):
        kept = {
            module: torch.randperm(shape.units(module), generator=generator)[:count].sort().values
            for module, count in zip((ATTENTION, FFN), counts, strict=True)
        }
        bias = {m: torch.randn(shape.hidden_size, generator=generator) * 0.2 for m in kept} if biased else {}
        own = rewrite_layer(reader.family, reader.read_layer(layer), shape, kept, bias)
        tensors |= {reader.layer_prefix(layer) + name: tensor for name, tensor in own.items()}
        shapes.append(shape.kept(*counts))
    config = pruned_config(reader.family, reader.config, shapes, biased, biased)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if reader.tied else set())
    model.save_pretrained(target)
    for file in checkpoint.glob("*token*"):
        shutil.copyfile(file, target / file.name)
    return target, model


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
