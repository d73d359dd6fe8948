"""Every config.json that is written says what it says in the spelling of transformers 4 too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import run
from support.families import family_checkpoint
from support.selected_models import random_selections
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune.checkpoint import CheckpointReader
from pyprune.modeling import selected_config
from pyprune.modeling.config import registered_config
from pyprune.modeling.saving import earlier_fields, save_config

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
THETA = {"rope_theta": 500000.0}
# rope_parameters of transformers 5 -> what its release 4 calls the same
ROPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (THETA | {"rope_type": "default"}, THETA | {"rope_scaling": None}),
    (THETA | {"rope_type": "linear", "factor": 4.0}, THETA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    (THETA | {"rope_type": "yarn", "factor": 4.0}, THETA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    (
        THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        THETA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    (THETA | {"rope_type": "llama3"} | LLAMA_3, THETA | {"rope_scaling": {"rope_type": "llama3"} | LLAMA_3}),
    (
        THETA | {"rope_type": "default", "partial_rotary_factor": 0.5},
        THETA | {"rope_scaling": None, "partial_rotary_factor": 0.5},
    ),
]
# What transformers 4 reads of a Llama with the parameters of tests/support/families.py.
EXPECTED = THETA | {"rope_scaling": {"rope_type": "llama3"} | LLAMA_3, "torch_dtype": "float32"}


@pytest.mark.parametrize(("rope", "earlier"), ROPES)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"])
def test_both_spellings_are_read_as_the_same(
    model_type: str, rope: dict[str, Any], earlier: dict[str, Any], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(model_type, rope_parameters=dict(rope), dtype="bfloat16", max_position_embeddings=256)
    save_config(config, tmp_path)
    expected = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in earlier} == earlier
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert read(tmp_path) == expected
    alone = {name: value for name, value in written.items() if name not in ("rope_parameters", "dtype")}
    (tmp_path / "config.json").write_text(json.dumps(alone))
    assert read(tmp_path) == expected


def test_parameters_by_kind_of_layer_are_left_alone() -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": None}
    assert earlier_fields({"rope_parameters": rope}) == {}
    assert earlier_fields({}) == {}


def test_every_output_has_them(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = family_checkpoint("llama-3-rope", tiny_checkpoint, tmp_path)
    prune = ("prune", source, tmp_path / "uniform", "--method", "magnitude", "--ratio", 0.3)
    assert run(capsys, *prune, "--uniform", "--no-verify").status == 0
    config = CheckpointReader(tmp_path / "uniform").config
    assert config.model_type == "llama"
    pruned = differing(source, tmp_path / "pruned")
    folders = [tmp_path / "uniform"]
    for model, layout in ((tmp_path / "uniform", "stock"), (pruned, "padded"), (pruned, "remote-code")):
        assert run(capsys, "export", model, tmp_path / layout, "--format", layout, "--no-verify").status == 0
        folders.append(tmp_path / layout)
    reader = CheckpointReader(source)
    counts = [{name: len(kept) for name, kept in own.items()} for own in random_selections(reader.shapes)]
    save_config(selected_config(reader.family, reader.config, counts, False, False), tmp_path / "selected")
    for folder in (*folders, tmp_path / "selected"):
        written = json.loads((folder / "config.json").read_text())
        assert {name: written[name] for name in EXPECTED} == EXPECTED, folder
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).rope_parameters == config.rope_parameters


def read(folder: Path) -> dict[str, Any]:
    """Everything that transformers reads of a configuration, but for where it lies."""
    fields = AutoConfig.from_pretrained(folder).to_dict()
    return {name: value for name, value in fields.items() if name != "_name_or_path"}


def differing(source: Path, folder: Path) -> Path:
    """A checkpoint whose layers differ, with random weights."""
    reader = CheckpointReader(source)
    shapes = [shape.kept(1 + layer % 2, 40 + layer) for layer, shape in enumerate(reader.shapes)]
    config = registered_config(reader.family, reader.config, shapes, o_proj_bias=False, down_proj_bias=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
