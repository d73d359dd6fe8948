"""What a model's family cannot lose, or be written as: one line on stderr, status 2, nothing written."""

from pathlib import Path
from typing import Any

import pytest
from support.command_line import run
from support.family_models import FAMILIES, save_small_model

PRUNE = ("--method", "magnitude", "--ratio", 0.3)


@pytest.mark.parametrize(
    ("family", "changes", "command", "line"),
    [
        ("llama", {}, ("prune", *PRUNE, "--units", "heads"), "they go with their key and value head: take kv-groups"),
        ("olmo2", {}, ("prune", *PRUNE, "--units", "kv-groups"), "no layer of this model can lose kv-groups"),
        ("olmo2", {}, ("prune", *PRUNE, "--units", "heads"), "no layer of this model can lose heads"),
        ("llama", {}, ("prune", *PRUNE, "--units", "layers"), "'layers' is no kind of unit; they are kv-groups, heads"),
        ("llama", {}, ("prune", *PRUNE, "--units", ""), "is no kind of unit"),
        ("gemma2", {}, ("estimate", "--method", "disp", "--ratio", 0.3), "gemma2 models are not"),
        ("cohere", {}, ("estimate", "--method", "disp", "--ratio", 0.3), "cohere models are not"),
        ("granite", {}, ("estimate", "--method", "disp", "--ratio", 0.3), "granite models are not"),
        ("olmo2", {}, ("estimate", "--method", "policy", "--ratio", 0.3), "policy needs KV groups that may go"),
        ("qwen3_5_text", {}, ("estimate", "--method", "policy", "--ratio", 0.3), "policy needs KV groups that may go"),
        ("phi", {"qk_layernorm": True}, ("prune", *PRUNE), "qk_layernorm in config.json: phi models with it are not"),
        ("stablelm", {"qk_layernorm": True}, ("prune", *PRUNE), "qk_layernorm in config.json"),
        ("qwen3_5_text", {}, ("export", "--format", "gguf"), "GGUF is written for llama, mistral, qwen2, qwen3, "),
        ("granite", {}, ("export", "--format", "gguf"), "models that compute what Llama does"),
    ],
)  # fmt: skip
def test_refused(
    family: str,
    changes: dict[str, Any],
    command: tuple[Any, ...],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save_small_model(FAMILIES[family], tmp_path / "model", **changes)
    output = () if command[0] == "estimate" else (tmp_path / "out.gguf",)
    assert_refused(run(capsys, command[0], folder, *output, *command[1:]), line, tmp_path)


def test_code_beside_layers_of_several_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_small_model(FAMILIES["qwen3_5_text"], tmp_path / "model", num_hidden_layers=4,
                              layer_types=["linear_attention", "full_attention"] * 2)  # fmt: skip
    pruned = run(capsys, "prune", folder, tmp_path / "small", *PRUNE, "--layers", "1-3")
    assert pruned.status == 0, pruned.err
    outcome = run(capsys, "export", tmp_path / "small", tmp_path / "out", "--format", "remote-code")
    assert_refused(outcome, "code beside the weights is written for llama, mistral, qwen2, qwen3, ", tmp_path)


def test_heads_go_where_all_share_a_key_and_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_small_model(FAMILIES["llama"], tmp_path / "model", num_key_value_heads=1)
    outcome = run(capsys, "prune", folder, tmp_path / "out", *PRUNE, "--units", "heads", "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["ratio"] == 0.25  # two of eight heads in each layer


def assert_refused(outcome: Any, line: str, folder: Path) -> None:
    assert (outcome.status, outcome.out) == (2, ""), outcome.err
    [said] = [own for own in outcome.err.splitlines() if own.startswith("pyprune: ")]
    assert line in said
    assert "Traceback" not in outcome.err
    assert not list(folder.glob("out*"))
