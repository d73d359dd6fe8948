"""NaN and Inf weights: the tensor and the place are named, nothing is left; rows no text uses are a warning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bad_models import changed, infinite
from support.command_line import run
from support.proofs import prove_here
from torch import Tensor

from pyprune.checkpoint.finite import check_finite, nonfinite_rows
from pyprune.errors import InputError
from pyprune.job.record import read_plan

TEXTLESS = ("magnitude",)
METHODS = (*TEXTLESS, "wanda-sp", "flap", "slimgpt", "obs", "wanda", "sparsegpt", "dass", "disp", "policy")
NAMES = (
    "model.layers.2.input_layernorm.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], demo_model: Path) -> Path:
    return tiny_checkpoint(family="llama", dtype="float32", layers=3, tokenizer=demo_model, tie=False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A plain text about nothing in particular. " * 60)
    return path


def arguments(method: str, text: Path) -> tuple[object, ...]:
    if method in TEXTLESS:
        return ("--method", method, "--ratio", 0.3)
    given: tuple[object, ...] = ("--method", method, "--calibration", text, "--samples", 4, "--sequence-length", 16)
    if method in ("wanda", "sparsegpt", "dass"):
        return (*given, "--pattern", "2:4")
    return (*given, "--ratio", 0.3, *(("--steps", 2) if method in ("disp", "policy") else ()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_the_tensor_and_the_place_are_named(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, name: str
) -> None:
    bad = infinite(model, tmp_path / "bad", name, torch.nan)
    outcome = run(capsys, "prune", bad, tmp_path / "out", *arguments(method, text))
    assert outcome.status == 2
    line = outcome.err.strip().splitlines()[-1]
    layered = name.startswith("model.layers.")
    inside = name.split(".", 3)[3] if layered else name
    assert f"tensor {inside} has nan at" in line or f"tensor {name} has nan at" in line
    assert not layered or f"layer {name.split('.')[2]}" in line or name in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "obs"])
def test_rows_that_no_text_uses_are_a_warning(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    def fill(table: Tensor) -> None:
        table[-2000:] = torch.nan

    prove_here(monkeypatch)

    bad = changed(model, tmp_path / "bad", "model.embed_tokens.weight", fill)
    outcome = run(capsys, "prune", bad, tmp_path / "out", *arguments(method, text), "--verify")
    assert outcome.status == 0, outcome.err
    plan = read_plan(tmp_path / "out")
    assert plan["verification"]["verified"]
    assert any("NaN or Inf in rows of tokens that no text has" in warning for warning in plan["warnings"])


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_a_text_uses_are_refused(
    tiny_checkpoint: Any, demo_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    model = tiny_checkpoint(family="llama", dtype="float32", layers=3, tokenizer=demo_model, tie=tied)
    bad = infinite(model, tmp_path / "bad", "model.embed_tokens.weight")
    for row in (0, 1):
        changed(bad, tmp_path / f"bad{row}", "model.embed_tokens.weight", lambda table: table[:40].fill_(torch.inf))
        outcome = run(capsys, "prune", tmp_path / f"bad{row}", tmp_path / "out", *arguments("flap", text))
        assert outcome.status == 2
        assert "model.embed_tokens.weight" in outcome.err
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_that_overflow_are_no_fault(dtype: torch.dtype) -> None:
    large = torch.full((40, 30), torch.finfo(dtype).max, dtype=dtype)
    check_finite({"large": large}, "here")
    assert nonfinite_rows(large) == []
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = torch.zeros(40, 30, dtype=dtype)
        bad[17, 4] = bad[20, 1] = value
        with pytest.raises(InputError, match=r"here: tensor w has \S+ at \[17, 4\] and 1 more"):
            check_finite({"fine": large, "w": bad}, "here")
        assert nonfinite_rows(bad) == [17, 20]
