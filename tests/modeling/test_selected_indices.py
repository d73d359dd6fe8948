"""Indices that are no selection are refused by every way into a model, and by the first forward at the latest."""

import copy
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.selected_models import CPU, dense_and_selections, ids, logits, random_selections, selected_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pyprune.architectures import LLAMA
from pyprune.checkpoint.load_model import load_model
from pyprune.errors import InputError
from pyprune.modeling.indices import INDEXED, check_index

CHANNELS, COUNT = 64, 20


def negative(index: Tensor) -> None:
    index[0] = -4


def too_large(index: Tensor) -> None:
    index[-1] = CHANNELS


def wild(index: Tensor) -> None:
    index[-1] = 2**31 - 1


def unsorted(index: Tensor) -> None:
    index[:2] = index[:2].flip(0)


def duplicated(index: Tensor) -> None:
    index[1] = index[0]


DAMAGES = [negative, too_large, wild, unsorted, duplicated]


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Any:
    return selected_model(*dense_and_selections(tiny_checkpoint, tmp_path, count=COUNT))


@pytest.fixture
def save(model: Any, tmp_path: Path) -> Callable[..., Path]:
    """The model as a folder, with one index changed: `save(name, change)`; change returns another tensor or nothing."""

    def save(name: str, change: Callable[[Tensor], Tensor | None]) -> Path:
        folder = tmp_path / "saved"
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        full = f"model.layers.1.{name}"
        changed = change(tensors[full])
        tensors[full] = tensors[full] if changed is None else changed
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return save


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", INDEXED)
def test_damaged_indices_are_refused_on_loading(
    name: str, damage: Callable[[Tensor], None], save: Callable[..., Path], model: Any
) -> None:
    folder = save(name, damage)
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(InputError, match=rf"model\.layers\.1\.{name}\["):
            auto.from_pretrained(folder)
    with pytest.raises(InputError, match=rf"cannot be loaded: model\.layers\.1\.{name}\["):
        load_model(folder, CPU, torch.float32)
    with pytest.raises(InputError, match=rf"model\.layers\.1\.{name}\["):
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_evaluate_says_it_in_a_line(
    damage: Callable[[Tensor], None],
    tiny_checkpoint: Callable[..., Path],
    demo_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = tiny_checkpoint(family="llama", dtype="float32", tokenizer=demo_model)
    family, dense = LLAMA, load_model(checkpoint, CPU, torch.float32)
    made = selected_model(family, dense, random_selections(family.shapes(dense.config), count=COUNT))
    damage(made.model.layers[1].ffn_out)
    folder, text = tmp_path / "saved", tmp_path / "text.txt"
    made.save_pretrained(folder)
    for file in checkpoint.glob("token*"):
        shutil.copy(file, folder)
    text.write_text("A plain text about nothing in particular. " * 40)
    outcome = run(capsys, "evaluate", folder, "--text", text, "--sequence-length", 32, "--device", "cpu")
    assert outcome.status == 2
    (line,) = outcome.err.strip().splitlines()
    assert "model.layers.1.ffn_out[" in line


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("length", [COUNT - 1, COUNT + 1])
def test_another_number_of_indices_is_refused(name: str, length: int, save: Callable[..., Path], model: Any) -> None:
    folder = save(name, lambda _: torch.arange(length, dtype=torch.int32))
    with pytest.raises(RuntimeError):  # transformers' own, whose report has the names
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match=name):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    with pytest.raises(InputError, match=name):
        load_model(folder, CPU, torch.float32)
    with pytest.raises(RuntimeError, match=name):
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("trained", [False, True])
def test_buffers_put_in_by_hand_are_refused_by_the_first_forward(
    name: str, damage: Callable[[Tensor], None], trained: bool, model: Any
) -> None:
    layer = model.model.layers[2]
    good = getattr(layer, name)
    bad = good.clone()
    damage(bad)
    setattr(layer, name, bad)
    with pytest.raises(InputError, match=rf"model\.layers\.2\.{name}"), torch.set_grad_enabled(trained):
        model(ids())
    setattr(layer, name, good)
    assert logits(model, ids()).isfinite().all()


def test_missing_indices_are_refused_even_without_a_look_at_the_loading_information(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.ffn_in"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.ffn_in is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_good_indices_are_looked_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, looked = logits(model, ids()), []
    monkeypatch.setattr("pyprune.modeling.indices.check_index", lambda where, *_: looked.append(where))
    assert torch.equal(logits(model, ids()), expected)
    assert not looked
    moved = copy.deepcopy(model)
    assert torch.equal(logits(moved, ids()), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), ids()), expected)
    model.load_state_dict(model.state_dict())
    assert len(looked) == len(INDEXED) * 3


def test_the_meta_device_runs(model: Any) -> None:
    assert model.to("meta")(ids().to("meta")).logits.shape == (2, 13, 97)


@pytest.mark.parametrize("index", [torch.zeros(3), torch.arange(3, dtype=torch.int16), torch.arange(3)[None]])
def test_types_and_shapes(index: Tensor) -> None:
    with pytest.raises(InputError, match="here is torch"):
        check_index("here", index, 3, 8)


def test_a_classifier_checks_too(save: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"model\.layers\.1\.ffn_in\["):
        AutoModelForSequenceClassification.from_pretrained(save("ffn_in", negative))
