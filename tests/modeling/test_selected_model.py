"""A model whose blocks read and add to selections of the residual stream equals the dense one under masks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support.selected_models import (
    CPU,
    NAMES,
    Made,
    add_driver_biases,
    dense_and_selections,
    ids,
    logits,
    mask_by_selections,
    random_selections,
    selected_model,
    selected_tensors,
    widen_norms,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from pyprune.architectures.channel_selection import selected_parameters
from pyprune.checkpoint.load_model import load_model
from pyprune.mask_training.budget import kept_share
from pyprune.modeling import pruned_config

FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
# Products of fewer columns are summed in another order, which costs some units in the last place of the largest term.
RELATIVE = {FLOAT64: 1e-12, FLOAT32: 1e-5}


@pytest.fixture
def make(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Made]:
    """A family, a dense model and selections; see `dense_and_selections`."""
    return partial(dense_and_selections, tiny_checkpoint, tmp_path)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within rounding of the largest value."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= RELATIVE[expected.dtype] * expected.abs().max()


@pytest.mark.parametrize(("dtype", "biased"), [(FLOAT64, False), (FLOAT64, True), (FLOAT32, False)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_masked_equals_materialised(name: str, dtype: torch.dtype, biased: bool, make: Callable[..., Made]) -> None:
    family, dense, selections = make(name, dtype)
    if biased:
        add_driver_biases(family, dense)
    model = selected_model(family, dense, selections)
    assert model.config.model_type == f"pyprune_selected_{family.name}"
    for own in (dense, model):
        widen_norms(family, own)
    whole = logits(dense, ids())
    mask_by_selections(family, dense, selections)
    expected = logits(dense, ids())
    assert_near(logits(model, ids()), expected)
    assert (whole - expected).abs().max() > 1e-2 * whole.abs().max()  # so much do these selections change


def test_layers_of_a_pruned_model_differ_in_all_sizes(make: Callable[..., Made], tmp_path: Path) -> None:
    """With a bias on its output projections; the attention's implementation can be changed as in any model."""
    family, dense, _ = make("llama-mha")
    shapes = [shape.kept(1 + layer, 40 + 8 * layer) for layer, shape in enumerate(family.shapes(dense.config))]
    config = pruned_config(family, dense.config, shapes, o_proj_bias=True, down_proj_bias=True)
    pruned = AutoModelForCausalLM.from_config(config, dtype=FLOAT32).eval()
    add_driver_biases(family, pruned)
    selections = random_selections(shapes)
    selected_model(family, pruned, selections).save_pretrained(tmp_path / "selected")
    model = load_model(tmp_path / "selected", CPU, FLOAT32)
    mask_by_selections(family, pruned, selections)
    expected = logits(pruned, ids())
    assert_near(logits(model, ids()), expected)
    model.set_attn_implementation("eager")
    assert model.get_submodule(family.layers)[1].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, ids()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-mha", "llama-biases", "qwen3-qk-norm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_masked_models(name: str, checkpointing: bool, make: Callable[..., Made]) -> None:
    """Of every parameter: the masked model's where it is selected, and zero elsewhere."""
    family, dense, selections = make(name, FLOAT64)
    model = selected_model(family, dense, selections)
    for own in (dense, model):
        widen_norms(family, own)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    mask_by_selections(family, dense, selections)
    for own in (dense, model):
        own(ids(), use_cache=False, labels=ids()).loss.backward()
    for name, parameter in dense.named_parameters():
        parameter.data = parameter.grad  # so that the gradients are cut as the weights are
        assert parameter.abs().max() > 0, name
    for name, expected in selected_tensors(family, dense, selections).items():
        if expected.dtype.is_floating_point:
            found = model.get_parameter(name).grad
            assert (found - expected).abs().max() <= 1e-11 * expected.abs().max(), name


def test_gradient_of_a_last_matrix_alone(make: Callable[..., Made]) -> None:
    """Nothing that comes before it has one."""
    family, dense, selections = make()
    model = selected_model(family, dense, selections)
    name = f"{family.layers}.2.mlp.down_proj.weight"
    model(ids(), use_cache=False, labels=ids()).loss.backward()
    expected = model.get_parameter(name).grad.clone()
    model.zero_grad()
    model.requires_grad_(False).get_parameter(name).requires_grad_(True)
    model(ids(), use_cache=False, labels=ids()).loss.backward()
    assert_near(model.get_parameter(name).grad, expected)
    assert expected.abs().max() > 0


def test_gradient_of_the_input_alone(make: Callable[..., Made]) -> None:
    family, dense, selections = make("llama-biases", FLOAT64)
    model = selected_model(family, dense, selections)
    mask_by_selections(family, dense, selections)
    gradients = []
    for own in (dense, model):
        widen_norms(family, own)
        given = own.requires_grad_(False).get_input_embeddings()(ids()).requires_grad_(True)
        loss = own(inputs_embeds=given, use_cache=False, labels=ids()).loss
        gradients += torch.autograd.grad(loss, given)
    assert_near(gradients[1], gradients[0])


@pytest.mark.parametrize("trained", [False, True])
def test_autocast(trained: bool, make: Callable[..., Made]) -> None:
    """Matrices in bfloat16 over a residual stream in float32, as the family's layers have it."""
    family, dense, selections = make()
    model = selected_model(family, dense, selections)
    mask_by_selections(family, dense, selections)
    with torch.autocast("cpu", BFLOAT16), torch.set_grad_enabled(trained):
        found, expected = (own(ids(), use_cache=False, output_hidden_states=True) for own in (model, dense))
    assert found.hidden_states[1].dtype == expected.hidden_states[1].dtype == FLOAT32
    largest = expected.logits.detach().abs().max().item()
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.05, atol=0.05 * largest)


@pytest.mark.parametrize("graded", [False, True])
def test_hidden_states_are_not_changed_afterwards(graded: bool, make: Callable[..., Made]) -> None:
    family, dense, selections = make("qwen2-biases")
    model = selected_model(family, dense, selections)
    mask_by_selections(family, dense, selections)
    embeddings = model.get_input_embeddings()(ids()).detach()
    before = embeddings.clone()
    with torch.set_grad_enabled(graded):
        found, expected = (own(inputs_embeds=embeddings, output_hidden_states=True) for own in (model, dense))
    assert torch.equal(embeddings, before)
    assert torch.equal(found.hidden_states[0], before)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for state, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_near(state.detach(), other.detach())


@pytest.mark.parametrize("name", ["mistral-sliding", "qwen3-qk-norm"])
def test_generates_the_same_with_every_cache(name: str, make: Callable[..., Made]) -> None:
    model = selected_model(*make(name))
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    plain = model.generate(ids(2, 7), use_cache=False, **options)
    assert plain.shape == (2, 16)
    assert torch.equal(model.generate(ids(2, 7), use_cache=True, **options), plain)
    assert torch.equal(model.generate(ids(2, 7), cache_implementation="static", **options), plain)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_compiles_whole(trained: bool, make: Callable[..., Made]) -> None:
    model = selected_model(*make("qwen3-qk-norm"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(trained):
        expected, found = (own(ids(), use_cache=False).logits for own in (model, compiled))
    assert found.requires_grad == trained
    assert_near(found.detach(), expected.detach())


@pytest.mark.parametrize("name", ["llama-mha", "qwen3-qk-norm"])
def test_one_channel_everywhere(name: str, make: Callable[..., Made]) -> None:
    family, dense, selections = make(name, count=1)
    model = selected_model(family, dense, selections)
    mask_by_selections(family, dense, selections)
    assert_near(logits(model, ids()), logits(dense, ids()))
    assert model.model.layers[0].mlp.down_proj.weight.shape == (1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_selections(name: str, make: Callable[..., Made]) -> None:
    family, dense, selections = make(name)
    model, shapes = selected_model(family, dense, selections), family.shapes(dense.config)
    counts = model.config.selections
    linears = [
        sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in model.get_submodule(family.layers)
    ]
    assert linears == [selected_parameters(*pair) for pair in zip(shapes, counts, strict=True)]
    assert sum(linears) / sum(shape.parameters for shape in shapes) == pytest.approx(kept_share(shapes, counts))
    assert set(model._no_split_modules) >= {type(block).__name__ for block in model.get_submodule(family.layers)}
