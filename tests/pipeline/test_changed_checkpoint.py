"""A checkpoint that changed is found, wherever the change lies: nothing of the old one goes into a result."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import run
from support.written import checkpoint_tensors

from pyprune.checkpoint import CheckpointReader, CheckpointWriter
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], demo_model: Path, tmp_path: Path) -> Path:
    """Of matrices that are larger than what the fingerprint samples of them."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "heads": 8, "kv_heads": 4, "layers": 3}
    return shutil.copytree(tiny_checkpoint(tokenizer=demo_model, **sizes), tmp_path / "model")


@pytest.fixture
def arguments(model: Path, tmp_path: Path, shared_text: Path) -> Callable[..., tuple[object, ...]]:
    small = ("--ratio", 0.3, "--calibration", shared_text, "--samples", 4, "--sequence-length", 32)
    return lambda output, method: ("prune", model, tmp_path / output, "--method", method, *small, "--json")


@pytest.fixture
def shared_text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"In the year {n} the harvest was brought in on day {n * 7 % 365}. " for n in range(300)))
    return path


def edit_unsampled(model: Path, keep_time: bool = False) -> None:
    """Zeros in a matrix where the fingerprint does not look, in place."""
    reader = CheckpointReader(model)
    before, stored = reader.fingerprint(), reader.tensors[GATE]
    state = stored.file.stat()
    with stored.file.open("r+b") as f:
        f.seek(stored.offset + stored.bytes // 16 - 9000)
        f.write(bytes(4000))
    if keep_time:
        os.utime(stored.file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert CheckpointReader(model).fingerprint() == before


@pytest.mark.parametrize("method", ["flap", pytest.param("obs", marks=pytest.mark.slow)])
def test_statistics_of_other_weights_are_not_used(
    model: Path, arguments: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert not run(capsys, *arguments("first", method)).json["calibration_cached"]
    assert run(capsys, *arguments("second", method)).json["calibration_cached"]
    edit_unsampled(model)
    outcome = run(capsys, *arguments("third", method))
    assert not outcome.json["calibration_cached"]
    assert any("other weights" in warning for warning in outcome.json["warnings"])
    fresh = run(capsys, *arguments("fourth", method), "--cache", tmp_path / "fresh")
    assert not fresh.json["calibration_cached"]
    third, fourth = checkpoint_tensors(tmp_path / "third"), checkpoint_tensors(tmp_path / "fourth")
    assert all(torch.equal(third[name], tensor) for name, tensor in fourth.items())
    outcome = run(capsys, *arguments("first", method), "--resume")
    assert outcome.status == 2
    assert "the checkpoint has changed since" in outcome.err


def test_a_copy_of_the_checkpoint_is_the_same_one(
    model: Path, arguments: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another time and inode, the same bytes."""
    assert not run(capsys, *arguments("first", "flap")).json["calibration_cached"]
    shutil.copyfile(model / "model.safetensors", model / "copy")
    os.replace(model / "copy", model / "model.safetensors")
    assert run(capsys, *arguments("second", "flap")).json["calibration_cached"]
    assert run(capsys, *arguments("first", "flap"), "--resume").status == 0


@pytest.mark.parametrize("method", ["flap", pytest.param("obs", marks=pytest.mark.slow)])
def test_a_change_that_hides_from_size_and_time_is_found_as_it_is_read(
    model: Path, arguments: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert run(capsys, *arguments("first", method)).status == 0
    edit_unsampled(model, keep_time=True)
    outcome = run(capsys, *arguments("second", method))
    assert outcome.status == 2
    assert f"the checkpoint has changed: tensor {GATE}" in outcome.err
    assert not list(tmp_path.glob("second*"))


def options(model: Path, text: Path, output: Path, **changes: Any) -> PruneConfig:
    named = {"samples": 4, "sequence_length": 32, "device": "cpu", "cache": output.parent / "cache"} | changes
    return PruneConfig(str(model), output, "obs", 0.3, {}, str(text), **named)


def kill_at(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = CheckpointWriter.write

    def killed(self: CheckpointWriter, number: int, *arguments: Any, **named: Any) -> None:
        if number == part:
            self.flush()
            raise KeyboardInterrupt
        write(self, number, *arguments, **named)

    monkeypatch.setattr(CheckpointWriter, "write", killed)


@pytest.fixture
def unfinished(model: Path, shared_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PruneConfig:
    """A run of one thread that was killed in the middle; the options that resume it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            prune(options(model, shared_text, tmp_path / "out"))
    torch.set_num_threads(threads)
    return options(model, shared_text, tmp_path / "out", resume=True)


def test_a_resumed_run_refuses_another_checkpoint(unfinished: PruneConfig, model: Path) -> None:
    from pyprune.errors import InputError

    edit_unsampled(model)
    with pytest.raises(InputError, match="the checkpoint has changed since"):
        prune(unfinished)


@pytest.mark.slow
def test_a_resume_takes_the_threads_that_the_run_began_with(
    unfinished: PruneConfig, model: Path, shared_text: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        prune(options(model, shared_text, tmp_path / "whole"))
        torch.set_num_threads(2)
        prune(unfinished)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    expected, found = checkpoint_tensors(tmp_path / "whole"), checkpoint_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["transformers", "pyprune", "processor"])
def test_what_cannot_be_had_again_is_said(
    unfinished: PruneConfig, model: Path, shared_text: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyprune.errors import InputError
    from pyprune.job import identity

    environment = identity.environment
    monkeypatch.setattr(identity, "environment", lambda device: environment(device) | {name: "another"})
    with pytest.raises(InputError, match=rf"cannot be finished to the same bits: {name} \(was .*--allow-other-bits"):
        prune(unfinished)
    record = prune(options(model, shared_text, tmp_path / "out", resume=True, allow_other_bits=True))
    assert any("not to the bits of an undisturbed run" in warning for warning in record.warnings)


@pytest.mark.parametrize("damage", ["cut", "gone", "rotted"])
def test_a_damaged_output_is_not_finished(
    arguments: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    assert run(capsys, *arguments("out", "flap")).status == 0
    assert run(capsys, *arguments("out", "flap"), "--resume").status == 0
    file = tmp_path / "out" / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-100] + (bytes(100) if damage == "rotted" else b""))
    outcome = run(capsys, *arguments("out", "flap"), "--resume")
    assert outcome.status == 2
    assert "finished, but damaged since" in outcome.err
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["method"] == "flap"
