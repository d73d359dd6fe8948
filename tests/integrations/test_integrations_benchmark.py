"""benchmarks/integrations.py: small sizes on the CPU, and llm-compressor's perplexity where a Python has it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import integrations
import pytest
import torch
from test_integrations_patching import ROOT, python_with

SMALL = ["speed", "--device", "cpu", "--hidden", "24", "--intermediate", "40", "--samples", "5", "--tokens", "16"]


def small_speed(*more: str) -> dict[str, Any]:
    arguments = integrations.argument_parser().parse_args([*SMALL, "--repeat", "2", *more])
    report: dict[str, Any] = arguments.run(arguments)
    return report


def test_speed() -> None:
    report = small_speed()
    assert report["failures"] == []
    assert [row["candidate"] for row in report["rows"]] == list(integrations.CANDIDATES)
    assert all(row[f"{stage}_s"] > 0 for row in report["rows"] for stage in ("hessians", "factors", "total"))
    assert list(report["errors"]) == ["q_proj", "down_proj"]
    for errors in report["errors"].values():
        assert all(0 < error < 1e-5 for found in errors.values() for error in found.values())
    json.dumps(report)


def test_candidates_compute_the_same() -> None:
    """The Hessian of each of the seven linears is 2/N·Σ xᵀx of what it reads."""
    arguments = integrations.argument_parser().parse_args(SMALL)
    inputs = integrations.layer_inputs(arguments, torch.device("cpu"))
    for name, (accumulate, factorise) in integrations.CANDIDATES.items():
        hessians = accumulate(inputs, 11)
        assert sorted(hessians) == sorted(integrations.linears_of(inputs))
        for linear, reads in integrations.linears_of(inputs).items():
            x = [inputs[reads][sample % len(inputs[reads])].double() for sample in range(11)]
            exact = 2 / 11 * sum(rows.T @ rows for rows in x)
            assert integrations.relative_error(hessians[linear], exact) < 1e-6, (name, linear)
            damped = exact + integrations.DAMPING * exact.diagonal().mean() * torch.eye(len(exact))
            factor = factorise(hessians[linear].clone()).double()
            torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(len(exact)).double(), rtol=0, atol=1e-4)
        assert len(integrations.different(hessians)) == (4 if name == "ours, shared inputs" else 7)


def test_no_speed_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are not what they should be are said to be, and nothing is timed."""
    accumulate, factorise = integrations.CANDIDATES["ours"]

    def off(inputs: Any, count: int) -> Any:
        return {linear: 1.001 * hessian for linear, hessian in accumulate(inputs, count).items()}

    monkeypatch.setitem(integrations.CANDIDATES, "ours", (off, factorise))
    report = small_speed()
    assert report["rows"] == []
    assert report["failures"] == [f"{name}, ours: the hessian is 1.0e-03 off" for name in ("q_proj", "down_proj")]


@pytest.mark.slow  # and not shared: it may be skipped where the texts are, for want of llm-compressor
def test_quality(demo_model: Path, shared_dir: Path, tmp_path: Path) -> None:
    python = python_with("llmcompressor", "PYPRUNE_LLM_COMPRESSOR")
    output = tmp_path / "quality.json"
    options = [
        "--methods",
        "gptq, W4A16",
        "--samples",
        "8",
        "--sequence-length",
        "128",
        "--windows",
        "10",
        "--window-length",
        "256",
        "--propagated",
        "--reversed",
    ]
    data = shared_dir / "data"
    texts = ["--calibration", data / "wikitext2-valid.txt", "--text", data / "wikitext2-test.txt"]
    finished = subprocess.run(
        [python, ROOT / "benchmarks" / "integrations.py", "quality", demo_model, *texts, *options, "--output", output],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )
    assert output.exists(), finished.stderr
    report = json.loads(output.read_text())
    assert [row["propagated"] for row in report["rows"]] == [False, True]
    for row in report["rows"]:
        assert row["calls"] == {"hessian_updates": 6 * 7 * 8, "inverse_factors": 6 * 7}
        assert row["perplexity"]["theirs"] > report["dense"]
    assert finished.returncode == 0, finished.stderr
