"""What is fetched from the hub, against a stand-in for it; what is taken for a folder instead."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pyprune import InputError
from pyprune.checkpoint import checkpoint_folder
from pyprune.checkpoint.auxiliary_files import companions
from pyprune.checkpoint.hub import at_revision, wanted_files
from pyprune.checkpoint.links import stays_inside

from support.hub_server import COMMIT, hub  # isort: skip

ALWAYS = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "tokenizer.model", "additional_chat_templates/tools.jinja", "chat_template.jinja",
    "LICENSE", "NOTICE.txt", "USE_POLICY.md", "odd-vocabulary.txt", "qwen.tiktoken", "other.words",
    "tokenization_own.py", "its_helper.py", "helper_of_helper.py",
}  # fmt: skip
FETCHED = ALWAYS | {"README.md"}  # read for its metadata, and copied nowhere
SHARDS = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
INDEX = "model.safetensors.index.json"
NEVER = {
    "consolidated.safetensors", "consolidated-00001.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "consolidated.00.pth", "model-q4.gguf", "onnx/model.onnx", "8bit/model.safetensors", "original/tokenizer.model",
    "tf_model.h5", "flax_model.msgpack", ".gitattributes", "modeling_own.py", "setup.py", "plan.json",
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


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes the hub's library ask an address, or be told to be offline; its cache is a folder of the test."""

    def at(address: str, offline: bool = False) -> None:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", address)
        monkeypatch.setattr(
            f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", offline)
        monkeypatch.chdir(tmp_path)

    return at


@pytest.mark.parametrize("single", [True, False])
def test_what_is_fetched_and_what_is_left(single: bool, at: Callable[..., None]) -> None:
    # With model.safetensors the shards are a second copy of the weights: transformers loads the one file.
    weights = {"model.safetensors"} if single else {INDEX, *SHARDS}
    with hub("org/name", repository(FETCHED | NEVER | weights | {INDEX, *SHARDS})) as (address, fetched):
        at(address)
        folder = checkpoint_folder("org/name")
        assert folder.name == COMMIT
        assert sorted(fetched) == sorted(FETCHED | weights)  # each once
        assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == FETCHED | weights
        assert all(stays_inside(folder, folder / name) for name in fetched)
        assert companions(folder) == ALWAYS - {"config.json"}
        assert checkpoint_folder("org/name") == folder
        assert len(fetched) == len(set(fetched))
    assert checkpoint_folder("org/name") == folder  # no hub that answers: what was fetched will do
    at(address, offline=True)
    assert checkpoint_folder("org/name") == folder


def test_what_the_hub_does_not_have_is_one_line(at: Callable[..., None]) -> None:
    with hub("org/pickles", repository({"config.json", "pytorch_model.bin"})) as (address, fetched):
        at(address)
        with pytest.raises(InputError, match=r"^org/pickles: the hub has neither model.safetensors nor"):
            checkpoint_folder("org/pickles")
        with pytest.raises(InputError, match=r"^org/nothing: neither a folder here nor a public model of the hub; if"):
            checkpoint_folder("org/nothing")
        assert not fetched
    with pytest.raises(InputError, match=r"^org/pickles: neither a folder here nor to be had from the hub"):
        checkpoint_folder("org/pickles")


@pytest.mark.parametrize("revision", ["main", "v1", "refs/pr/1", COMMIT])
def test_a_revision_is_a_branch_a_tag_or_a_commit(revision: str, at: Callable[..., None]) -> None:
    with hub("org/name", repository({"config.json", "model.safetensors"})) as (address, _):
        at(address)
        folder = checkpoint_folder(f"org/name@{revision}")
        assert folder.name == COMMIT
        assert (folder / "model.safetensors").is_file()
    assert checkpoint_folder(at_revision("org/name", revision)) == folder  # from the cache


def test_a_revision_that_does_not_exist_names_those_that_do(at: Callable[..., None]) -> None:
    with hub("org/name", repository({"config.json", "model.safetensors"})) as (address, fetched):
        at(address)
        line = r"^org/name: the hub has no branch, tag or commit 'v2' of it; it has main, v1$"
        with pytest.raises(InputError, match=line):
            checkpoint_folder("org/name@v2")
        assert not fetched


def test_a_revision_apart_from_the_id_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert at_revision("org/name", None) == "org/name"
    assert at_revision("org/name@v1", "v1") == at_revision("org/name", "v1") == "org/name@v1"
    with pytest.raises(InputError, match="names a revision, and --revision v2 another"):
        at_revision("org/name@v1", "v2")
    (tmp_path / "org" / "name@x").mkdir(parents=True)
    for folder in ("here", "org/name@x", "/a/b/c"):
        with pytest.raises(InputError, match="only a model of the hub"):
            at_revision(folder, "v1")
    assert checkpoint_folder("org/name@x") == Path("org/name@x")


@pytest.mark.parametrize(
    ("token", "then"), [(None, r"; then log in with `hf auth login` or set HF_TOKEN$"), ("hf_x", "of your token$")]
)
def test_a_gated_model_names_its_page(
    token: str | None, then: str, at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with hub("org/gated", repository({"config.json", "model.safetensors"}), gated=True) as (address, fetched):
        at(address)
        with pytest.raises(InputError, match=rf"^org/gated: .*accept them at {address}/org/gated.*{then}"):
            checkpoint_folder("org/gated")
        assert not fetched


def test_patterns_in_names_are_names(at: Callable[..., None]) -> None:
    files = {"config.json", "model.safetensors", "vocab[1].txt", "LICENSE*"}
    with hub("org/name", repository(files | {"LICENSE-x.bin"})) as (address, fetched):
        at(address)
        checkpoint_folder("org/name")
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

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
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
