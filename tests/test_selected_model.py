"""A model whose blocks read and add to selections of the residual stream equals the dense one under masks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file
from selected_models import (
    CPU,
    NAMES,
    add_driver_biases,
    dense_model,
    dense_selected_config,
    mask_by_selections,
    random_selections,
    selected_model,
    selected_tensors,
    widen_norms,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune.architectures import Family
from pyprune.calibration import consecutive_windows, tokenize
from pyprune.checkpoint import CheckpointReader, CheckpointWriter, stored_model
from pyprune.errors import InputError
from pyprune.evaluate import perplexity
from pyprune.learning.budget import kept_share
from pyprune.loading import load_model
from pyprune.modeling import SELECTED_CLASSES
from pyprune.selection import FFN_MIDDLE, SELECTIONS, Selection, selected_parameters

FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
INDEXED = [name for name in SELECTIONS if name != FFN_MIDDLE]
# Products of fewer columns are summed in another order, which costs some units in the last place of the largest term.
RELATIVE = {FLOAT64: 1e-12, FLOAT32: 1e-5}

Made = tuple[Family, Any, list[Selection]]


@pytest.fixture
def make(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Made]:
    def made(name: str = "llama-gqa-tied", dtype: torch.dtype = FLOAT32, **selected: Any) -> Made:
        family, dense = dense_model(name, tiny_checkpoint, tmp_path, dtype)
        return family, dense, random_selections(family.shapes(dense.config), **selected)

    return made


def ids(count: int = 2, length: int = 13) -> Tensor:
    return torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(5))


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within rounding of the largest value."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= RELATIVE[expected.dtype] * expected.abs().max()


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    return model(tokens, use_cache=False, **options).logits


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
    model.set_attn_implementation("eager")
    assert model.model.layers[1].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, ids()), expected, rtol=1e-3, atol=1e-4)  # its softmax is in float32


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


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_saved_and_loaded_bit_for_bit(dtype: torch.dtype, make: Callable[..., Made], tmp_path: Path) -> None:
    family, dense, selections = make("qwen2-biases", dtype)
    add_driver_biases(family, dense)
    model = selected_model(family, dense, selections)
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype),
        load_model(tmp_path / "saved", CPU, dtype),
    ):
        assert type(loaded) is SELECTED_CLASSES[family.name][2]
        for name, tensor in loaded.state_dict().items():
            expected = model.state_dict()[name]
            assert tensor.dtype == stored[name].dtype == expected.dtype, name
            assert torch.equal(tensor, expected), name
            assert torch.equal(stored[name], expected), name
        assert torch.equal(logits(loaded, ids()), logits(model, ids()))
    layer = load_model(tmp_path / "saved", CPU, BFLOAT16).get_submodule(family.layers)[1]
    for name in INDEXED:
        assert layer.get_buffer(name).dtype == torch.int32
        assert torch.equal(layer.get_buffer(name).long(), selections[1][name])
    config, stored_type = stored_model(tmp_path / "saved")
    assert stored_type == dtype
    assert config.selections == [{name: len(own[name]) for name in SELECTIONS} for own in selections]


def test_refuses_a_checkpoint_without_its_indices(make: Callable[..., Made], tmp_path: Path) -> None:
    selected_model(*make()).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.ffn_in"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.ffn_in"):
        load_model(tmp_path / "saved", CPU, FLOAT32)


@pytest.mark.parametrize("name", ["mistral-sliding", "qwen3-qk-norm"])
def test_generates_the_same_with_every_cache(name: str, make: Callable[..., Made]) -> None:
    model = selected_model(*make(name))
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    plain = model.generate(ids(2, 7), use_cache=False, **options)
    assert plain.shape == (2, 16)
    assert torch.equal(model.generate(ids(2, 7), use_cache=True, **options), plain)
    assert torch.equal(model.generate(ids(2, 7), cache_implementation="static", **options), plain)


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
    assert model._no_split_modules >= {type(block).__name__ for block in model.get_submodule(family.layers)}


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_loads_from_shards_of_the_writer(dtype: torch.dtype, make: Callable[..., Made], tmp_path: Path) -> None:
    """The writer takes int32; its files are those of safetensors."""
    family, dense, selections = make("llama-mha", dtype)
    tensors = selected_tensors(family, dense, selections)
    prefixes = [f"{family.layers}.{layer}." for layer in range(3)]
    shards = [{name: t for name, t in tensors.items() if name.startswith(prefix)} for prefix in prefixes]
    shards.append({name: t for name, t in tensors.items() if not name.startswith(tuple(prefixes))})
    writer = CheckpointWriter(tmp_path / "out", len(shards), {}, resume=False)
    writer.begin()
    for number, shard in enumerate(shards):
        writer.write(number, dict(shard))
    writer.write_index()
    dense_selected_config(family, dense, selections).save_pretrained(writer.partial)
    writer.finish()
    writer.close()
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "theirs").read_bytes()
    expected = logits(selected_model(family, dense, selections), ids())
    assert torch.equal(logits(load_model(tmp_path / "out", CPU, dtype), ids()), expected)
    assert stored_model(tmp_path / "out")[1] == dtype


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], demo_model: Path, tmp_path: Path) -> Path:
    """A selected model with a tokenizer."""
    checkpoint = tiny_checkpoint(family="llama", dtype="float32", tokenizer=demo_model)
    reader = CheckpointReader(checkpoint)
    dense = load_model(checkpoint, CPU, FLOAT32)
    model = selected_model(reader.family, dense, random_selections(reader.shapes))
    model.save_pretrained(tmp_path / "selected")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path / "selected")
    return tmp_path / "selected"


def test_evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A plain text about nothing in particular. " * 40)
    shared = ("--text", text, "--sequence-length", 32, "--max-windows", 3, "--device", "cpu", "--json")
    outcome = run(capsys, "evaluate", folder, *shared)
    assert outcome.status == 0, outcome.err
    tokens = tokenize(text.read_text(), AutoTokenizer.from_pretrained(folder))
    expected = perplexity(load_model(folder, CPU, FLOAT32), consecutive_windows(tokens, 32)[:3])
    assert outcome.json["perplexity"] == pytest.approx(expected, rel=1e-5)
    itself = run(capsys, "evaluate", folder, "--reference", folder, *shared)
    assert itself.status == 0, itself.err
    assert itself.json["kl_divergence"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "command",
    [
        ("prune", "{model}", "{out}", "--method", "magnitude", "--ratio", 0.3),
        ("plan", "{model}", "--method", "magnitude", "--ratio", 0.3),
        ("export", "{model}", "{out}", "--format", "stock"),
        ("export", "{model}", "{out}", "--format", "gguf"),
    ],
    ids=lambda command: f"{command[0]} {command[-1]}",
)
def test_is_not_pruned_or_exported_again(
    command: tuple[Any, ...], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"{model}": folder, "{out}": tmp_path / "out"}
    outcome = run(capsys, *(places.get(argument, argument) for argument in command))
    assert outcome.status == 2
    assert outcome.out == ""
    (line,) = outcome.err.strip().splitlines()  # the empty line is the progress, which had nothing to show
    assert line.startswith(f"pyprune: {folder / 'config.json'}: ")
    assert "cannot be pruned or exported again" in line
    assert not list(tmp_path.glob("out*"))


def test_an_unknown_family_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace("pyprune_selected_llama", "pyprune_selected_gpt2"))
    outcome = run(capsys, "evaluate", folder, "--text", "self")
    assert outcome.status == 2
    assert "gpt2" in outcome.err
    assert str(config) in outcome.err
