"""Layers run one at a time equal the whole model; a pruned model equals the dense one with its units zeroed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, family_checkpoint
from transformers import AutoModelForCausalLM

import pyprune  # noqa: F401 (registers the pruned classes)
from pyprune.architectures import ATTENTION, FFN, SUBLAYERS
from pyprune.checkpoint import CheckpointReader
from pyprune.forward.layer_forward import LayerForward
from pyprune.modeling import pruned_config
from pyprune.passes.rewrite import compensation_bias, rewrite_layer

CPU, FLOAT32 = torch.device("cpu"), torch.float32


@pytest.fixture(params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return family_checkpoint(request.param, tiny_checkpoint, tmp_path)


def windows(count: int = 3, length: int = 19) -> torch.Tensor:
    return torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(5))


def test_layer_by_layer_equals_the_whole_model(checkpoint: Path) -> None:
    reader, ids = CheckpointReader(checkpoint), windows()
    forward = LayerForward(reader, ids, CPU, FLOAT32)
    forward.batch = 2  # a last micro-batch of one
    hidden = forward.embed()
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=FLOAT32, attn_implementation="sdpa")
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True).hidden_states
        eager = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=FLOAT32, attn_implementation="eager")
        eager_states = eager(ids, output_hidden_states=True).hidden_states
    seen: dict[str, list[torch.Tensor]] = {m: [] for m in SUBLAYERS}
    for layer in range(reader.layers - 1):
        torch.testing.assert_close(hidden.data, expected[layer], rtol=1e-5, atol=1e-5)
        # The oracle is not sdpa alone: eager attention with transformers' own mask is causal as well.
        torch.testing.assert_close(hidden.data, eager_states[layer], rtol=1e-3, atol=1e-4)
        block = forward.build(reader.stream_layer(layer), layer)
        forward.run(block, layer, hidden, {reader.family.output_proj(m): seen[m].append for m in SUBLAYERS})
    torch.testing.assert_close(hidden.data, expected[reader.layers - 1], rtol=1e-5, atol=1e-5)
    for module, width in ((ATTENTION, reader.shapes[0].group_width * reader.shapes[0].kv_groups), (FFN, 160)):
        assert torch.cat(seen[module][:2]).shape == (3, 19, width)


@pytest.mark.parametrize("biased", [False, True])
def test_pruned_model_equals_the_dense_one_with_its_units_zeroed(
    checkpoint: Path, tmp_path: Path, biased: bool
) -> None:
    """Zeroed columns of the output projection remove exactly what the units contribute: oracle for GQA, biases."""
    reader, ids = CheckpointReader(checkpoint), windows()
    generator = torch.Generator().manual_seed(9)
    dense = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=FLOAT32)
    shapes, tensors = [], reader.read(reader.outside_layers())
    for layer, shape in enumerate(reader.shapes):
        kept = {}
        own = reader.read_layer(layer)
        bias = {}
        for module in SUBLAYERS:
            count = max(1, shape.units(module) * (layer + 1) // (reader.layers + 1))
            kept[module] = torch.randperm(shape.units(module), generator=generator)[:count].sort().values
            output_proj = dense.model.layers[layer].get_submodule(reader.family.output_proj(module))
            mean = torch.randn(output_proj.weight.shape[1], generator=generator)
            width = shape.unit_width(module)
            columns = (kept[module][:, None] * width + torch.arange(width)).flatten()
            removed = torch.ones(output_proj.weight.shape[1], dtype=torch.bool)
            removed[columns] = False
            if biased:
                bias[module] = compensation_bias(output_proj.weight.data, mean, kept[module], width)
                expected = output_proj.weight.data[:, removed] @ mean[removed]
                torch.testing.assert_close(bias[module], expected, rtol=1e-5, atol=1e-6)
                previous = torch.zeros(shape.hidden_size) if output_proj.bias is None else output_proj.bias.data
                output_proj.bias = torch.nn.Parameter(previous + expected)
            output_proj.weight.data[:, removed] = 0
        pruned = rewrite_layer(reader.family, own, shape, kept, bias)
        tensors |= {reader.layer_prefix(layer) + name: t for name, t in pruned.items()}
        shapes.append(shape.kept(len(kept[ATTENTION]), len(kept[FFN])))
    config = pruned_config(reader.family, reader.config, shapes, biased, biased)
    model = AutoModelForCausalLM.from_config(config, dtype=FLOAT32)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if reader.tied else set())
    with torch.no_grad():
        before, after = dense(ids).logits, model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=FLOAT32)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, after)
        loaded.set_attn_implementation("eager")
        assert loaded.model.layers[1].self_attn.config._attn_implementation == "eager"
        torch.testing.assert_close(loaded(ids).logits, after, rtol=1e-3, atol=1e-4)
        loaded.set_attn_implementation("sdpa")
        cached = loaded.generate(ids[:1], max_new_tokens=8, do_sample=False, use_cache=True)
        plain = loaded.generate(ids[:1], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_pruned_model_compiles_whole(tiny_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader(family_checkpoint("llama-gqa-tied", tiny_checkpoint, Path()))
    shapes = [s.kept(1 + layer % 2, 40 + 8 * layer) for layer, s in enumerate(reader.shapes)]
    model = AutoModelForCausalLM.from_config(
        pruned_config(reader.family, reader.config, shapes, True, True), dtype=FLOAT32
    ).eval()
    ids = windows(1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(compiled, expected)


def test_stock_configuration_where_nothing_differs(tiny_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader(family_checkpoint("llama-mha", tiny_checkpoint, Path()))
    halved = [s.kept(2, 80) for s in reader.shapes]
    stock = pruned_config(reader.family, reader.config, halved, False, False)
    assert stock.model_type == "llama"
    assert stock.architectures == ["LlamaForCausalLM"]
    assert "per_layer_config" not in stock.to_dict()
    # transformers' LlamaConfig refuses 64 / 3 heads although head_dim is written out: Mistral's takes them.
    three = pruned_config(reader.family, reader.config, [s.kept(3, 80) for s in reader.shapes], False, False)
    assert three.model_type == "mistral"
    biased = pruned_config(reader.family, reader.config, halved, True, True)
    assert biased.model_type == "pyprune_llama"
    assert AutoModelForCausalLM.from_config(biased).model.layers[0].mlp.down_proj.bias is not None


def test_a_pruned_checkpoint_can_be_pruned_again(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    reader = CheckpointReader(family_checkpoint("qwen2-biases", tiny_checkpoint, tmp_path))
    shapes = [s.kept(2 + layer % 2, 40 + 8 * layer) for layer, s in enumerate(reader.shapes)]
    config = pruned_config(reader.family, reader.config, shapes, True, True)
    AutoModelForCausalLM.from_config(config, dtype=FLOAT32).save_pretrained(tmp_path / "once")
    again = CheckpointReader(tmp_path / "once")
    assert again.shapes == shapes
    forward = LayerForward(again, windows(), CPU, FLOAT32)
    hidden = forward.embed()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=FLOAT32)
    with torch.no_grad():
        expected = model(windows(), output_hidden_states=True).hidden_states
    forward.run(forward.build(again.stream_layer(0), 0), 0, hidden, {})
    torch.testing.assert_close(hidden.data, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_hidden_states_in_host_memory_give_the_same_bits(tiny_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader(family_checkpoint("llama-gqa-tied", tiny_checkpoint, Path()))
    states = []
    for on_device in (2, 0):
        device = torch.device("cuda", 0)
        forward = LayerForward(reader, windows(8, 33), device, torch.bfloat16, batch=3, on_device=on_device)
        hidden = forward.embed()
        assert hidden.on_device == hidden.data.is_cuda == bool(on_device)
        assert hidden.data.is_pinned() != bool(on_device)
        for layer in range(reader.layers):
            forward.run(forward.build(reader.stream_layer(layer), layer), layer, hidden, {})
        torch.cuda.synchronize()
        states.append(hidden.data.cpu())
    assert torch.equal(*states)
