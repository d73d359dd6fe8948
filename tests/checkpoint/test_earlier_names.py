"""Names of published files, which transformers changes while it loads them, are read as those of its classes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.family_models import FAMILIES, small_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError

Tensors = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Tensors:
    """Store what `change` returns in the place of the tensors of the folder, which are returned."""
    file = folder / "model.safetensors"
    own = load_file(file)
    save_file({name: tensor.contiguous() for name, tensor in change(dict(own)).items()}, file, {"format": "pt"})
    return own


def assert_read_as_loaded(folder: Path, family: str) -> CheckpointReader:
    """The reader has what transformers loads, under the names of its class; a tied head is none of them."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    reader = CheckpointReader(folder)
    read = reader.read(list(reader.tensors))
    tied = {FAMILIES[family].head} if reader.tied else set()
    assert read.keys() == loaded.keys() - tied
    assert all(torch.equal(read[name], loaded[name]) for name in read)
    return reader


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves(name: str, tmp_path: Path) -> None:
    """It saves under the names of published files; read they are those of the model that was saved."""
    model = small_model(FAMILIES[name])
    model.save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    state = model.state_dict()
    assert reader.tensors.keys() == state.keys() - ({FAMILIES[name].head} if reader.tied else set())
    assert all(torch.equal(tensor, state[key]) for key, tensor in reader.read(list(reader.tensors)).items())


def test_gpt_neox(tmp_path: Path) -> None:
    """Pythia's files: the head's old name, and masks and frequencies in each layer."""

    def published(own: Tensors) -> Tensors:
        assert "embed_out.weight" in own  # what transformers writes today as well
        for layer in range(2):
            prefix = f"gpt_neox.layers.{layer}.attention."
            own[prefix + "bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
            own[prefix + "masked_bias"] = torch.tensor(-1e9)
            own[prefix + "rotary_emb.inv_freq"] = torch.ones(2)
        return own

    small_model(FAMILIES["gpt_neox"]).save_pretrained(tmp_path)
    rewrite(tmp_path, published)
    reader = assert_read_as_loaded(tmp_path, "gpt_neox")
    assert reader.tensors["lm_head.weight"].name == "embed_out.weight"
    assert len(reader.unused) == 6
    rewrite(tmp_path, lambda own: own | {"gpt_neox.layers.0.attention.extra": torch.ones(1)})
    with pytest.raises(InputError, match=r"attention\.extra is not part of a gpt_neox model"):
        CheckpointReader(tmp_path)


def test_opt(tmp_path: Path) -> None:
    """The older of OPT's files have the names of the decoder alone, and no head."""
    small_model(FAMILIES["opt"]).save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda own: {name.removeprefix("model."): t for name, t in own.items() if name != "lm_head.weight"}
    )
    reader = assert_read_as_loaded(tmp_path, "opt")
    assert reader.tensors["model.decoder.embed_tokens.weight"].name == "decoder.embed_tokens.weight"


def test_qwen3_5(tmp_path: Path) -> None:
    """The files of the whole model: the text model within it, its picture encoder and the layers that predict more."""

    def published(own: Tensors) -> Tensors:
        renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in own.items()}
        return renamed | {"mtp.norm.weight": torch.ones(48), "model.visual.pos_embed.weight": torch.ones(2)}

    small_model(FAMILIES["qwen3_5_text"]).save_pretrained(tmp_path)
    rewrite(tmp_path, published)
    reader = assert_read_as_loaded(tmp_path, "qwen3_5_text")
    assert sorted(reader.unused) == ["model.visual.pos_embed.weight", "mtp.norm.weight"]


@pytest.mark.parametrize("name", ["gpt_neox", "opt", "qwen3_5_text", "llama"])
def test_too_few_layers_are_named_as_the_class_names_them(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    small_model(family).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda own: {key: tensor for key, tensor in own.items() if ".layers.1." not in key})
    with pytest.raises(InputError, match=rf"tensor {family.layers}\.1\.\* is missing"):
        CheckpointReader(tmp_path)
