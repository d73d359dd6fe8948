"""Biases of output projections that are there from the start: obs fits them unless it is told otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.family_models import FAMILIES, save_small_model
from transformers import AutoModelForCausalLM

import pyprune
from pyprune.checkpoint import CheckpointReader
from pyprune.estimation.target import bias_parameters
from pyprune.methods import make_method

# Families, what their configurations are told, and whether all output projections have biases then.
CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("opt", {}, True),
    ("opt", {"enable_bias": False}, False),
    ("gpt_neox", {}, True),
    ("gpt_neox", {"attention_bias": False}, False),
    ("phi", {}, True),
    ("starcoder2", {}, True),
    ("nemotron", {}, True),
    ("stablelm", {}, False),
    ("qwen2", {}, False),
    ("llama", {"attention_bias": True}, False),
    ("llama", {"attention_bias": True, "mlp_bias": True}, True),
]


@pytest.mark.parametrize(("name", "changes", "biased"), CASES)
def test_the_default_follows_from_the_model(name: str, changes: dict[str, Any], biased: bool, tmp_path: Path) -> None:
    reader = CheckpointReader(save_small_model(FAMILIES[name], tmp_path, **changes))
    assert reader.biased == biased
    fitted = make_method("obs", {}).fitted(reader.shapes, reader.biased)
    assert fitted.options["compensation"] == ("bias" if biased else "weights")
    for kind in ("weights", "bias", "none"):
        asked = make_method("obs", {"compensation": kind}).fitted(reader.shapes, reader.biased)
        assert asked.options["compensation"] == kind
        added = bias_parameters(reader.shapes, reader, asked)
        assert added == (48 * reader.missing_biases if kind == "bias" else 0)  # hidden_size each


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "phi", "starcoder2"])
def test_what_is_pruned_loads_in_the_stock_class(name: str, tmp_path: Path) -> None:
    """The record has the kind; only what fits biases changes them."""
    family, dense = FAMILIES[name], save_small_model(FAMILIES[name], tmp_path / "dense")
    ids = torch.randint(3, 96, (8, 40), generator=torch.Generator().manual_seed(1))
    biases = {}
    for kind, options in {"bias": {}, "weights": {"compensation": "weights"}}.items():
        out = tmp_path / kind
        asked = {"ratio": 0.3, "uniform": True, "units": "channels", "calibration": ids, "device": "cpu"} | options
        record = pyprune.prune(str(dense), str(out), method="obs", **asked)
        assert record.options["compensation"] == kind
        model = AutoModelForCausalLM.from_pretrained(out)
        assert type(model) is family.causal_lm_class
        assert model.config.model_type == name
        biases[kind] = CheckpointReader(out).read_layer(0)
    old = CheckpointReader(dense).read_layer(0)
    bias = family.output_proj("ffn") + ".bias"
    assert torch.equal(biases["weights"][bias], old[bias])
    assert not torch.equal(biases["bias"][bias], old[bias])
