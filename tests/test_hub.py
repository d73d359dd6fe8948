"""What is fetched from the hub, against a stand-in for it; what is taken for a folder instead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyprune import InputError
from pyprune.checkpoint import checkpoint_folder
from pyprune.checkpoint.hub import wanted_files
from pyprune.checkpoint.links import stays_inside

from hub_server import COMMIT, hub  # isort: skip

ALWAYS = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "tokenizer.model", "additional_chat_templates/tools.jinja", "chat_template.jinja",
    "LICENSE", "NOTICE.txt", "USE_POLICY.md", "odd-vocabulary.txt", "qwen.tiktoken", "other.words",
    "tokenization_own.py", "its_helper.py", "helper_of_helper.py",
}  # fmt: skip
SHARDS = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
INDEX = "model.safetensors.index.json"
NEVER = {
    "consolidated.safetensors", "consolidated-00001.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "consolidated.00.pth", "model-q4.gguf", "onnx/model.onnx", "8bit/model.safetensors", "original/tokenizer.model",
    "tf_model.h5", "flax_model.msgpack", "README.md", ".gitattributes", "modeling_own.py", "setup.py", "plan.json",
    "model-00003-of-00002.safetensors", "figures/loss.png", "adapter.safetensors", "training_args.bin",
}  # fmt: skip
CONTENTS = {
    "config.json": json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}),
    "tokenizer_config.json": json.dumps(
        {
            "auto_map": {"AutoTokenizer": ["tokenization_own.Slow", None], "AutoModel": "modeling_own.Own"},
            "vocab_file": "odd-vocabulary.txt",
        }
    ),
    "tokenization_own.py": "from .its_helper import x\nVOCAB_FILES_NAMES = {'vocab_file': 'other.words'}\n",
    "its_helper.py": "from .helper_of_helper import x\nimport os\n",
    INDEX: json.dumps({"weight_map": dict(zip("ab", sorted(SHARDS), strict=True))}),
}


def repository(names: set[str]) -> dict[str, bytes]:
    return {name: CONTENTS.get(name, f"contents of {name}").encode() for name in names}


def fetch(address: str, cache: Path, model: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's library reads its settings once."""
    code = f"from pyprune.checkpoint import checkpoint_folder; print(checkpoint_folder({model!r}))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cache, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("single", [True, False])
def test_what_is_fetched_and_what_is_left(single: bool, tmp_path: Path) -> None:
    # With model.safetensors the shards are a second copy of the weights: transformers loads the one file.
    weights = {"model.safetensors"} if single else {INDEX, *SHARDS}
    with hub("org/name", repository(ALWAYS | NEVER | weights | ({INDEX, *SHARDS} if single else set()))) as server:
        address, fetched = server
        result = fetch(address, tmp_path, "org/name")
        assert result.returncode == 0, result.stderr
        folder = Path(result.stdout.strip().splitlines()[-1])
        assert folder.name == COMMIT
        assert set(fetched) == ALWAYS | weights
        assert len(fetched) == len(set(fetched))  # each once
        assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == ALWAYS | weights
        assert all(stays_inside(folder, folder / name) for name in fetched)
    # Told to be offline in one case, and in the other no hub that answers: what was fetched will do.
    assert fetch(address, tmp_path, "org/name", offline=single).stdout == result.stdout


def test_what_the_hub_does_not_have_is_one_line(tmp_path: Path) -> None:
    with hub("org/pickles", repository({"config.json", "pytorch_model.bin"})) as (address, fetched):
        result = fetch(address, tmp_path, "org/pickles")
        assert "InputError: org/pickles: the hub has neither model.safetensors nor" in result.stderr
        result = fetch(address, tmp_path, "org/nothing")
        assert "InputError: org/nothing: neither a folder here nor to be had from the hub" in result.stderr
        assert not fetched


def test_patterns_in_names_are_names(tmp_path: Path) -> None:
    files = {"config.json", "model.safetensors", "vocab[1].txt", "vocab1.txt", "LICENSE*"}
    with hub("org/name", repository(files | {"LICENSE-x.bin"})) as (address, fetched):
        result = fetch(address, tmp_path, "org/name")
        assert result.returncode == 0, result.stderr
        assert set(fetched) == files


def test_an_index_that_is_none_is_left_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": 5}')
    names = {"config.json", INDEX, *SHARDS}
    assert wanted_files(names, tmp_path) == {"config.json", INDEX}
    assert wanted_files(names, None) == {"config.json", INDEX}


def test_a_typo_below_a_folder_that_is_here_does_not_ask_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", asked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    (tmp_path / "models" / "llama-6m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models")
    for typo in ("../llama", "./llama"):
        with pytest.raises(InputError, match="no such folder"):
            checkpoint_folder(typo)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^models/llama-6mm: no such folder; is it models/llama-6m\? .*not asked"):
        checkpoint_folder("models/llama-6mm")
    with pytest.raises(InputError, match=r"^models/x: no such folder \(the hub is not asked: models is a folder here"):
        checkpoint_folder("models/x")
    assert checkpoint_folder("models/llama-6m") == Path("models/llama-6m")


@pytest.mark.parametrize("name", ["x" * 300 + "/y", "y" * 5000, "../" + "y" * 300])
def test_a_name_that_no_file_can_have_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be looked for: File name too long"):
        checkpoint_folder(name)
