"""Several processes give what one gives, fail in one line, and go on after a kill; here on CPUs, over gloo."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bad_models import overflowing
from support.command_line import varied
from support.processes import Ended, ended, run_together, start
from support.written import checkpoint_tensors

from pyprune.cli.main import main
from pyprune.errors import InputError
from pyprune.job.record import read_plan
from pyprune.runtime import distributed

DAMPING = 0.05
METHODS = {
    "flap": ("--method", "flap"),
    "flap-reference": ("--method", "flap", "--mode", "reference"),
    "wanda-sp": ("--method", "wanda-sp"),
    "slimgpt": ("--method", "slimgpt", "--damping", DAMPING),
    "obs": ("--method", "obs", "--damping", DAMPING),
    "obs-bias": ("--method", "obs", "--damping", DAMPING, "--compensation", "bias"),
}


def pruning(model: Path, text: Path, output: Path, *more: object, patch: Callable[[], None] | None = None) -> Any:
    """`pyprune prune` of a small model on 7 windows of 32 tokens, for `run_together`."""
    arguments = ("prune", model, output, "--method", "flap", "--ratio", 0.3, "--calibration", text, "--samples", 7)
    arguments += ("--sequence-length", 32, "--device", "cpu", "--dtype", "float32", *more)
    return partial(command, varied(*arguments), patch)


def command(arguments: list[str], patch: Callable[[], None] | None) -> None:
    if patch is not None:
        patch()
    main(arguments)


def statuses(processes: list[Ended]) -> list[int | None]:
    return [process.status for process in processes]


def failure(processes: list[Ended]) -> str:
    """The one line of all processes that names what is wrong; all of them exit with status 2.

    Beside it there are only the progress bars of the first.
    """
    assert statuses(processes) == [2] * len(processes), processes
    (line,) = [line for p in processes for line in p.err.splitlines() if line.startswith("pyprune: ")]
    for process in processes[1:]:
        assert process.out + process.err in ("", line + "\n")
    assert "Traceback" not in processes[0].err
    return line


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], demo_model: Path) -> Path:
    return tiny_checkpoint(family="llama", layers=4, dtype="float32", tokenizer=demo_model)


@pytest.mark.parametrize(
    "method", [m if m in ("flap", "obs") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_two_processes_prune_as_one_does(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    """Sums over two blocks of windows (4 and 3) round otherwise than one over all, by some ε = 2⁻²⁴ of their size.

    Kept units are the same, and so are weights that are only sliced. A refit solves with H + λ mean(diag H) I, whose
    condition number is at most 1 + d / λ since no eigenvalue exceeds d mean(diag H), and carries ε to ε (1 + d / λ) of
    a matrix's norm. A bias is a product with mean inputs: ε times the root of the 224 tokens, of its norm.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = run_together(tmp_path / "logs-1", pruning(model, text, one, *METHODS[method]))
    assert alone.status == 0, alone.err
    both = run_together(tmp_path / "logs-2", *[pruning(model, text, two, *METHODS[method], "--json")] * 2)
    assert statuses(both) == [0, 0], both
    assert json.loads(both[0].out)["output"] == str(two)
    assert (both[1].out, both[1].err) == ("", "")

    plan, expected = read_plan(two), read_plan(one)
    assert plan["identity"]["processes"] == 2
    assert "processes" not in expected["identity"]
    for own, single in zip(plan["layers"], expected["layers"], strict=True):
        assert own["kv_groups"] == single["kv_groups"]
        assert own["intermediate_channels"] == single["intermediate_channels"]
    refits = method.startswith(("slimgpt", "obs"))
    tolerance = 2**-24 * (1 + 160 / DAMPING) if refits else 2**-24 * (7 * 32) ** 0.5
    tensors = checkpoint_tensors(two)
    for name, single in checkpoint_tensors(one).items():
        if refits or name.endswith("bias"):
            assert (tensors[name] - single).norm() <= tolerance * single.norm(), name
        else:
            assert torch.equal(tensors[name], single), name


@pytest.mark.slow
def test_three_processes_share_one_survey(model: Path, text: Path, tmp_path: Path) -> None:
    """7 windows over three (3, 2, 2); the cached calibration pass answers for three processes, not for one."""
    for name, processes, cached in (("a", 3, False), ("b", 3, True), ("c", 1, False)):
        run = run_together(tmp_path / "logs", *[pruning(model, text, tmp_path / name, "--json")] * processes)
        assert statuses(run) == [0] * processes, run
        assert json.loads(run[0].out)["calibration_cached"] is cached
    assert [layer["kv_groups"] for layer in read_plan(tmp_path / "a")["layers"]] == [
        layer["kv_groups"] for layer in read_plan(tmp_path / "c")["layers"]
    ]


def test_wrong_input_is_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    """The same mistake in all processes, in one of them only, before anything is written."""
    output = tmp_path / "out"
    for wrong, message in (
        (pruning(tmp_path / "none", text, output), "none"),
        (pruning(model, tmp_path / "none.txt", output), "cannot be read"),
        (pruning(model, text, output, "--samples", 1), "1 windows for 2 processes"),
        (pruning(model, text, output, "--method", "obs", "--allocation-samples", 1), "1 windows for 2 processes"),
        (pruning(model, text, output, "--device", "cuda:0"), "is one for 2 processes"),
        (pruning(model, text, output, "--ratio", "x"), "--help"),
    ):
        assert message in failure(run_together(tmp_path / "logs", wrong, wrong))
    for rank in (0, 1):
        run = [pruning(model, text, output)] * 2
        run[rank] = pruning(model, tmp_path / "none.txt", output)
        said = failure(run_together(tmp_path / "logs", *run))
        assert "process 1 was started with other options than process 0: calibration is " in said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flap", "obs"])
def test_bad_activations_are_one_line(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    bad = overflowing(model, tmp_path / "bad")
    run = [pruning(bad, text, tmp_path / "out", "--method", method)] * 2
    assert "layer 1 (mlp.down_proj): NaN or Inf" in failure(run_together(tmp_path / "logs", *run))
    assert not list(tmp_path.glob("out*"))
    run = [pruning(bad, text, tmp_path / "out", "--method", method, "--allow-nonfinite")] * 2
    assert statuses(run_together(tmp_path / "logs", *run)) == [0, 0]
    # One channel at every one of 7 x 32 tokens, of both processes.
    assert read_plan(tmp_path / "out")["nonfinite"] == {"layer 1 (mlp.down_proj)": 7 * 32}


def fail_in_a_layer() -> None:
    from pyprune.calibration.second_moments import HessianObserver

    finish = HessianObserver.result

    def fail(self: HessianObserver) -> Any:
        if self.where.startswith("layer 2 "):
            raise InputError(f"{self.where}: this process cannot go on")
        return finish(self)

    HessianObserver.result = fail  # type: ignore[method-assign]


@pytest.mark.slow
def test_failure_of_one_process_ends_the_others(model: Path, text: Path, tmp_path: Path) -> None:
    """In the middle, where the first one waits for sums: it keeps what it wrote, since the other one says why."""
    more = ("--method", "slimgpt")
    run = [
        pruning(model, text, tmp_path / "out", *more),
        pruning(model, text, tmp_path / "out", *more, patch=fail_in_a_layer),
    ]
    assert "layer 2 (self_attn.o_proj): this process cannot go on" in failure(run_together(tmp_path / "logs", *run))
    journal = tmp_path / "out.partial" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 4  # its head, the embeddings, two layers


def die_in_a_layer() -> None:
    from pyprune.checkpoint import CheckpointWriter

    write = CheckpointWriter.write

    def die(self: CheckpointWriter, part: int, *arguments: Any) -> None:
        if part == 3:
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, part, *arguments)

    CheckpointWriter.write = die  # type: ignore[method-assign]


def die_in_the_survey() -> None:
    from pyprune.passes.layer_cache import LayerLog

    write = LayerLog.write

    def die(self: LayerLog, layer: int, *arguments: Any) -> None:
        write(self, layer, *arguments)
        if layer == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    LayerLog.write = die  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "die"),
    [
        ("flap", die_in_the_survey),
        ("obs", die_in_a_layer),
    ],
)
def test_resume_after_a_kill(model: Path, text: Path, tmp_path: Path, method: str, die: Callable[[], None]) -> None:
    """Bitwise what two undisturbed processes write; one process does not go on where two stopped."""
    output, more = tmp_path / "out", ("--method", method)
    whole = run_together(
        tmp_path / "logs", *[pruning(model, text, tmp_path / "whole", *more, "--cache", tmp_path / "other")] * 2
    )
    assert statuses(whole) == [0, 0], whole
    run = [pruning(model, text, output, *more, patch=die), pruning(model, text, output, *more)]
    processes = start(tmp_path / "logs", *run)
    processes[0].join(60)
    processes[1].terminate()  # as torchrun does
    first, second = statuses(ended(tmp_path / "logs", processes))
    assert first == -signal.SIGKILL
    assert second in (-signal.SIGTERM, 1)  # 1: it found that the other one is gone before it was told
    assert not output.exists()

    (alone,) = run_together(tmp_path / "logs", pruning(model, text, output, *more, "--resume"))
    assert "processes (was 2, now None)" in failure([alone])
    for _ in range(2):  # the second finds the output finished
        resumed = run_together(tmp_path / "logs", *[pruning(model, text, output, *more, "--resume")] * 2)
        assert statuses(resumed) == [0, 0], resumed
        assert resumed[1].out == ""
        expected, found = checkpoint_tensors(tmp_path / "whole"), checkpoint_tensors(output)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_torchrun(model: Path, tmp_path: Path) -> None:
    """The command as it is typed, on text that the first process samples, with an evaluation."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["-m", "pyprune", "prune", str(model), str(tmp_path / "out"), "--method", "flap"]
    environment = os.environ | {"PYTHONPATH": str(Path(distributed.__file__).parent.parent)}
    sizes = ("--samples", "5", "--sequence-length", "32", "--device", "cpu", "--calibration", "self")
    evaluation = ("--evaluate", "self", "--evaluation-length", "16", "--max-windows", "2")
    command = [*torchrun, "--ratio", "0.3", *sizes, *evaluation, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["evaluation"]["pruned"]["windows"] == 2
    assert read_plan(tmp_path / "out")["device"].endswith("in each of 2 processes")
