"""The model card: the hub's metadata, the figures of the plan, and only what loads the result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import pyprune
from pyprune.publishing.card import write_card
from pyprune.publishing.loading import Loaders, loaders_of

SOURCE_CARD = """---
license: other
license_name: example-licence
license_link: LICENSE
language:
- en
- de
tags: [chat, gguf, pyprune]
base_model: org/older
model-index: 5
---
# The dense model's own words
"""


def pruned(model: Path, folder: Path, **options: Any) -> Path:
    pyprune.prune(model, folder, options.pop("method", "magnitude"), 0.3, **options)
    return folder


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a card, in the place of a snapshot of the hub."""
    folder = tmp_path_factory.mktemp("hub") / "models--org--dense-1B" / "snapshots" / "c0ffee"
    shutil.copytree(tiny_checkpoint(), folder)
    (folder / "README.md").write_text(SOURCE_CARD)
    return folder


def test_metadata_and_figures(source: Path, tmp_path: Path) -> None:
    windows = torch.arange(64).reshape(4, 16)
    record = pyprune.prune(source, tmp_path / "dense-700M", "magnitude", 0.3, evaluate_on=windows)
    card = ModelCard.load(tmp_path / "dense-700M" / "README.md")
    data = card.data.to_dict()
    assert data == {
        "base_model": "org/dense-1B",
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "other",
        "license_link": "LICENSE",
        "license_name": "example-licence",
        "pipeline_tag": "text-generation",
        "tags": ["chat", "pyprune", "pruning"],
    }
    assert "own words" not in card.text
    assert record.evaluation is not None
    dense, after = (record.evaluation[which] for which in ("dense", "pruned"))
    assert f"| {dense['perplexity']:.3f} ± {dense['perplexity_standard_error']:.3f} | " in card.text
    assert f" | {after['perplexity']:.3f} ± {after['perplexity_standard_error']:.3f} | " in card.text
    assert "# dense-1B, pruned by 30 %" in card.text
    assert 'from_pretrained("dense-700M"' in card.text
    assert (source / "README.md").read_text() == SOURCE_CARD


def test_a_card_that_cannot_be_read_is_a_warning(source: Path, tmp_path: Path) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    for metadata in ("a: [", "- 5", "license: 5\nlanguage: {a: 5}"):
        (model / "README.md").write_text(f"---\n{metadata}\n---\n")
        record = pyprune.prune(model, tmp_path / f"pruned-{len(metadata)}", "magnitude", 0.3)
        data = ModelCard.load(tmp_path / f"pruned-{len(metadata)}" / "README.md").data.to_dict()
        assert data.keys() == {"library_name", "pipeline_tag", "tags"}  # no licence, and no path as a base model
        assert data["tags"] == ["pyprune", "pruning"]
        said = [warning for warning in record.warnings if "its metadata cannot be read" in warning]
        assert bool(said) == metadata.startswith(("a", "-"))


def test_names_are_no_markup(tmp_path: Path, source: Path) -> None:
    folder = pruned(source, tmp_path / "pruned")
    plan = json.loads((folder / "plan.json").read_text())
    plan |= {
        "model": "x/a`b|c\n# d",
        "calibration": {"text": "/secret/`t|\n## e.txt", "samples": 2, "fingerprint": "f"},
    }
    plan["calibration"]["sequence_length"] = 8
    write_card(plan, source, folder, "pruned")
    text = ModelCard.load(folder / "README.md").text
    assert "\n# d" not in text
    assert "\n## e" not in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ({}, {"layers": "1-2"}, Loaders(needs_pyprune=True, vllm=True, gguf=True, mlx=False)),
        ({}, {"uniform": True}, Loaders(needs_pyprune=False, vllm=True, gguf=True, mlx=True)),
        ({"family": "qwen2"}, {"uniform": True}, Loaders(needs_pyprune=False, vllm=False, gguf=True, mlx=False)),
        ({"family": "qwen3"}, {"layers": "1-2"}, Loaders(needs_pyprune=True, vllm=True, gguf=False, mlx=False)),
        ({"family": "qwen3"}, {"uniform": True}, Loaders(needs_pyprune=False, vllm=True, gguf=True, mlx=True)),
    ],
)
def test_only_what_loads_it_is_named(
    arguments: dict[str, Any],
    options: dict[str, Any],
    expected: Loaders,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = pruned(tiny_checkpoint(heads=8, kv_heads=4, **arguments), tmp_path / "pruned", **options)
    assert loaders_of(folder) == expected
    card = (folder / "README.md").read_text()
    assert ("import pyprune" in card) == expected.needs_pyprune
    for heading, loads in (("vLLM", expected.vllm), ("llama.cpp and Ollama", expected.gguf), ("MLX", expected.mlx)):
        assert (f"### {heading}\n" in card) == loads


def test_a_disp_model_is_for_transformers_alone(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    windows = torch.arange(64).reshape(4, 16)
    folder = pruned(tiny_checkpoint(), tmp_path / "pruned", method="disp", calibration=windows, steps=2)
    assert loaders_of(folder) == Loaders(needs_pyprune=True, vllm=False, gguf=False, mlx=False)
