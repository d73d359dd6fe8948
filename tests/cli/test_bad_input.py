"""Whatever the user gets wrong: one line on stderr that says what and where, status 2, nothing written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bad_models import infinite, overflowing
from support.command_line import run


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def check(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = run(capsys, *arguments)
        assert outcome.status == 2
        assert outcome.out == ""
        lines = [line for line in outcome.err.splitlines() if line.startswith("pyprune: ")]
        assert len(lines) == 1
        assert outcome.err.rstrip().endswith(lines[0])
        assert "Traceback" not in outcome.err
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return lines[0]

    return check


SMALL = ("--samples", 4, "--sequence-length", 16)


@pytest.mark.parametrize("ratio", ["0", "1", "-0.2", "1.7", "nan", "most"])
def test_ratio(refused: Callable[..., str], model: Path, text: Path, tmp_path: Path, ratio: str) -> None:
    line = refused("prune", model, tmp_path / "out", "--calibration", text, "--ratio", ratio)
    assert ("not a valid float" if ratio == "most" else "outside (0, 1)") in line


def test_impossible_ratio(refused: Callable[..., str], model: Path, text: Path, tmp_path: Path) -> None:
    assert "at most 0." in refused("prune", model, tmp_path / "out", "--calibration", text, "--ratio", 0.99)


@pytest.mark.parametrize(("size", "reason"), [("0", "is no size"), ("-1GB", "is no size"), ("0.1", "at least 1")])
def test_shard_size(refused: Callable[..., str], model: Path, tmp_path: Path, size: str, reason: str) -> None:
    arguments = ("--method", "magnitude", "--ratio", 0.3, f"--shard-size={size}")
    assert reason in refused("prune", model, tmp_path / "out", *arguments)


def test_model(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    def line(folder: Path) -> str:
        return refused("prune", folder, tmp_path / "out", "--method", "magnitude", "--ratio", 0.3)

    assert "no such folder" in line(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert "unknown architecture 'mamba'" in line(broken)
    assert "the nearest is llama; `pyprune families` lists them, and docs/families.md says" in line(broken)
    (broken / "config.json").write_text(json.dumps(config))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors: truncated: tensor lm_head.weight ends at" in line(broken)
    file.unlink()
    assert "neither model.safetensors nor" in line(broken)


def test_text(refused: Callable[..., str], model: Path, text: Path, tmp_path: Path) -> None:
    def line(source: object, *sizes: object) -> str:
        return refused("prune", model, tmp_path / "out", "--ratio", 0.3, "--calibration", source, *sizes)

    assert "method obs looks at activations: give --calibration" in refused(
        "prune", model, tmp_path / "out", "--ratio", 0.3
    )
    assert "missing.txt" in line(tmp_path / "missing.txt")
    assert "the text has" in line(text, "--samples", 4, "--sequence-length", 2000)
    assert "exceeds the model's max_position_embeddings" in line(text, "--sequence-length", 100_000)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n{"no": 1}\n')
    assert "bad.jsonl, line 2" in line(bad)
    assert "0 is not in the range x>=1" in line(text, "--samples", 0)


def test_no_tokenizer(refused: Callable[..., str], tiny_checkpoint: Any, text: Path, tmp_path: Path) -> None:
    bare = tiny_checkpoint(family="llama", dtype="float32")
    assert "no tokenizer can be loaded" in refused(
        "prune", bare, tmp_path / "out", "--ratio", 0.3, "--calibration", text
    )


@pytest.mark.parametrize("method", ["flap", "wanda-sp", "slimgpt", "obs"])
def test_infinite_activations_name_the_layer(
    refused: Callable[..., str], model: Path, text: Path, tmp_path: Path, method: str
) -> None:
    bad = overflowing(model, tmp_path / "bad")
    line = refused("prune", bad, tmp_path / "out", "--method", method, "--ratio", 0.3, "--calibration", text, *SMALL)
    assert "layer 1 (mlp.down_proj): NaN or Inf activations in 1 of 160 input channels" in line


def test_output_folder_not_empty(refused: Callable[..., str], model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    line = refused("prune", model, tmp_path / "out", "--calibration", text, "--ratio", 0.3)
    assert "exists and is not an empty folder" in line


def test_no_space(refused: Callable[..., str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    line = refused("prune", model, tmp_path / "out", "--method", "magnitude", "--ratio", 0.3)
    assert "MB free, the output needs" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lottery"), "'lottery' is not one of magnitude, wanda-sp, flap"),
        (("--method", "magnitude", "--metric", "IFV"), "method magnitude has no option --metric"),
        (("--device", "tpu"), "tpu"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--dtype", "float23"), "'float23' is not one of auto, float32, bfloat16, float16; did you mean float32?"),
        (("--structure", "AL-M"), "'AL-M' is not one of UL-UM, UL-MM, AL-MM, AL-AM; did you mean AL-MM?"),
        (("--metric", "IFV"), "method obs has no option --metric, which flap has; its options: --allocation"),
        (("--sampels", "3"), "No such option '--sampels'. (Did you mean one of: '--samples'"),
        (("--samples", "many"), "not a valid integer"),
    ],
)
def test_options(
    refused: Callable[..., str],
    model: Path,
    text: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    command = ("prune", model, tmp_path / "out", "--ratio", 0.3, "--calibration", text, *arguments)
    assert message in refused(*command)


def test_unknown_backend(
    refused: Callable[..., str], model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flap = ("--method", "flap", "--ratio", 0.3, "--calibration", text, *SMALL, "--device", "cpu")
    command = ("prune", model, tmp_path / "out", *flap)
    monkeypatch.setenv("PYPRUNE_BACKEND", "rocm")
    assert "PYPRUNE_BACKEND=rocm is not a backend; choose cuda, triton, cpu, reference" in refused(*command)
    monkeypatch.setenv("PYPRUNE_BACKEND", "triton")
    assert "PYPRUNE_BACKEND=triton cannot run channel_moments here" in refused(*command)


def test_commands(refused: Callable[..., str], model: Path, text: Path, tmp_path: Path) -> None:
    assert "No such command 'shrink'" in refused("shrink", model)
    assert "No such command 'prun'. Did you mean 'prune'?" in refused("prun", model)
    assert "Missing argument 'OUTPUT'" in refused("prune", model, "--ratio", 0.3)
    assert "Missing option '--ratio'" in refused("prune", model, tmp_path / "out")
    assert "there is nothing to evaluate on" in refused("evaluate", model)
    assert "no such folder" in refused("evaluate", tmp_path / "nowhere", "--text", text)
    assert "the text has" in refused("evaluate", model, "--text", text, "--sequence-length", 4000)
    assert "outside (0, 1)" in refused("plan", model, "--ratio", 2)
    assert "-3 is not in the range" in refused("plan", model, "--ratio", 0.3, "--samples", -3)
    assert "no such folder" in refused("evaluate", model, "--text", text, "--reference", tmp_path / "nowhere")
    assert "0 is not in the range" in refused("evaluate", model, "--text", "self", "--max-windows", 0)
    assert "-1 is not in the range" in refused("evaluate", model, "--text", "self", "--seed", -1)


def test_attention_ratio_is_checked_before_the_survey(
    refused: Callable[..., str], model: Path, text: Path, tmp_path: Path
) -> None:
    line = refused(
        *("prune", model, tmp_path / "out", "--ratio", 0.3, "--calibration", text),
        *("--method", "flap", "--structure", "UL-MM", "--attention-ratio", 2),
    )
    assert "attention ratio 2 is outside [0, 1)" in line


@pytest.mark.parametrize("method", ["magnitude", "wanda-sp", "flap", "slimgpt", "obs"])
def test_nan_weights_name_the_layer(
    refused: Callable[..., str], model: Path, text: Path, tmp_path: Path, method: str
) -> None:
    bad = infinite(model, tmp_path / "bad", "model.layers.2.mlp.down_proj.weight")
    given = () if method == "magnitude" else ("--calibration", text, *SMALL)
    line = refused("prune", bad, tmp_path / "out", "--method", method, "--ratio", 0.3, *given)
    assert re.search(r"layer 2\b.*mlp\.down_proj.*NaN or Inf weights", line)


def test_evaluation_text_is_checked_before_the_first_layer(
    refused: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    line = refused(
        *("prune", model, tmp_path / "out", "--method", "magnitude", "--ratio", 0.3),
        *("--evaluate", tmp_path / "missing.txt"),
    )
    assert "missing.txt" in line


def test_a_refused_resume_keeps_what_was_done(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyprune.checkpoint import CheckpointWriter

    rest = ("--method", "flap", "--calibration", text, *SMALL, "--device", "cpu")
    command = ("prune", model, tmp_path / "out", "--ratio", 0.3, *rest)
    write = CheckpointWriter.write

    def killed(self: CheckpointWriter, part: int, *arguments: Any, **named: Any) -> None:
        if part == 2:
            raise KeyboardInterrupt
        write(self, part, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", killed)
        interrupted = run(capsys, *command)
    assert interrupted.status == 130
    assert interrupted.err.endswith(f"{tmp_path / 'out.partial'} keeps what is finished: repeat with --resume\n")
    before = sorted(tmp_path.rglob("*"))
    assert (tmp_path / "out.partial" / "journal.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setenv("PYPRUNE_BACKEND", "reference")
        outcome = run(capsys, *command, "--resume")
        assert outcome.status == 2
        assert "cannot be finished to the same bits: backends (was {'channel_moments': 'cpu'," in outcome.err
        assert "now {'channel_moments': 'reference'," in outcome.err
    other = run(capsys, "prune", model, tmp_path / "out", "--ratio", 0.4, *rest, "--resume")
    assert "ratio (was 0.3, now 0.4)" in other.err
    assert sorted(tmp_path.rglob("*")) == before
    assert run(capsys, *command, "--resume").status == 0


@pytest.mark.parametrize(("method", "ratio"), [("obs", 0.3), ("slimgpt", 0.3), ("sparsegpt", 0.5)])
@pytest.mark.parametrize("repeated", ["aaaa ", "a"])
def test_no_damping_on_inputs_of_low_rank(
    repeated: str,
    method: str,
    ratio: float,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Hessians are singular: either more damping is enough, or one line says what would be."""
    monkeypatch.setenv("PYPRUNE_VERIFY", "0")
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(repeated * 400)
    outcome = run(
        capsys, "prune", model, out, "--method", method, "--ratio", ratio, "--damping", 0, "--calibration", text, *SMALL
    )
    assert "Traceback" not in outcome.err
    assert outcome.status in (0, 2), outcome.err
    assert outcome.status == 0 or "damping" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "out.partial").exists()
