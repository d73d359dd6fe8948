"""Whole prunings as the benchmark measures them: both sources give one plan, and the page shows what was measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import page
import pytest
import torch
from end_to_end import argument_parser, run
from floors import CHUNK, disk_rates
from generated import DiscardingWriter, GeneratedLoader, GeneratedReader
from layer_profile import summary
from support.paths import ROOT

from pyprune.checkpoint import CheckpointReader
from pyprune.testing.random_checkpoint import make_checkpoint

FIELDS = {
    "machine", "shape", "sizes", "method", "ratio", "ratio_met", "samples", "sequence_length", "source",
    "device_memory_gb", "profiled", "dtype", "backends", "seconds", "compute_seconds", "passes", "peak_memory",
    "model_bytes", "moved", "storage", "floor", "times_floor", "predicted", "kept", "warnings",
}  # fmt: skip
Measured = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The report of a tiny run, on the CPU unless told, each made once: `measured("flap", "disk", "--profile")`."""
    scratch = tmp_path_factory.mktemp("scratch")
    reports: dict[tuple[str, ...], dict[str, Any]] = {}

    def measure(method: str, source: str, *more: str) -> dict[str, Any]:
        key = (method, source, *more)
        if key not in reports:
            words = ["tiny", "--layers", "4", "--samples", "4", "--sequence-length", "64", "--device", "cpu"]
            words += ["--method", method, "--source", source, "--disk-sample", "0.001", *more]
            reports[key] = json.loads(json.dumps(run(argument_parser().parse_args(words), scratch)))
        return reports[key]

    return measure


@pytest.mark.parametrize("method", ["flap", "obs"])
def test_both_sources(measured: Measured, method: str) -> None:
    disk, generated = measured(method, "disk"), measured(method, "generated")
    for report in (disk, generated):
        assert report.keys() == FIELDS
        assert [len(own["layers"]) for own in report["passes"].values()] == [4, 4]
        assert 0 < report["compute_seconds"] < report["seconds"]
        assert report["floor"]["seconds"] >= report["floor"]["forward_seconds"] > 0
        assert report["peak_memory"]["host_bytes"] > 0
        assert report["predicted"]["peak_memory_bytes"] > 0
        assert report["ratio_met"] == pytest.approx(0.2, abs=0.005)
    # The same tensors come from the disk and from the device.
    assert disk["kept"] == generated["kept"]
    assert disk["model_bytes"] == generated["model_bytes"]
    assert disk["floor"]["disk_seconds"] > 0
    layers = 2 * 4 * (64 * (64 * 2 + 32 * 2 + 3 * 160) + 2 * 64)
    for report in (disk, generated):
        assert report["moved"]["bytes_read"] == 2 * layers  # two passes
        assert report["moved"]["bytes_written"] == pytest.approx(report["model_bytes"][1], rel=0.01)  # the headers


def test_generated_layers_are_those_of_a_checkpoint(tmp_path: Path) -> None:
    stored = CheckpointReader(make_checkpoint(tmp_path / "whole", family="qwen2"))
    folder = make_checkpoint(tmp_path / "headers", family="qwen2", headers_only=True)
    reader = GeneratedReader(folder, torch.device("cpu"))
    loader = GeneratedLoader(reader, torch.device("cpu"))
    number = 0
    for layer, tensors in enumerate(loader.layers(1), 1):
        number += 1
        expected = stored.read_layer(layer)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert number == 2
    ids = torch.tensor([[3, 200], [7, 3]])
    assert torch.equal(reader.embed(ids), stored.embed(ids))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["flap", "obs", "slimgpt", "wanda-sp"])
def test_on_a_gpu(measured: Measured, method: str) -> None:
    disk, generated = (measured(method, source, "--device", "cuda", "--profile") for source in ("disk", "generated"))
    assert disk["kept"] == generated["kept"]
    for report in (disk, generated):
        assert report["peak_memory"]["device_reserved_bytes"] >= report["peak_memory"]["device_allocated_bytes"] > 0
        assert 0 < report["profile"]["busy_share"] <= 1
        assert report["profile"]["kernels"]


@pytest.mark.gpu
def test_what_is_written_is_copied_to_the_host(tmp_path: Path) -> None:
    writer = DiscardingWriter(tmp_path / "out", {}, resume=False)
    writer.begin()
    whole = {"a": torch.ones(300, 7, device="cuda"), "b": torch.ones(5, device="cuda")}
    parts = [{f"{name} {part}": tensor for name, tensor in whole.items()} for part in range(2)]
    writer.lay_out(parts, 10**6)
    for part, tensors in enumerate(parts):
        writer.write(part, tensors)
    writer.flush()
    assert writer.tensor_bytes == 2 * (300 * 7 + 5) * 4


def test_disk_rates(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * CHUNK + 5))
    rates = disk_rates(tmp_path, tmp_path, 10 * CHUNK)
    assert rates["read_bytes_per_second"] > 0
    assert rates["write_bytes_per_second"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_profile(measured: Measured) -> None:
    profile = measured("flap", "disk", "--profile")["profile"]
    assert profile["layers"] == [2, 3]
    assert 0 < profile["busy_share"] <= 1
    assert profile["kernels"]


def test_busy_share_counts_overlaps_once() -> None:
    second = 10**9
    intervals = [("b", 4 * second, 5 * second), ("a", 0, 2 * second), ("b", second, 3 * second), ("c", second, second)]
    result = summary(intervals, 8.0)
    assert result["busy_share"] == 4 / 8
    assert [(k["name"], k["seconds"], k["calls"]) for k in result["kernels"]] == [("b", 3, 2), ("a", 2, 1), ("c", 0, 1)]
    assert result["idle_before"] == [{"name": "b", "seconds": 1}]


@pytest.mark.figures
def test_page_shows_the_runs(measured: Measured, tmp_path: Path) -> None:
    results, plots = tmp_path / "results", tmp_path / "plots"
    results.mkdir()
    runs = [measured("flap", "disk"), measured("obs", "generated"), measured("flap", "disk", "--profile")]
    runs[1] = json.loads(json.dumps(runs[1]))
    runs[1]["passes"]["prune"]["stages"] = {"forward": 0.25 * runs[1]["passes"]["prune"]["seconds"]}
    for number, report in enumerate(runs):
        (results / f"end-to-end-{number}.json").write_text(json.dumps(report))
    text = page.make_page(results, plots)
    assert "| flap, tiny, 20 %, 4 layers | 4 × 64 |" in text
    assert "| obs, tiny, 20 %, 4 layers, generated | 4 × 64 |" in text
    assert "flap, tiny, 20 %, 4 layers (2): layers 2 to 3 of the prune pass" in text
    assert text.count(f"{runs[0]['predicted']['peak_memory_bytes'] / 1e9:.2f} / ") >= 1
    for name in ("seconds.svg", "memory.svg"):
        assert f"](plots/{name})" in text
        assert "SlimGPT, LLaMA-13B, 20 %" in (plots / name).read_text()
        assert (plots / name).stat().st_size < 100_000
    assert "prune: forward" in (plots / "seconds.svg").read_text()
    assert "prune: other" in (plots / "seconds.svg").read_text()


@pytest.mark.slow
@pytest.mark.figures
def test_page_is_made_from_the_committed_results(tmp_path: Path) -> None:
    made = page.make_page(ROOT / "benchmarks" / "results", tmp_path / "plots")
    committed = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert committed == made, "run `python benchmarks/page.py`"
    for plot in (tmp_path / "plots").glob("*.svg"):
        assert (ROOT / "benchmarks" / "plots" / plot.name).is_file(), "run `python benchmarks/page.py`"
