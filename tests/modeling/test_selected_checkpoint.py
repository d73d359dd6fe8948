"""Folders of models with selections: written and read bit for bit, evaluated, and refused where they cannot be used."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.selected_models import (
    CPU,
    Made,
    add_driver_biases,
    dense_and_selections,
    dense_selected_config,
    ids,
    logits,
    random_selections,
    selected_model,
    selected_tensors,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyprune.architectures.channel_selection import FFN_MIDDLE, SELECTIONS
from pyprune.calibration.text import tokenize
from pyprune.calibration.windows import consecutive_windows
from pyprune.checkpoint import CheckpointReader, CheckpointWriter
from pyprune.checkpoint.load_model import load_model
from pyprune.errors import InputError
from pyprune.evaluation.perplexity import perplexity
from pyprune.modeling import SELECTED_CLASSES

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
INDEXED = [name for name in SELECTIONS if name != FFN_MIDDLE]


@pytest.fixture
def make(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Made]:
    """A family, a dense model and selections; see `dense_and_selections`."""
    return partial(dense_and_selections, tiny_checkpoint, tmp_path)


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
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.selections == [{name: len(own[name]) for name in SELECTIONS} for own in selections]


def test_refuses_a_checkpoint_without_its_indices(make: Callable[..., Made], tmp_path: Path) -> None:
    selected_model(*make()).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.ffn_in"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.ffn_in"):
        load_model(tmp_path / "saved", CPU, FLOAT32)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_loads_from_shards_of_the_writer(dtype: torch.dtype, make: Callable[..., Made], tmp_path: Path) -> None:
    """The writer takes int32; its files are those of safetensors."""
    family, dense, selections = make("llama-mha", dtype)
    tensors = selected_tensors(family, dense, selections)
    prefixes = [f"{family.layers}.{layer}." for layer in range(3)]
    parts = [{name: t for name, t in tensors.items() if name.startswith(prefix)} for prefix in prefixes]
    parts.append({name: t for name, t in tensors.items() if not name.startswith(tuple(prefixes))})
    writer = CheckpointWriter(tmp_path / "out", {}, resume=False)
    writer.begin()
    writer.lay_out(parts, 100_000)
    for number, part in enumerate(parts):
        writer.write(number, dict(part))
    writer.write_index()
    dense_selected_config(family, dense, selections).save_pretrained(writer.partial)
    writer.finish()
    writer.close()
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = load_file(file)
        assert {tensor.dtype for tensor in tensors.values()} <= {dtype, torch.int32}
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "theirs").read_bytes()
    expected = logits(selected_model(family, dense, selections), ids())
    assert torch.equal(logits(load_model(tmp_path / "out", CPU, dtype), ids()), expected)


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
