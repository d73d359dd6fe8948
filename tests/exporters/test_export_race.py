"""Two exports to one file: the first to finish has it, the other is told so; nothing of either is mixed or left."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.forked import start
from support.gguf_models import with_tokenizer

from pyprune.errors import InputError
from pyprune.exporters import exclusive
from pyprune.exporters.exclusive import exclusive_file

HOOK_POINTS = {"hard link": (), "exclusive rename": ("link",), "reservation": ("link", "renameat2")}


@pytest.fixture(params=HOOK_POINTS)
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that has hard links, one that has not, and one that has no exclusive rename either."""
    lacks = HOOK_POINTS[request.param]

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if "link" in lacks:
        monkeypatch.setattr(os, "link", refuse)
    if "renameat2" in lacks:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    return str(request.param)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(output: Path, text: str, meanwhile: Callable[[Path], object] = lambda partial: None) -> None:
    with exclusive_file(output) as partial:
        partial.write_text(text)
        meanwhile(partial)


def test_what_came_meanwhile_is_kept(file_system: str, tmp_path: Path) -> None:
    output = tmp_path / "a" / "model.gguf"

    def meanwhile(late: Path) -> None:
        def compare(early: Path) -> None:
            assert early != late
            assert early.name.startswith(".model.gguf.")
            assert early.name.endswith(".partial")

        make(output, "early", compare)

    with pytest.raises(InputError, match=r"model\.gguf: exists; name another output"):
        make(output, "late", meanwhile)
    assert output.read_text() == "early"
    assert names(output.parent) == ["model.gguf"]


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_whatever_came_is_kept(file_system: str, kind: str, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    come = {
        "file": lambda _: output.write_text("early"),
        "folder": lambda _: output.mkdir(),
        "dangling link": lambda _: output.symlink_to(tmp_path / "nowhere"),
    }[kind]
    with pytest.raises(InputError, match="exists; name another output"):
        make(output, "late", come)
    with pytest.raises(InputError, match="exists; name another output"):
        make(output, "later", lambda _: pytest.fail("it was not looked at"))
    assert names(tmp_path) == ["model.gguf"]
    assert not (tmp_path / "nowhere").exists()


def test_the_file_is_as_any_other(file_system: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    with exclusive_file(tmp_path / "model.gguf") as partial:
        partial.write_text("whole")
    assert (tmp_path / "model.gguf").read_text() == "whole"
    assert (tmp_path / "model.gguf").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert names(tmp_path) == ["model.gguf", "other"]


@pytest.mark.parametrize("error", [InputError("x"), OSError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_is_left(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), exclusive_file(tmp_path / "a" / "b" / "model.gguf"):
        raise error
    assert names(tmp_path) == []


def test_leftovers_of_the_dead_go(tmp_path: Path) -> None:
    """Not the files of processes that work, nor others that only look alike."""
    output, dead = tmp_path / "model.gguf", ".model.gguf.0123abcd.partial"
    others = ["model.gguf.partial", ".model.gguf.notes.partial", ".other.gguf.0123abcd.partial"]
    for name in (dead, *others):
        (tmp_path / name).write_text("")

    def look(first: Path) -> None:
        assert names(tmp_path) == sorted([*others, first.name])
        with pytest.raises(InputError, match="enough"):
            make(output, "second", fail)
        assert names(tmp_path) == sorted([*others, first.name])

    def fail(_: Path) -> None:
        raise InputError("enough")

    make(output, "first", look)
    assert names(tmp_path) == sorted([*others, "model.gguf"])


def test_many_at_once(file_system: str, tmp_path: Path) -> None:
    """Each in its own file; one wins, whole."""
    output, barrier = tmp_path / "model.gguf", threading.Barrier(16)
    outcomes: list[int | None] = []

    def try_it(number: int) -> None:
        try:
            make(output, str(number) * 10_000, lambda _: barrier.wait())
            outcomes.append(number)
        except InputError:
            outcomes.append(None)

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number in outcomes if number is not None]
    assert output.read_text() == str(winner) * 10_000
    assert names(tmp_path) == ["model.gguf"]
    assert len(outcomes) == 16


def test_exports_of_two_types(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command, twice; both have written everything when the first one puts it in its place."""
    pytest.importorskip("gguf")
    source = with_tokenizer(tiny_checkpoint(vocab_size=97, layers=2), tmp_path / "source")
    target = tmp_path / "target"
    (ready, report), (go_on, tell) = os.pipe(), os.pipe()
    place = exclusive._place

    def wait(partial: Path, output: Path) -> None:
        if output.suffix == ".gguf":  # and not the Modelfile, which comes after it
            os.write(report, b".")
            os.read(go_on, 1)
        place(partial, output)

    monkeypatch.setattr(exclusive, "_place", wait)

    def export(output: Path) -> list[Any]:
        outputs = {dtype: str(output).replace("DTYPE", dtype) for dtype in ("f32", "q8_0")}
        command = ("--format", "gguf", "--no-verify", "--dtype")
        both = [start(tmp_path, "export", source, path, *command, dtype) for dtype, path in outputs.items()]
        for _ in both:
            os.read(ready, 1)
        os.write(tell, b"..")
        for running in both:
            running.wait()
        return both

    assert [running.status for running in export(target / "DTYPE.gguf")] == [0, 0]
    both = export(target / "x.gguf")
    assert sorted(running.status for running in both) == [0, 2]
    winner = [running.status for running in both].index(0)
    assert (target / "x.gguf").read_bytes() == (target / ("f32.gguf", "q8_0.gguf")[winner]).read_bytes()
    assert both[winner].lines == []
    assert both[1 - winner].lines == [f"pyprune: {target / 'x.gguf'}: exists; name another output"]
    assert names(target) == sorted(f"{name}.{kind}" for name in ("f32", "q8_0", "x") for kind in ("Modelfile", "gguf"))
    for descriptor in (ready, report, go_on, tell):
        os.close(descriptor)
