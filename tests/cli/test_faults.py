"""Every error that reaches the command line is one line; the status says whose fault it is."""

import errno
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from support.command_line import run as run_here
from support.forked import run
from support.gguf_models import with_tokenizer

from pyprune.cli import program
from pyprune.errors import InputError, VerificationError
from pyprune.runtime import faults


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(vocab_size=97, layers=2)


def few_files() -> None:
    """Room for one more than are open."""
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, free + 1))


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("wrong"), 2, "wrong"),
        (VerificationError("ours"), 1, "ours"),
        (MemoryError(), 2, "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested deeper"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 2, "CUDA out of memory"),
        (OSError(errno.EFBIG, "File too large", "a"), 2, "a: larger than a file may be"),
        (OSError(errno.EMFILE, "Too many open files", "a"), 2, "a: too many open files (ulimit -n is "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 2, "a: no space left on the device; free some"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), 2, "no space left"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2, "a: File name too long"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", b"a\xff"), 2, "Too many levels of symbolic links"),
        (OSError(errno.EACCES, "Permission denied", "a"), 2, "a: Permission denied"),
        (OSError(errno.EIO, "Input/output error", "a"), 1, "a: Input/output error"),
        (OSError("1 requested and 0 written"), 1, "1 requested and 0 written"),
        (SafetensorError("Error while deserializing header: InvalidHeaderLength"), 2, "damaged: Error while"),
        (SafetensorError("Error while serializing: I/O error: No space left on device"), 2, "no space left"),
        (RuntimeError("unable to mmap 4096 bytes from file </x>: Cannot allocate memory (12)"), 2, "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), 2, "out of m"),
        (RuntimeError("can't start new thread"), 2, "no further thread or process"),
        (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"), 2, r"a\\xff"),
        (ValueError("embedded null byte"), 2, "null character"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_is_explained(error: Exception, status: int, words: str) -> None:
    found = faults.explain(error)
    assert found is not None
    line, says = found
    assert says == status
    assert words in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("a shape is wrong"), ValueError("odd"), KeyError("k"), AssertionError()]
)
def test_an_error_of_ours_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def broken() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        program.run(broken, [])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1] == (
        f"pyprune: an error of pyprune itself ({type(error).__name__}): please report it with the lines above"
    )


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50), lambda: bytearray(1 << 60)]
)
def test_memory(allocate: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    found = faults.explain(caught.value)
    assert found is not None
    assert found[0].startswith("out of memory") or ": out of memory" in found[0]
    assert found[1] == 2


@pytest.mark.parametrize(
    ("limit", "words"),
    [(small_files, r"[Ff]ile too large|larger than a file may be"), (few_files, "oo many open files")],
)
@pytest.mark.parametrize(
    "command",
    [
        ("prune", "--method", "magnitude", "--ratio", "0.3"),
        ("export", "--format", "stock"),
        ("export", "--format", "gguf"),
    ],
    ids=["prune", "export", "gguf"],
)
def test_limits_of_the_machine(
    model: Path, tmp_path: Path, command: tuple[str, ...], limit: Callable[[], None], words: str
) -> None:
    if "gguf" in command:
        pytest.importorskip("gguf")
        model = with_tokenizer(model, tmp_path / "model")
    ended = run(tmp_path, command[0], model, tmp_path / "out.gguf", *command[1:], "--no-verify", first=limit)
    assert ended.status == 2, ended.err.read_text()
    (line,) = ended.lines
    assert re.search(words, line)


def unusable(folder: Path) -> dict[str, str]:
    loop = folder / "loop.gguf"
    loop.symlink_to(loop)
    return {
        "too long": str(folder / ("x" * 300 + ".gguf")),
        "a path too long": "/".join(["x" * 200] * 30) + ".gguf",
        "a loop": str(loop),
        "below a loop": str(loop / "x.gguf"),
        "no text": os.fsdecode(b"a\xff.gguf"),
        "a null character": "a\0b.gguf",
    }


@pytest.mark.parametrize(
    "what", ["too long", "a path too long", "a loop", "below a loop", "no text", "a null character"]
)
def test_unusable_paths(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As any path that a command takes."""
    path = unusable(tmp_path)[what]
    text = tmp_path / "text.txt"
    text.write_text("words " * 2000)
    given = {"MODEL": model, "OUTPUT": tmp_path / "out", "--cache": tmp_path / "cache", "--calibration": text}
    before = sorted(tmp_path.iterdir())
    for name in given:
        paths = given | {name: path}
        options = [word for option in ("--cache", "--calibration") for word in (option, paths[option])]
        sizes = ("--ratio", 0.3, "--samples", 2, "--sequence-length", 16, "--no-verify")
        ended = run_here(capsys, "prune", paths["MODEL"], paths["OUTPUT"], *options, *sizes)
        assert (name, ended.status) == (name, 2), ended.err
        assert "Traceback" not in ended.err
        assert len([line for line in ended.err.splitlines() if line.startswith("pyprune: ")]) == 1
        assert sorted(tmp_path.iterdir()) == before
    assert run_here(capsys, "plan", path, "--ratio", 0.3).status == 2
    assert run_here(capsys, "evaluate", path, "--text", text).status == 2
    assert run_here(capsys, "evaluate", model, "--text", path).status == 2
    assert run_here(capsys, "export", path, tmp_path / "out", "--format", "padded").status == 2
    for layout in ("padded", "gguf"):
        assert run_here(capsys, "export", model, path, "--format", layout).status == 2


def command_named(cli: click.Group, name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def test_an_option_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Of every command: click would take the last value without a word."""
    from pyprune.cli.main import cli

    seen = 0
    for name in cli.list_commands(click.Context(cli)):
        for option in command_named(cli, name).params:
            if not isinstance(option, click.Option) or option.is_flag or option.multiple:
                continue
            seen += 1
            value = option.type.choices[0] if isinstance(option.type, click.Choice) else "1"
            with pytest.raises(click.UsageError, match=f"{option.opts[0]} is given 3 times; it takes one value"):
                cli.main([name, "x", *[option.opts[0], str(value)] * 3], standalone_mode=False)
    assert seen > 40
    rows = [option for option in command_named(cli, "benchmark").params if getattr(option, "multiple", False)]
    assert rows, "an option that may be repeated stays one"
