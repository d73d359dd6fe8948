"""Families whose classes make heads as wide as the hidden size over their number: OPT, GPT-NeoX, StableLM.

A stock class holds them with fewer FFN channels, pyprune's own with fewer heads as well.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.family_models import FAMILIES, save_small_model, small_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import pyprune
from pyprune.architectures import ATTENTION, FFN, expand
from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError
from pyprune.evaluation.roundtrip import layered_logits
from pyprune.modeling.stock import stock_config

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {}),
    "opt-untied": ("opt", {"tie_word_embeddings": False}),
    "opt-no-biases": ("opt", {"enable_bias": False}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-few-biases": ("gpt_neox", {"attention_bias": False}),
    "stablelm": ("stablelm", {}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "stablelm-one-key": ("stablelm", {"num_key_value_heads": 1}),
}


NAMES = ["opt", "gpt_neox", "stablelm"]


@pytest.fixture(params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name, changes = CASES[request.param]
    return save_small_model(FAMILIES[name], tmp_path / "dense", **changes)


def tokens(count: int = 8) -> Tensor:
    return torch.randint(3, 96, (count, 40), generator=torch.Generator().manual_seed(1))


def prune(folder: Path, **options: Any) -> Any:
    out = folder.with_name("pruned")
    return pyprune.prune(str(folder), str(out), calibration=tokens(), device="cpu", verify=False, **options)


def masked_logits(folder: Path, result: Any, ids: Tensor) -> Tensor:
    """Of the dense model with the columns of removed units set to zero."""
    model, reader = AutoModelForCausalLM.from_pretrained(folder).eval(), CheckpointReader(folder)
    family = reader.family
    with torch.no_grad():
        for layer, entry in enumerate(result.layers):
            for sublayer, units in ((ATTENTION, "kv_groups"), (FFN, "intermediate_channels")):
                width = reader.shapes[layer].unit_width(sublayer)
                block = model.get_submodule(f"{family.layers}.{layer}")
                weight = block.get_parameter(family.output_proj(sublayer) + ".weight")
                mask = torch.zeros(weight.shape[1])
                mask[expand(torch.tensor(entry[units]), width)] = 1
                weight *= mask
        return model(ids).logits


@pytest.mark.parametrize(
    ("checkpoint", "uniform"),
    [*((name, False) for name in CASES), *((name, True) for name in NAMES)],
    indirect=["checkpoint"],
)
def test_heads_and_channels_go(checkpoint: Path, uniform: bool) -> None:
    result = prune(checkpoint, method="flap", ratio=0.4, uniform=uniform, compensation="none")
    dense = CheckpointReader(checkpoint).shapes
    assert any(len(entry["kv_groups"]) < dense[0].kv_groups for entry in result.layers)
    model, ids = AutoModelForCausalLM.from_pretrained(checkpoint.with_name("pruned")).eval(), tokens(1)
    assert type(model).__name__.startswith("PyPrune")
    with torch.no_grad():
        logits = model(ids).logits
    expected = masked_logits(checkpoint, result, ids)
    assert (logits - expected).norm() <= 1e-6 * expected.norm()  # float32
    written = model.generate(ids[:, :8], max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        without_cache = model(written[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(written[0, 8:], without_cache[0, 7:])
    model.save_pretrained(checkpoint.with_name("again"))
    again = AutoModelForCausalLM.from_pretrained(checkpoint.with_name("again"))
    assert torch.equal(again(ids).logits, logits)
    again = CheckpointReader(checkpoint.with_name("again"))
    assert again.shapes == CheckpointReader(checkpoint.with_name("pruned")).shapes
    assert {shape.head_dim for shape in again.shapes} == {8}


@pytest.mark.parametrize("checkpoint", ["opt", "gpt_neox", "gpt_neox-sequential", "stablelm-parallel"], indirect=True)
def test_what_is_pruned_is_pruned_again(checkpoint: Path) -> None:
    """From fewer heads to still fewer, by a refit, whose layer-by-layer forward is then the loaded model's."""
    prune(checkpoint, method="flap", ratio=0.3, compensation="none")
    out, final, ids = checkpoint.with_name("pruned"), checkpoint.with_name("twice"), tokens(1)
    result = pyprune.prune(str(out), str(final), method="obs", ratio=0.3, calibration=tokens(), device="cpu")
    assert result.ratio["met"] == pytest.approx(0.3, abs=0.05)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(final)(ids).logits[0]
    expected = layered_logits(CheckpointReader(final), ids)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()  # float32, of other orders of summation


@pytest.mark.parametrize("checkpoint", [name for name in CASES if name != "opt-untied"], indirect=True)
def test_channels_alone_leave_the_stock_class(checkpoint: Path) -> None:
    result = prune(checkpoint, method="flap", ratio=0.3, uniform=True, units="channels", compensation="none")
    out = checkpoint.with_name("pruned")
    dense = AutoConfig.from_pretrained(checkpoint)
    config = AutoConfig.from_pretrained(out)
    assert (config.model_type, config.num_attention_heads) == (dense.model_type, dense.num_attention_heads)
    model, ids = AutoModelForCausalLM.from_pretrained(out).eval(), tokens(1)
    assert type(model).__module__.startswith("transformers.")
    with torch.no_grad():
        logits = model(ids).logits
    expected = masked_logits(checkpoint, result, ids)
    assert (logits - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_no_stock_class_has_fewer_heads(name: str, tmp_path: Path) -> None:
    reader = CheckpointReader(save_small_model(FAMILIES[name], tmp_path / "dense"))
    fewer = [shape.kept(shape.kv_groups - 1, shape.intermediate_channels) for shape in reader.shapes]
    with pytest.raises(InputError, match=r"cannot have \d of 8: prune with --units channels"):
        stock_config(reader.family, reader.config, fewer, False, False)


def test_a_width_of_heads_that_the_class_does_not_read(tmp_path: Path) -> None:
    """OPT reads none at all; GPT-NeoX and StableLM would turn more channels than heads have."""
    reader = CheckpointReader(save_small_model(FAMILIES["opt"], tmp_path / "opt", head_dim=16))
    assert {shape.head_dim for shape in reader.shapes} == {8}
    for name in ("gpt_neox", "stablelm"):
        folder = tmp_path / name
        model = small_model(FAMILIES[name])
        model.config.head_dim = 16
        model.save_pretrained(folder)
        with pytest.raises(InputError, match=r"head_dim in config\.json is 16"):
            CheckpointReader(folder)


@pytest.mark.parametrize("changes", [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 32}], ids=str)
def test_opt_350m_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_small_model(FAMILIES["opt"], tmp_path, **changes)
    with pytest.raises(InputError, match=next(iter(changes))):
        CheckpointReader(folder)
