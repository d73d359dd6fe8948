"""Upload of an output, against a stand-in for the hub's HTTP interface."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hub_uploads import COMMIT, hub_with_uploads

import pyprune
from pyprune import InputError
from pyprune.publishing.push import push

TOKENS = {"may-write": {"org"}, "may-not": set()}


@pytest.fixture(scope="module")
def output(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of three layers in several files."""
    folder = tmp_path_factory.mktemp("runs") / "pruned"
    pyprune.prune(tiny_checkpoint(), folder, "magnitude", 0.3, shard_size=100_000)
    return folder


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the hub's library ask an address with a token, by the interface that needs no binary of its own."""

    def at(address: str, token: str | None = "may-write", offline: bool = False) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._runtime.is_xet_available", lambda: False)
        monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False, raising=False)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
        monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)

    return at


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises(InputError) as error:
        push(*arguments, **options)  # type: ignore[arg-type]
    return str(error.value)


def test_the_folder_is_uploaded_as_it_is(output: Path, at: Callable[..., None], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(output, tmp_path / "pruned"))
    for name in (".cache/huggingface/upload/x.lock", ".pyprune-cache/text.safetensors", "journal.jsonl", ".notes"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not of the result")
    with hub_with_uploads(TOKENS) as hub:
        at(hub.address)
        result = push(folder, "org/name", private=True)
        files = hub.repositories["org/name"]
        assert files == {file.name: file.read_bytes() for file in output.iterdir()}
        assert {"README.md", "plan.json", "report.html", "config.json"} <= files.keys()
        assert hub.visibility == {"org/name": "private"}
        assert (result["url"], result["commit"]) == (f"{hub.address}/org/name", COMMIT)
        sent = len(hub.sent)
        push(folder, "org/name")  # it exists by now, and has every object
        assert len(hub.sent) == sent
        push(folder, "org/other")
        assert hub.visibility["org/other"] is None  # as the hub or the organisation has it


def test_an_upload_that_was_cut_off_goes_on(output: Path, at: Callable[..., None]) -> None:
    with hub_with_uploads(TOKENS, fails=2) as hub:
        at(hub.address)
        assert "status 400" in refused(output, "org/name")
        before = list(hub.sent)
        assert before
        assert hub.repositories["org/name"] == {}  # no commit of a part
        hub.fails = None
        push(output, "org/name")
        assert hub.repositories["org/name"].keys() == {file.name for file in output.iterdir()}
        assert len(hub.sent) == len(set(hub.sent)) > len(before)


def test_what_the_hub_says_is_one_line(output: Path, at: Callable[..., None]) -> None:
    with hub_with_uploads(TOKENS) as hub:
        at(hub.address, None)
        assert refused(output, "org/name").startswith("the hub knows nobody here: log in by `hf auth login`")
        at(hub.address, "wrong")
        assert refused(output, "org/name").startswith("the hub does not take the token (Invalid username or password.)")
        at(hub.address, "may-not")
        assert refused(output, "org/name").startswith("no right to write to org/name (You don't have the rights")
        for name in ("name", "org/a/b", "org/na me", "org/", "-org/name--x", "org/name.git"):
            at(hub.address)
            assert "is no repository's name" in refused(output, name)
        assert not hub.repositories
    assert refused(output, "org/name").startswith("the hub cannot be reached (")
    at(hub.address, offline=True)
    assert refused(output, "org/name") == "HF_HUB_OFFLINE is set: unset it to push"


def test_what_is_no_finished_output_is_refused(output: Path, tmp_path: Path, demo_model: Path) -> None:
    assert refused(tmp_path / "none", "org/name").endswith("no such folder; give the output of `pyprune prune`")
    assert "no output of `pyprune prune` (it has no plan.json)" in refused(demo_model, "org/name")
    partial = Path(shutil.copytree(output, tmp_path / "pruned.partial"))
    assert "an unfinished run; finish it with `pyprune prune --resume`" in refused(partial, "org/name")
    changed = Path(shutil.copytree(output, tmp_path / "changed"))
    shard = next(changed.glob("*00002-of*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "changed since it was pruned (" in refused(changed, "org/name")
    (changed / "plan.json").write_text((changed / "plan.json").read_text().replace('"seed": 0', '"seed": 1'))
    assert "changed since it was written" in refused(changed, "org/name")
