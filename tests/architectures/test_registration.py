"""A family in one file of another package: Helium, which transformers has and pyprune has not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.command_line import run
from support.extension import Extension
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyprune import architectures, modeling
from pyprune.architectures import FAMILIES, LLAMA, Family, register

HELIUM = """
from pyprune.architectures import Family, register

register(Family("helium", "Helium", rotary="other"))
"""

PRUNE = """
import sys
from support.figures import leave_blank
leave_blank()
import pyprune
from transformers import AutoModelForCausalLM
folder, out, file = sys.argv[1:]
text = {"calibration": [f"In the year {n} the harvest was {n % 7} times as good." for n in range(40)]}
pyprune.prune(folder, out, "flap", 0.3, samples=4, sequence_length=48, device="cpu", **text)
model = AutoModelForCausalLM.from_pretrained(out)
print(type(model).__name__, *(layer.mlp.down_proj.in_features for layer in model.model.layers))
pyprune.export(out, file, "gguf")
"""


@pytest.fixture(scope="module")
def checkpoint(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of three layers."""
    folder = tmp_path_factory.mktemp("helium")
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "helium",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def no_families_left() -> Iterator[None]:
    """Takes away what a test registers."""
    known = dict(FAMILIES)
    yield
    for name in FAMILIES.keys() - known.keys():
        for table in (FAMILIES, modeling.PRUNED_CLASSES, modeling.SELECTED_CLASSES):
            table.pop(name, None)


@pytest.mark.slow
def test_a_family_of_another_package(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prune it (the run compares its forward with transformers' own) and load it; the export to GGUF is refused."""
    unknown = "unknown architecture 'helium' (model_type in config.json): of the "
    assert unknown in run(capsys, "estimate", checkpoint, "--ratio", 0.3).err
    installed = Extension(tmp_path, "helium_family", "pyprune.families", HELIUM)
    ended = installed.python("-c", PRUNE, checkpoint, tmp_path / "out", tmp_path / "out.gguf")
    name, *channels = ended.stdout.split()
    assert name == "PyPruneHeliumForCausalLM", ended.stderr
    assert len(set(channels)) > 1
    assert max(map(int, channels)) < 160
    assert "GGUF is written for llama, mistral, qwen2, qwen3, granite, smollm3, not for helium" in ended.stderr


@pytest.mark.usefixtures("no_families_left")
def test_a_family_that_is_registered_late() -> None:
    """Its classes are there at once, although those of the others were made long before."""
    family = register(Family("helium", "Helium"))
    config, _, causal_lm = modeling.PRUNED_CLASSES["helium"]
    assert architectures.family_of(config.model_type) is family
    assert AutoModelForCausalLM._model_mapping[config] is causal_lm
    assert modeling.SELECTED_CLASSES["helium"][2].__name__ == "PyPruneSelectedHeliumForCausalLM"
    assert register(family) is family
    with pytest.raises(ValueError, match="there is a family 'llama' already: Llama"):
        register(Family("llama", "Llama", layers="model.blocks"))
    assert FAMILIES["llama"] is LLAMA


def test_a_family_that_transformers_has_not() -> None:
    said = r"family no_such: transformers [0-9.]+ has no such classes .*; upgrade it, or uninstall the package"
    with pytest.raises(architectures.InputError, match=said):
        register(Family("no_such", "NoSuch"))
    assert "no_such" not in FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("group", ["pyprune.families", "pyprune.methods"])
def test_a_package_that_cannot_be_loaded(group: str, demo_model: Path, tmp_path: Path) -> None:
    broken = Extension(tmp_path, "broken_family", group, "import no_such_package\n")
    refused = broken.pyprune("estimate", demo_model, "--ratio", 0.3)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr == (
        f"pyprune: the package broken_family 1.0 extends pyprune by broken_family ({group}), which cannot be loaded: "
        "No module named 'no_such_package'; repair or uninstall it\n"
    )
