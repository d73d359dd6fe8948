"""A pruning killed with SIGKILL at random moments is finished by --resume, bitwise equal to an undisturbed run."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyprune.errors import InputError
from pyprune.options import PruneOptions
from pyprune.pipeline import prune

LAYERS = 12
# A clean process that has the libraries loaded forks the runs: each starts at once, none inherits a thread.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pyprune.pipeline"])


def options(model: Path, text: Path, output: Path, method: str, **changes: Any) -> PruneOptions:
    calibration = None if method == "magnitude" else str(text)
    return PruneOptions(
        str(model), output, method, 0.4, calibration=calibration, samples=8, sequence_length=32, device="cpu",
        cache=output.parent / "cache", **changes,
    )  # fmt: skip


def start(run: PruneOptions) -> Any:
    process = SERVER.Process(target=prune, args=(run,))
    process.start()
    return process


def finish(run: PruneOptions) -> None:
    process = start(run)
    process.join()
    assert process.exitcode == 0


def weights(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("*.safetensors"), folder / "config.json", folder / "model.safetensors.index.json"]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture
def model_and_text(tiny_checkpoint: Callable[..., Path], tmp_path: Path, demo_model: Path) -> tuple[Path, Path]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"In the year {n} the harvest was {n % 7} times as good. " for n in range(400)))
    return tiny_checkpoint(family="llama", layers=LAYERS, dtype="bfloat16", tokenizer=demo_model), text


@pytest.mark.parametrize("method", ["flap", "wanda-sp", "obs"])
def test_ten_kills(model_and_text: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    model, text = model_and_text
    whole = tmp_path / "whole"
    finish(options(model, text, whole, method))
    expected, plan = weights(whole), json.loads((whole / "plan.json").read_text())
    moments = random.Random(method)
    interrupted = 0
    for trial in range(10):
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
        assert weights(output) == expected
        resumed = json.loads((output / "plan.json").read_text())
        for own, undisturbed in zip(resumed["layers"], plan["layers"], strict=True):
            assert own == undisturbed
        assert not journal.parent.exists()
    assert interrupted >= 5, "the kills came too late to prove anything"


def test_resume_of_a_finished_run_and_of_another(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = model_and_text
    run = options(model, text, tmp_path / "out", "magnitude", resume=True)
    first = prune(run)
    before = weights(tmp_path / "out")
    assert prune(run) == first
    assert weights(tmp_path / "out") == before
    with pytest.raises(InputError, match="finished already, with other settings"):
        prune(options(model, text, tmp_path / "out", "wanda-sp", resume=True))
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        prune(options(model, text, tmp_path / "out", "magnitude"))


def test_a_failed_layer_leaves_its_predecessors_for_the_resume(
    model_and_text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space left in the middle: one line, the finished layers stay, --resume writes only the rest."""
    from pyprune.checkpoint import CheckpointWriter

    model, text = model_and_text
    prune(options(model, text, tmp_path / "whole", "flap"))
    write = CheckpointWriter.write

    def full(self: CheckpointWriter, shard: int, *arguments: Any, **named: Any) -> None:
        if shard == 5:
            raise OSError(28, os.strerror(28))
        write(self, shard, *arguments, **named)

    monkeypatch.setattr(CheckpointWriter, "write", full)
    with pytest.raises(
        InputError, match=r"out\.partial: no space left on the device; free some and repeat with --resume"
    ):
        prune(options(model, text, tmp_path / "out", "flap"))
    written: list[int] = []
    monkeypatch.setattr(
        CheckpointWriter,
        "write",
        lambda self, shard, *a, **k: (written.append(shard), write(self, shard, *a, **k)),
    )
    prune(options(model, text, tmp_path / "out", "flap", resume=True))
    assert written == list(range(5, LAYERS + 2))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_shards_that_keep_other_units_are_written_again(
    model_and_text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The survey of the killed run is gone and the new one differs: nothing of the old choice may remain."""
    from pyprune.checkpoint import CheckpointReader, CheckpointWriter
    from pyprune.passes.survey import load_survey, save_survey

    model, text = model_and_text
    write = CheckpointWriter.write

    def killed(self: CheckpointWriter, shard: int, *arguments: Any, **named: Any) -> None:
        if shard == 6:
            raise KeyboardInterrupt
        write(self, shard, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(options(model, text, tmp_path / "out", "flap"))
    (file,) = (tmp_path / "cache").glob("survey-*")
    survey = load_survey(file, LAYERS)
    for statistics in survey[1].values():
        assert statistics.m2 is not None
        statistics.m2 = statistics.m2.flip(0).contiguous()
    save_survey(file, survey, {})
    plan = prune(options(model, text, tmp_path / "out", "flap", resume=True))
    shapes = CheckpointReader(tmp_path / "out").shapes
    for shape, layer in zip(shapes, plan["layers"], strict=True):
        assert shape.kv_groups == len(layer["kv_groups"])
        assert shape.intermediate_channels == len(layer["intermediate_channels"])
