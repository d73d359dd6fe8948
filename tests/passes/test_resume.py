"""A pruning killed with SIGKILL at random moments is finished by --resume, bitwise equal to an undisturbed run."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.command_line import run as run_command
from support.figures import leave_blank
from support.texts import harvest
from support.written import checkpoint_bytes

from pyprune.checkpoint import CheckpointReader, CheckpointWriter
from pyprune.cli.main import main
from pyprune.errors import InputError
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune

LAYERS = 12
SHARD_SIZE = 700_000  # four files of 2 MB, and layers that lie in two
# A clean process that has the libraries loaded forks the runs: each starts at once, none inherits a thread.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pyprune.api", "pyprune.cli.prune", "matplotlib.pyplot", "transformers.generation"])


# Of each method; `make torture` has ten, and 200 signals at other moments.
TRIALS = range(10 if os.environ.get("PYPRUNE_HOSTILE") == "all" else 2)


def kills(fast: str, *slow: str) -> pytest.MarkDecorator:
    """Parametrize `method`: one is a must for every change."""
    return pytest.mark.parametrize("method", [fast, *(pytest.param(method, marks=pytest.mark.slow) for method in slow)])


def options(model: Path, text: Path, output: Path, method: str, **changes: Any) -> PruneConfig:
    calibration = None if method == "magnitude" else str(text)
    return PruneConfig(
        str(model), output, method, 0.4, calibration=calibration, samples=8, sequence_length=32, device="cpu",
        cache=output.parent / "cache", shard_size=SHARD_SIZE, **changes,
    )  # fmt: skip


def without_figures(what: Callable[[Any], object], argument: Any) -> None:
    leave_blank()
    what(argument)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def start(run: PruneConfig) -> Any:
    process = SERVER.Process(target=without_figures, args=(prune, run))
    process.start()
    return process


def finish(run: PruneConfig) -> None:
    process = start(run)
    process.join()
    assert process.exitcode == 0


@pytest.fixture
def model_and_text(tiny_checkpoint: Callable[..., Path], tmp_path: Path, demo_model: Path) -> tuple[Path, Path]:
    text = tmp_path / "text.txt"
    text.write_text(harvest())
    return tiny_checkpoint(family="llama", layers=LAYERS, dtype="bfloat16", tokenizer=demo_model), text


@kills("obs", "flap", "wanda-sp")
def test_kills(model_and_text: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    model, text = model_and_text
    whole = tmp_path / "whole"
    finish(options(model, text, whole, method))
    expected, plan = checkpoint_bytes(whole), json.loads((whole / "plan.json").read_text())
    moments = random.Random(method)
    interrupted = 0
    for trial in TRIALS:
        output = tmp_path / f"killed-{trial}"
        journal = tmp_path / f"killed-{trial}.partial" / "journal.jsonl"
        process = start(options(model, text, output, method))
        lines = moments.randint(1, LAYERS + 1)  # of the journal: its head, the embeddings, and then the layers
        while process.is_alive() and (not journal.exists() or journal.read_bytes().count(b"\n") < lines):
            time.sleep(0.0005)
        time.sleep(moments.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        interrupted += process.exitcode == -signal.SIGKILL and not output.exists()
        finish(options(model, text, output, method, resume=True))
        assert checkpoint_bytes(output) == expected
        resumed = json.loads((output / "plan.json").read_text())
        for own, undisturbed in zip(resumed["layers"], plan["layers"], strict=True):
            assert own == undisturbed
        assert not journal.parent.exists()
    assert interrupted >= len(TRIALS) // 2, "the kills came too late to prove anything"


@kills("flap", "obs")
def test_kills_of_the_command(demo_model: Path, tmp_path: Path, method: str) -> None:
    """`pyprune prune` killed at any moment of its time, resumed, killed again, and resumed to the end."""
    text = tmp_path / "text.txt"
    text.write_text(harvest())

    def pruning(output: Path, *more: str) -> Any:
        sizes = ("--samples", "8", "--sequence-length", "32", "--device", "cpu", "--cache", f"{output}.cache")
        arguments = [str(demo_model), str(output), "--method", method, "--ratio", "0.3", "--calibration", str(text)]
        process = SERVER.Process(target=without_figures, args=(main, ["prune", *arguments, *sizes, *more]))
        process.start()
        return process

    for output in (tmp_path / "first", tmp_path / "whole"):  # the first one has the server load its libraries too
        start = time.perf_counter()
        undisturbed = pruning(output)
        undisturbed.join()
        duration = time.perf_counter() - start
        assert undisturbed.exitcode == 0
    expected = checkpoint_bytes(tmp_path / "whole")
    assert checkpoint_bytes(tmp_path / "first") == expected
    moments = random.Random(method)
    killed = 0
    for trial in TRIALS:
        output = tmp_path / f"killed-{trial}"
        for share, more in ((1.0, ()), (0.5, ("--resume",))):  # something is done already the second time
            process = pruning(output, *more)
            process.join(moments.random() * share * duration)
            process.kill()  # if it is not done already
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        last = pruning(output, "--resume")
        last.join()
        assert last.exitcode == 0
        assert checkpoint_bytes(output) == expected
        assert not (tmp_path / f"killed-{trial}.partial").exists()
    assert killed >= len(TRIALS), "the kills came too late to prove anything"  # of two a trial


@pytest.mark.parametrize("method", ["flap", "wanda-sp", "obs"])
def test_a_file_that_cannot_be_read_in_the_middle(
    model_and_text: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    """One line with the file, the tensor and what to do; the layers before it stay, --resume does the rest."""
    model, text = model_and_text
    prune(options(model, text, tmp_path / "whole", method))  # and so the calibration pass is there
    place = CheckpointReader(model).layer_tensors(7)["mlp.up_proj.weight"]
    preadv = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= place.offset < offset + buffers[0].nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    arguments = (
        *("prune", model, tmp_path / "out", "--method", method, "--ratio", 0.4, "--calibration", text, "--samples", 8),
        *("--sequence-length", 32, "--device", "cpu", "--cache", tmp_path / "cache", "--shard-size", SHARD_SIZE),
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        outcome = run_command(capsys, *arguments)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == (
        f"pyprune: {place.file}: tensor model.layers.7.mlp.up_proj.weight: {os.strerror(errno.EIO)}; "
        f"{tmp_path / 'out.partial'} keeps the finished layers: repeat with --resume"
    )
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["part"] for line in lines[1:]] == list(range(8))  # the embeddings and seven layers
    assert run_command(capsys, *arguments, "--resume").status == 0
    assert checkpoint_bytes(tmp_path / "out") == checkpoint_bytes(tmp_path / "whole")


def test_a_disk_that_fills_up_in_the_middle(
    model_and_text: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real one, of 1.3 MB where 3.4 MB are needed: what others write meanwhile cannot be known beforehand."""
    model, text = model_and_text
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        prune(options(model, text, tmp_path / "whole", "flap"))
        arguments = (
            *("prune", model, disk / "out", "--method", "flap", "--ratio", 0.4, "--calibration", text, "--samples", 8),
            *("--sequence-length", 32, "--device", "cpu", "--cache", tmp_path / "cache", "--shard-size", SHARD_SIZE),
        )
        monkeypatch.setattr("pyprune.pipeline.run.check_disk_space", lambda *_: None)
        for more in ((), ("--resume",)):  # nor is anything lost where none was freed
            outcome = run_command(capsys, *arguments, *more)
            assert outcome.status == 2
            assert outcome.err.splitlines()[-1] == (
                f"pyprune: {disk / 'out.partial'}: no space left on the device; free some and repeat with --resume"
            )
            lines = (disk / "out.partial" / "journal.jsonl").read_text().splitlines()
            parts = [json.loads(line)["part"] for line in lines[1:]]
            assert parts == list(range(len(parts)))
            assert 2 < len(parts) < LAYERS
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert run_command(capsys, *arguments, "--resume").status == 0
        assert checkpoint_bytes(disk / "out") == checkpoint_bytes(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_resume_of_a_finished_run_and_of_another(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = model_and_text
    run = options(model, text, tmp_path / "out", "magnitude", resume=True)
    first = prune(run)
    before = checkpoint_bytes(tmp_path / "out")
    assert prune(run) == first
    assert checkpoint_bytes(tmp_path / "out") == before
    with pytest.raises(InputError, match="finished already, with other settings"):
        prune(options(model, text, tmp_path / "out", "wanda-sp", resume=True))
    with pytest.raises(InputError, match=rf"other settings: shard_size \(was {SHARD_SIZE}, now 1000000\)"):
        prune(dataclasses.replace(run, shard_size=10**6))
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        prune(options(model, text, tmp_path / "out", "magnitude"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, os.strerror(28)),
            r"out\.partial: no space left on the device; free some and repeat with --resume",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. GPU 0 has"),
            r"cpu: out of memory: CUDA out of memory; .*out\.partial keeps .* repeat with --resume",
        ),
        (
            OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/some/file"),
            r"/some/file: too many open files.*: raise the limit; .*out\.partial keeps .* repeat with --resume",
        ),
        (
            caused(
                InputError("/some/file: cannot be read"), OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/some/file")
            ),
            r"/some/file: too many open files.*: raise the limit; .*out\.partial keeps .* repeat with --resume",
        ),
    ],
    ids=["disk", "device", "open files", "open files, as an InputError"],
)
def test_a_failed_layer_leaves_its_predecessors_for_the_resume(
    model_and_text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """A limit is met in the middle: one line, the finished layers stay, --resume writes only the rest."""
    model, text = model_and_text
    prune(options(model, text, tmp_path / "whole", "flap"))
    write = CheckpointWriter.write

    def full(self: CheckpointWriter, part: int, *arguments: Any, **named: Any) -> None:
        if part == 5:
            raise error
        write(self, part, *arguments, **named)

    monkeypatch.setattr(CheckpointWriter, "write", full)
    with pytest.raises(InputError, match=message):
        prune(options(model, text, tmp_path / "out", "flap"))
    written: list[int] = []
    monkeypatch.setattr(
        CheckpointWriter,
        "write",
        lambda self, part, *a, **k: (written.append(part), write(self, part, *a, **k)),
    )
    prune(options(model, text, tmp_path / "out", "flap", resume=True))
    assert written == list(range(5, LAYERS + 2))
    assert checkpoint_bytes(tmp_path / "out") == checkpoint_bytes(tmp_path / "whole")


def test_layers_that_keep_other_units_are_written_again(
    model_and_text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration pass of the killed run is gone and the new one differs: nothing of the old choice may remain."""
    from pyprune.checkpoint import load_cached
    from pyprune.passes.calibrate import save_statistics, statistics_of

    model, text = model_and_text
    write = CheckpointWriter.write

    def killed(self: CheckpointWriter, part: int, *arguments: Any, **named: Any) -> None:
        if part == 6:
            raise KeyboardInterrupt
        write(self, part, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(options(model, text, tmp_path / "out", "flap"))
    (file,) = (tmp_path / "cache").glob("calibration-*")
    with safe_open(file, framework="pt") as f:
        identity = json.loads(f.metadata()["identity"])
    tensors, metadata = load_cached(file, "calibration", identity)
    survey = statistics_of(file, tensors, metadata, CheckpointReader(model).shapes)
    for statistics in survey[1].values():
        assert statistics.m2 is not None
        statistics.m2 = statistics.m2.flip(0).contiguous()
    save_statistics(file, survey, identity, {"source": metadata["source"]})
    plan = prune(options(model, text, tmp_path / "out", "flap", resume=True)).to_json()
    shapes = CheckpointReader(tmp_path / "out").shapes
    for shape, layer in zip(shapes, plan["layers"], strict=True):
        assert shape.kv_groups == len(layer["kv_groups"])
        assert shape.intermediate_channels == len(layer["intermediate_channels"])
