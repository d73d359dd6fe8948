"""Whatever stdout and stderr are, a command does its work, prints what they take, and ends without a traceback."""

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.forked import run

from pyprune.cli.console import Console
from pyprune.runtime import streams

COMMANDS = {
    "makes": ("export", "MODEL", "OUTPUT", "--format", "stock", "--no-verify"),
    "makes, JSON": ("export", "MODEL", "OUTPUT", "--format", "stock", "--no-verify", "--json"),
    "prints": ("plan", "MODEL", "--method", "magnitude", "--ratio", "0.3"),
    "prints JSON": ("methods", "--json"),
    "help": ("prune", "--help"),
}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(layers=2)


def command(kind: str, model: Path, folder: Path) -> list[str]:
    return [{"MODEL": str(model), "OUTPUT": str(folder / "output")}.get(word, word) for word in COMMANDS[kind]]


@contextmanager
def descriptor(kind: str) -> Iterator[int]:
    """One that takes nothing."""
    if kind == "closed":
        yield -1
        return
    if kind == "full":
        number = os.open("/dev/full", os.O_WRONLY)
    else:  # a pipe whose reader is gone
        reader, number = os.pipe()
        os.close(reader)
    yield number
    os.close(number)


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("fault", ["closed", "full", "no reader"])
def test_stdout_takes_nothing(model: Path, tmp_path: Path, kind: str, fault: str) -> None:
    """A failure only where printing was the work, or a program waits for the document; silent if nobody reads."""
    with descriptor(fault) as number:
        ended = run(tmp_path, *command(kind, model, tmp_path), out=number)
    assert ended.status == (0 if kind == "makes" else 1), ended.err.read_text()
    says = [] if kind == "makes" or fault == "no reader" else ["pyprune: stdout: cannot be written: "]
    assert [line[:36] for line in ended.lines] == says
    if kind.startswith("makes"):
        assert (tmp_path / "output" / "config.json").is_file()


def test_a_pruning_is_work(model: Path, tmp_path: Path) -> None:
    with descriptor("full") as number:
        arguments = ("prune", model, tmp_path / "output", "--method", "magnitude", "--ratio", "0.3", "--no-verify")
        ended = run(tmp_path, *arguments, out=number)
    assert ended.status == 0
    assert ended.lines == []
    assert (tmp_path / "output" / "plan.json").is_file()


@pytest.mark.parametrize("kind", ["makes", "prints JSON"])
@pytest.mark.parametrize("fault", ["closed", "full", "no reader"])
def test_stderr_takes_nothing(model: Path, tmp_path: Path, kind: str, fault: str) -> None:
    """Bars and logs only accompany the work."""
    with descriptor(fault) as number:
        ended = run(tmp_path, *command(kind, model, tmp_path), err=number)
        refused = run(tmp_path, "plan", tmp_path / "nowhere", "--ratio", 0.3, err=number)
    assert ended.status == 0
    assert ended.out.read_text().strip()
    assert refused.status == 2
    assert refused.out.read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_encodings(model: Path, tmp_path: Path, encoding: str) -> None:
    """Characters that the encoding lacks are spelled otherwise."""
    ended = run(tmp_path, *command("makes", model, tmp_path), encoding=encoding)
    assert ended.status == 0, ended.err.read_text()
    arrow = "→" if encoding.startswith("utf") else "->"
    assert f" KB {arrow} " in ended.out.read_text(encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "a → \udcff ∮ é".encode("utf-8", "surrogateescape")),
        ("latin-1", b"a -> \xff ? \xe9"),
        ("cp1252", b"a -> \xff ? \xe9"),
        ("ascii", b"a -> \xff ? ?"),
    ],
)
def test_every_text_is_spelled(encoding: str, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes of names that are no text; what the streams were before they are again."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding)
    monkeypatch.setattr("sys.stdout", stream)
    with streams.mended():
        print("a → \udcff ∮ é", end="")
    assert raw.getvalue() == expected
    assert stream.errors == "strict"
    with pytest.raises(UnicodeEncodeError):
        stream.write("\udcff")


class Broken(io.StringIO):
    """Takes `left` writes, then none."""

    left = 2

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError
        return super().write(text)


def test_stderr_breaks_under_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a terminal, where a thread redraws them."""
    broken = Broken()
    monkeypatch.setattr(broken, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", broken)
    monkeypatch.setenv("TERM", "xterm")
    with streams.mended(), Console(False).progress() as progress:
        for done in range(5):
            progress(f"work {done}", done, 5)
            progress("other", done, 5)


def test_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    for forgiven in (False, True):
        monkeypatch.setattr("sys.stdout", Broken())
        with streams.mended() as out:
            print("a")
            assert not streams.is_lost()
            print("b")
            assert streams.is_lost()
            if forgiven:
                streams.forgive()
            print("c")
            assert isinstance(out.lost, BrokenPipeError) != forgiven
    assert not streams.is_lost()  # outside there is nothing to ask about


def test_a_benchmark_without_readers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune.cli.benchmark import line_printer

    monkeypatch.setattr("sys.stdout", Broken())
    with streams.mended():
        show = line_printer(False)
        show("first")
        with pytest.raises(SystemExit):
            show("second")


def test_descriptors_stay_reserved(tmp_path: Path) -> None:
    """A file that is opened after stdout was closed must not become stdout to a library that prints."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(1)
        streams.reserve_descriptors()
        with open(tmp_path / "shard", "w") as file:
            taken = file.fileno()
        try:
            os.write(1, b"noise")
            wrote = True
        except OSError:
            wrote = False
        os.write(writer, json.dumps([taken, wrote, os.get_inheritable(1)]).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    taken, wrote, inheritable = json.loads(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    assert taken > 2
    assert not wrote
    assert inheritable
