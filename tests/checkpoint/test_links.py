"""Which links of a checkpoint folder are followed."""

from pathlib import Path

import pytest

from pyprune.checkpoint.links import stays_inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name in ("plain", "sub/plain", "../secret", "../model-2"):
        (folder / name).write_text(name)
    return folder


def test_files_and_links_within_the_folder_belong_to_it(folder: Path) -> None:
    (folder / "relative").symlink_to("sub/plain")
    (folder / "absolute").symlink_to(folder / "plain")
    (folder / "twice").symlink_to("relative")
    (folder / "round").symlink_to("../model/plain")
    for name in ("plain", "sub/plain", "relative", "absolute", "twice", "round"):
        assert stays_inside(folder, folder / name), name


def test_the_folder_may_itself_be_reached_by_a_link_or_relatively(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "alias").symlink_to(folder)
    (folder / "absolute").symlink_to(folder / "plain")
    monkeypatch.chdir(folder.parent)
    for reached in (folder.parent / "alias", Path("model"), Path("alias"), Path("../" + folder.parent.name + "/model")):
        assert stays_inside(reached, reached / "plain")
        assert stays_inside(reached, reached / "absolute")


def test_what_leads_outside_does_not_belong_to_it(folder: Path) -> None:
    (folder / "relative").symlink_to("../secret")
    (folder / "absolute").symlink_to(folder.parent / "secret")
    (folder / "prefix").symlink_to("../model-2")  # a name that begins as the folder's
    (folder / "first").symlink_to("relative")
    (folder / "elsewhere").symlink_to("..")
    (folder / "device").symlink_to("/dev/null")
    for name in ("relative", "absolute", "prefix", "first", "elsewhere/secret", "device", "../secret", "/etc/passwd"):
        assert not stays_inside(folder, folder / name), name
    assert not stays_inside(folder, folder / "sub/../plain")
    assert not stays_inside(folder, Path("plain"))


@pytest.mark.parametrize("name", ["self", "zero\0"])
def test_names_that_lead_nowhere_are_not_of_the_folder(folder: Path, name: str) -> None:
    (folder / "self").symlink_to("self")
    assert not stays_inside(folder, folder / name)


def test_the_blobs_of_the_hub_cache_belong_to_its_snapshots(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    for each in (snapshot / "additional_chat_templates", cache / "blobs", tmp_path / "models--org--other" / "blobs"):
        each.mkdir(parents=True)
    for blob in (cache / "blobs" / "12ab", tmp_path / "models--org--other" / "blobs" / "12ab", cache / "secret"):
        blob.write_text("")
    (snapshot / "config.json").symlink_to("../../blobs/12ab")
    (snapshot / "additional_chat_templates" / "tool.jinja").symlink_to("../../../blobs/12ab")
    (snapshot / "other").symlink_to("../../../models--org--other/blobs/12ab")
    (snapshot / "above").symlink_to("../../secret")
    assert stays_inside(snapshot, snapshot / "config.json")
    assert stays_inside(snapshot, snapshot / "additional_chat_templates" / "tool.jinja")
    assert not stays_inside(snapshot, snapshot / "other")
    assert not stays_inside(snapshot, snapshot / "above")


def test_blobs_belong_to_no_other_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "a" / "blobs").mkdir()
    (tmp_path / "a" / "blobs" / "x").write_text("")
    (folder / "link").symlink_to("../../blobs/x")
    assert not stays_inside(folder, folder / "link")
