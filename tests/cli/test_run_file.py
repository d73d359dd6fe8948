"""`--config`, run.yaml in the output, `--dry-run`, `--log-file`, and a size in place of a ratio."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import run

from pyprune.checkpoint import CheckpointReader
from pyprune.job.record import read_plan

SMALL = ("--samples", 4, "--sequence-length", 16, "--device", "cpu")


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "asked",
    [
        ("--method", "obs", "--ratio", 0.3, "--damping", 0.02, "--seed", 5),
        pytest.param(("--method", "flap", "--ratio", 0.4, "--layers", "0,2"), marks=pytest.mark.slow),
        pytest.param(("--method", "sparsegpt", "--pattern", "2:4"), marks=pytest.mark.slow),
        ("--method", "magnitude", "--parameters", "1.1M", "--uniform"),
    ],
)
def test_a_run_is_repeated_from_its_file(
    asked: tuple[Any, ...], model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And `--cache` apart, so that nothing of the first run answers for the second."""
    given = () if "magnitude" in asked else ("--calibration", text)
    first = run(capsys, "prune", model, tmp_path / "first", *asked, *given, *SMALL, "--no-verify")
    assert first.status == 0, first.err
    file = tmp_path / "first" / "run.yaml"
    second = run(capsys, "prune", tmp_path / "second", "--config", file, "--cache", tmp_path / "cache")
    assert second.status == 0, second.err
    assert weights(tmp_path / "second") == weights(tmp_path / "first")
    assert (tmp_path / "second" / "run.yaml").read_bytes() == file.read_bytes()
    plans = [read_plan(tmp_path / name) for name in ("first", "second")]
    assert plans[0]["identity"] == plans[1]["identity"]


@pytest.mark.slow
def test_several_texts_are_repeated(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("--calibration", f"{text}=0.75", "--calibration", "builtin=0.25", "--packing", "concatenate")
    asked = ("--method", "wanda-sp", "--ratio", 0.3, *texts, "--samples", 4, "--sequence-length", 8, "--device", "cpu")
    first = run(capsys, "prune", model, tmp_path / "first", *asked, "--no-verify")
    assert first.status == 0, first.err
    second = run(capsys, "prune", tmp_path / "second", "--config", tmp_path / "first" / "run.yaml")
    assert second.status == 0, second.err
    assert weights(tmp_path / "second") == weights(tmp_path / "first")


def test_what_is_typed_wins(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"model: {model}\nmethod: magnitude\nratio: 0.3\nround_to: 8\nuniform: true\nverify: no\n")
    for output, more in (("a", ()), ("b", ("--ratio", 0.5, "--round-to", 16)), ("c", ("--parameters", "1.1M"))):
        outcome = run(capsys, "prune", tmp_path / output, "--config", file, *more, "--json")
        assert outcome.status == 0, outcome.err
    plans = {name: read_plan(tmp_path / name) for name in "abc"}
    assert [plans[name]["ratio"]["asked"] for name in "ab"] == [0.3, 0.5]
    assert [plans[name]["options"]["round_to"] for name in "abc"] == [8, 16, 8]
    assert all(plan["options"]["uniform"] for plan in plans.values())
    assert plans["c"]["target"]["asked"] == 1_100_000
    assert run(capsys, "estimate", "--config", file, "--json").json["ratio"] == 0.3


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("sampels: 3", "line 1: no option 'sampels'; did you mean samples?"),
        ("ratio: 0.3\n\nratio: 0.4", "line 3: ratio is given twice"),
        ("samples: {a: 1}", "line 1: samples takes one value, or a list of them"),
        ("samples: [1, 2]", "line 1: samples takes one value"),
        ("- ratio", "not a mapping of options: write each as `name: value`"),
        ("ratio: [0.3", "not YAML: while parsing a flow sequence"),
        ("method: lottery", "'lottery' is not one of magnitude"),
        ("samples: many", "'many' is not a valid integer range"),
        ("dry-run: true", "no option 'dry-run'"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_file(
    written: str | None, line: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    if written is not None:
        file.write_text(written)
    outcome = run(capsys, "prune", model, tmp_path / "out", "--config", file)
    assert (outcome.status, outcome.out) == (2, "")
    assert line in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_dry_run_estimates(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--ratio", 0.3, "--calibration", "self", *SMALL, "--json")
    dry = run(capsys, "prune", model, tmp_path / "out", *asked, "--dry-run").json
    estimated = run(capsys, "estimate", model, *asked).json
    assert [step["pass"] for step in dry["passes"]] == ["sampling", "calibration", "prune"]
    changing = ("passes", "peak_memory_bytes", "host_memory_bytes")  # times, and the process as it is now
    assert {k: v for k, v in dry.items() if k not in changing} == {
        k: v for k, v in estimated.items() if k not in changing
    }
    assert not list(tmp_path.iterdir())


def test_an_estimate_counts_sampling_and_reading(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("estimate", model, "--ratio", 0.3, *SMALL[:4], "--on", "RTX 4090", "--json")
    written, sampled = (run(capsys, *asked, "--calibration", source).json for source in (text, "self"))
    bytes_stored = CheckpointReader(model).bytes
    assert sampled["bytes_read"] - written["bytes_read"] == bytes_stored  # the whole model, once more
    assert sampled["reading"]["seconds"] == round(sampled["bytes_read"] / sampled["reading"]["bytes_per_second"], 3)
    (sampling,) = (step for step in sampled["passes"] if step["pass"] == "sampling")
    assert sampling["seconds"] > 0
    assert sampled["peak_memory_by_pass"]["sampling"] > bytes_stored
    assert written["passes"] == [step for step in sampled["passes"] if step is not sampling]


@pytest.mark.parametrize(("kind", "method"), [("size", "flap"), ("size", "obs"), ("parameters", "magnitude")])
def test_a_target_in_place_of_a_ratio(
    kind: str, method: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Met within half a unit of each layer, counted from the files."""
    reader = CheckpointReader(model)
    shape = reader.shapes[0]
    unit = max(1.0, shape.group_cost) * 3 * shape.hidden_size * len(reader.shapes) / 2
    dense = reader.bytes // 4
    amount = round(dense - 0.3 * sum(own.parameters for own in reader.shapes))
    asked = ("--target-size", f"{4 * amount}B") if kind == "size" else ("--parameters", amount)
    outcome = run(
        capsys, "prune", model, tmp_path / "out", "--method", method, *asked, "--calibration", text, *SMALL, "--json"
    )
    assert outcome.status == 0, outcome.err
    biases = 2 * len(reader.shapes) * shape.hidden_size if method == "flap" else 0
    found = CheckpointReader(tmp_path / "out").bytes // 4 - (biases if kind == "parameters" else 0)
    target = read_plan(tmp_path / "out")["target"]
    assert target == outcome.json["target"] == {
        "kind": kind, "asked": amount * (4 if kind == "size" else 1), "met": found * (4 if kind == "size" else 1)
    }  # fmt: skip
    assert abs(found - amount) <= unit


def test_targets_that_cannot_be_met(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(*words: object) -> str:
        outcome = run(capsys, "prune", model, tmp_path / "out", "--method", "magnitude", *words)
        assert (outcome.status, outcome.out, len(outcome.err.splitlines())) == (2, "", 1)
        return outcome.err

    dense = CheckpointReader(model).bytes / 1e6
    assert f"the dense model has {dense:.4g} MB already; ask for less" in line("--target-size", "1GB")
    assert "--target-size 0.001 MB is out of reach: magnitude leaves at least" in line("--target-size", "1KB")
    assert "is out of reach: magnitude leaves at least" in line("--parameters", "1K")
    assert "--ratio and --parameters both say how much to remove: give one of them" in line(
        "--ratio", 0.3, "--parameters", "1M"
    )
    assert "--parameters needs a method that removes units: wanda sets single weights to zero" in line(
        "--method", "wanda", "--parameters", "1M", "--calibration", "self"
    )
    assert "Missing option '--ratio'" in line()
    assert not list(tmp_path.iterdir())


def test_sizes_are_decimal_and_binary() -> None:
    from pyprune.cli.command import MemorySize, ParameterCount

    size, count = MemorySize(), ParameterCount()
    assert [size.convert(word, None, None) for word in ("4.2GB", "3.9GiB", "12 mib", "7")] == [
        4_200_000_000, int(3.9 * 2**30), 12 * 2**20, 7,
    ]  # fmt: skip
    assert [count.convert(word, None, None) for word in ("5.0B", "350M", "1.2k")] == [5_000_000_000, 350_000_000, 1200]


def test_a_log_of_the_steps(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    asked = ("prune", model, tmp_path / "out", "--ratio", 0.3, *SMALL, "--no-verify", "--log-file", log)
    outcome = run(capsys, *asked, "--calibration", text)
    assert outcome.status == 0, outcome.err
    assert "INFO obs at ratio 0.3 on cpu in torch.float32" in log.read_text()
    assert "INFO prune: done in" in log.read_text()
    assert "prune: done in" not in outcome.err
    verbose = run(capsys, *asked, "--calibration", tmp_path / "nowhere", "--cache", tmp_path / "c", "-v")
    assert verbose.status == 2
    assert "ERROR stopped: InputError" in log.read_text()
    missing = run(capsys, *asked[:-1], tmp_path / "no" / "log", "--calibration", text, "--resume")
    assert "cannot be written: No such file or directory" in missing.err
    assert missing.status == 2


def test_channels_are_rounded_by_default_from_4096_on() -> None:
    from pyprune.architectures import LayerShape
    from pyprune.methods import make_method

    large, small = [LayerShape(1024, 64, 8, 2, 4096)] * 3, [LayerShape(1024, 64, 8, 2, 4095)] * 3
    for name in ("magnitude", "wanda-sp", "flap", "slimgpt", "obs"):
        assert make_method(name, {}).fitted(large).options["round_to"] == 128
        assert make_method(name, {}).fitted(small).options["round_to"] == 1
        assert make_method(name, {"round_to": 1}).fitted(large).options["round_to"] == 1
    assert make_method("flap", {"mode": "reference"}).fitted(large).options["round_to"] == 1
    counts = make_method("magnitude", {}).fitted(large).known_counts(large, 0.3)
    assert counts is not None
    assert all((4096 - own["ffn"]) % 128 == 0 for own in counts)


def test_the_file_is_yaml_of_the_command_lines_names(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "prune", model, tmp_path / "out", "--method", "magnitude", "--ratio", 0.3, "--no-verify")
    options = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert options["model"] == str(model)
    assert options["round-to"] == 1
    assert json.dumps(options["ratio"]) == "0.3"
    assert "output" not in options
