"""Random checkpoints: transformers loads them whole, and they are of the size and scale that was asked."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyprune.testing.random_checkpoint import SHAPES, RandomWeights, _tensor_shapes, checkpoint_config, make_checkpoint

CASES = [
    {"family": "llama"},
    {"family": "llama", "kv_heads": 4, "tie": True, "dtype": "float32"},
    {"family": "mistral", "heads": 3, "kv_heads": 1, "head_dim": 16, "dtype": "float16"},
    {"family": "qwen2", "shard_layers": 2},
    {"family": "qwen3", "head_dim": 32, "tie": True, "shard_layers": 1},
]


@pytest.mark.parametrize("sizes", CASES, ids=lambda sizes: " ".join(map(str, sizes.values())))
def test_transformers_loads_every_tensor(sizes: dict, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint(**sizes)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert str(model.dtype) == f"torch.{sizes.get('dtype', 'bfloat16')}"

    # The configuration is to the letter the one that transformers writes beside this model.
    model.save_pretrained(tmp_path)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())

    hidden = model(torch.arange(64)[None], output_hidden_states=True).hidden_states
    for states in hidden:
        assert 0.01 < states.float().square().mean().sqrt() < 3


def test_sharding_does_not_change_the_tensors(tmp_path: Path) -> None:
    single = load_file(make_checkpoint(tmp_path / "single", layers=5, seed=3) / "model.safetensors")
    folder = make_checkpoint(tmp_path / "sharded", layers=5, seed=3, shard_layers=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert len(shards) == 3
    assert index["weight_map"].keys() == single.keys()
    for name, tensor in single.items():
        assert torch.equal(tensor, shards[index["weight_map"][name]][name])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in single.values())


def test_headers_without_weights(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", layers=5, shard_layers=2)
    empty = make_checkpoint(tmp_path / "empty", layers=5, shard_layers=2, headers_only=True)
    assert {f.name: f.stat().st_size for f in whole.iterdir()} == {f.name: f.stat().st_size for f in empty.iterdir()}
    for file in empty.glob("*.safetensors"):
        shapes = {name: tensor.shape for name, tensor in load_file(whole / file.name).items()}
        tensors = load_file(file)
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
        assert not any(tensor.any() for tensor in tensors.values())


def test_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    stored = load_file(make_checkpoint(tmp_path, family="qwen2", seed=2) / "model.safetensors")
    weights = RandomWeights(AutoConfig.from_pretrained(tmp_path), 2, torch.device("cpu"))
    assert weights.shapes.keys() == stored.keys()
    for name in reversed(stored):
        assert torch.equal(weights.tensor(name), stored[name])


@pytest.mark.gpu
def test_made_on_a_gpu(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "seed": 5}
    one, two, cpu = (
        load_file(make_checkpoint(tmp_path / str(k), device=device, **sizes) / "model.safetensors")
        for k, device in enumerate(("cuda", "cuda", "cpu"))
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        assert tensor.float().std() == pytest.approx(cpu[name].float().std().item(), rel=0.5)
        assert tensor.float().mean() == pytest.approx(cpu[name].float().mean().item(), abs=0.02)


def test_seeds_and_scales(tiny_checkpoint: Callable[..., Path]) -> None:
    one, two = (
        load_file(tiny_checkpoint(family="qwen2", hidden_size=128, seed=seed) / "model.safetensors") for seed in (0, 1)
    )
    for name, tensor in one.items():
        assert not torch.equal(tensor, two[name]), name
    layer = {name.removeprefix("model.layers.1."): tensor.float() for name, tensor in one.items()}
    # The relative error of a std from n values is 1/√(2n): 0.8 % here at most, so 4 % is five of them.
    assert layer["self_attn.k_proj.weight"].std() == pytest.approx(1 / math.sqrt(128), rel=0.04)
    assert layer["mlp.down_proj.weight"].std() == pytest.approx(1 / math.sqrt(160 * 2 * 3), rel=0.04)
    assert layer["input_layernorm.weight"].mean() == pytest.approx(1, abs=0.01)
    assert layer["self_attn.q_proj.bias"].std() > 0.05


def test_tokenizer_goes_along(demo_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, tokenizer=demo_model, layers=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "It was a bright cold day in April."
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(demo_model)(text).input_ids
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    ("shape", "parameters"),  # as published for these models (llama-1.5b: by hand)
    [
        ("llama-1.5b", 2 * 32000 * 2048 + 24 * (2048 * (2 * 2048 + 2 * 512 + 3 * 8192) + 2 * 2048) + 2048),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.3-70b", 70_553_706_496),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_named_shapes(shape: str, parameters: int) -> None:
    shapes = _tensor_shapes(checkpoint_config(**SHAPES[shape]))
    assert sum(size.numel() for size in shapes.values()) == parameters


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"family": "gpt2"}, "'gpt2' is not one of llama"),
        ({"heads": 4, "kv_heads": 3}, "4 heads are not a multiple of 3 KV heads"),
        ({"family": "qwen2", "hidden_size": 62}, "hidden size 62 is not a multiple of 4 heads"),
        ({"hidden_size": 62, "head_dim": 16}, "hidden size 62 is not a multiple of 4 heads"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_checkpoint(tmp_path, **sizes)


def test_vocabulary_smaller_than_the_tokenizer(demo_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="100 tokens are fewer than the tokenizer's 8192"):
        make_checkpoint(tmp_path, tokenizer=demo_model, vocab_size=100)
