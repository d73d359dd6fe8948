"""Tuned Triton configurations: which candidate is taken, the table that is written and read, and who uses it."""

import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyprune.triton_kernels import channel_moments, hessian
from support.command_line import run
from support.machine_code import RESERVED_SHARED_MEMORY, SHARED_MEMORY
from test_hessian_triton import compile_tma
from test_triton_compile import compile_chunk_moments

from pyprune.benchmark import tune
from pyprune.benchmark.configurations import TUNABLE, hessian_configurations, moments_configurations, names_of
from pyprune.benchmark.search import LEAST_GAIN, Gain, Shape, Unusable, combined, gain_of, is_gain, search
from pyprune.errors import InputError
from pyprune.ops import describe_installation, tuning
from pyprune.ops.tuning import Gpu

GPU = Gpu("NVIDIA Test 80GB", (9, 0))
SHAPES = [(1024, 64), (2048, 128)]
SHIPPED = channel_moments.CONFIGURATIONS[90, 2]
FASTER = replace(SHIPPED, resident=2, waves=2)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine whose GPU is GPU, and whose cache is empty."""
    monkeypatch.setattr(tuning, "gpu_here", lambda device=None: GPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(tuning.ENVIRONMENT_VARIABLE, raising=False)
    tuning.entries_in_use.cache_clear()


def entry(configuration: Any = FASTER, operator: str = "channel_moments", **changes: Any) -> dict[str, Any]:
    own = {"operator": operator, "element_size": 2, "kernels": tuning.kernels_fingerprint(operator)}
    figures = {"configuration": asdict(configuration), "gain": 1.05, "error": 0.001, "shapes": {"1024x64": 1.05}}
    return own | figures | changes


def written(*entries: dict[str, Any]) -> Path:
    return tuning.write_table(GPU, entries, "2026-01-01T00:00:00+00:00")


class Timings:
    """Microseconds of integers, which stand for configurations: `seconds` of each, with noise, and what is unusable."""

    def __init__(self, times: dict[int, float], noise: float, unusable: dict[int, str] | None = None) -> None:
        self.times, self.noise, self.unusable = times, noise, unusable or {}
        self.random = random.Random(0)
        self.asked: list[tuple[tuple[int, ...], Shape, bool]] = []

    def __call__(self, configurations: Sequence[int], shape: Shape, final: bool) -> list[list[float]]:
        self.asked.append((tuple(configurations), shape, final))
        for one in configurations:
            if one in self.unusable:
                raise Unusable(self.unusable[one])
        drift = [self.random.uniform(1, 1.2) for _ in range(25 if final else 7)]  # all of a round share it
        return [[d * self.times[one] * self.random.gauss(1, self.noise) for d in drift] for one in configurations]


def test_the_fastest_is_taken() -> None:
    times = Timings({0: 100.0, 1: 97.0, 2: 92.0, 3: 101.0, 4: 99.9}, 0.004)
    found = search(0, [0, 1, 2, 3, 4], SHAPES, times)
    assert (found.best, found.taken, found.skipped) == (2, True, [])
    assert found.gain.times == pytest.approx(100 / 92, abs=0.01)
    assert set(found.by_shape) == set(SHAPES)
    finals = [configurations for configurations, _, final in times.asked if final]
    assert len(finals) == len(SHAPES)
    assert all(configurations[0] == 0 and len(configurations) == 4 for configurations in finals)


@pytest.mark.parametrize(
    ("faster", "noise"),
    [(1.0, 0.01), (0.998, 0.001), (0.985, 0.05)],
    ids=["none is faster", "by less than is worth it", "by less than the noise"],
)
def test_noise_is_no_gain(faster: float, noise: float) -> None:
    candidates = list(range(1, 12))
    found = search(0, candidates, SHAPES, Timings({0: 100.0} | dict.fromkeys(candidates, 100.0 * faster), noise))
    assert not found.taken
    assert found.best in candidates


def test_candidates_that_are_out() -> None:
    times = Timings({0: 100.0, 1: 140.0, 3: 90.0}, 0.001, {2: "OutOfResources: shared memory"})
    found = search(0, [1, 2, 3], SHAPES, times)
    assert found.skipped == [(2, "OutOfResources: shared memory")]
    assert found.best == 3
    # A hopeless one is not timed on the other shapes.
    assert [shape for configurations, shape, _ in times.asked if configurations == (1,)] == SHAPES[:1]
    nothing = search(0, [2], SHAPES, times)
    assert (nothing.best, nothing.taken, nothing.gain, nothing.by_shape) == (0, False, Gain(0.0, 0.0), {})
    with pytest.raises(Unusable):
        search(2, [0], SHAPES, times)


def test_a_gain_that_costs_another_shape_is_none() -> None:
    good, bad = Gain(0.1, 0.001), Gain(-0.05, 0.001)
    assert is_gain([good, good])
    assert combined([good, bad]).certain > LEAST_GAIN
    assert not is_gain([good, bad])


def test_gain_of_rounds() -> None:
    """Rounds of different lengths, one disturbed: the ratio of each round counts, its median and no mean."""
    shipped = [100.0, 110.0, 120.0, 130.0, 500.0]
    gain = gain_of(shipped, [50.0, 55.0, 60.0, 65.0, 65.0])
    assert (gain.log, gain.error) == (math.log(2), 0.0)
    spread = gain_of([math.exp(x) for x in (0.0, 0.1, 0.2, 0.3, 0.4)], [1.0] * 5)
    # Normal: deviation 0.1 · 1.4826, a median's standard error √(π/2) times a mean's.
    assert spread.error == pytest.approx(1.4826 * 0.1 * math.sqrt(math.pi / 2) / math.sqrt(5))


def test_table_is_used_by_the_kernels() -> None:
    assert channel_moments.configuration_for((9, 0), 2) == SHIPPED
    wide = replace(hessian.TMA, band=8)
    file = written(entry(), entry(wide, "hessian", element_size=2))
    assert file.name == "nvidia-test-80gb.json"
    assert file.parent.name == "tuning"
    assert channel_moments.configuration_for((9, 0), 2) == FASTER
    assert channel_moments.configuration_for((9, 0), 4) == channel_moments.CONFIGURATIONS[90, 4]
    # Another device of this machine has no such table.
    assert channel_moments.configuration_for((8, 0), 2) == channel_moments.CONFIGURATIONS[80, 2]
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert hessian.configuration_for((9, 0), x) == wide
    assert hessian.configuration_for((9, 0), x.float()) == hessian.FLOAT32
    assert hessian.configuration_for((9, 0), x[:, :63].contiguous()) == hessian.ANY_WIDTH


def test_it_can_be_turned_off_or_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written(entry())
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "off")
    assert channel_moments.configuration_for((9, 0), 2) == SHIPPED
    assert tuning.describe_table(None) is None
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(tmp_path / "own.json"))
    with pytest.raises(InputError, match=r"PYPRUNE_TUNING: .*own\.json: No such file"):
        channel_moments.configuration_for((9, 0), 2)
    other = replace(SHIPPED, waves=3)
    assert written(entry(other)) == tmp_path / "own.json"
    assert channel_moments.configuration_for((9, 0), 2) == other
    assert tuning.describe_table(None) == {
        "file": str(tmp_path / "own.json"),
        "fingerprint": tuning.fingerprint([entry(other)]),
    }


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another GPU": (lambda table: table.update(gpu="NVIDIA Other"), "made for gpu NVIDIA Other, this is NVIDIA Test"),
    "another Triton": (lambda table: table.update(triton="2.0"), "made for triton 2.0, this is"),
    "another format": (lambda table: table.update(format=2), "not a table of format 1"),
    "no entries": (lambda table: table.update(entries=None), "no list of entries"),
    "other kernels": (lambda table: table["entries"][0].update(kernels="0"), "other kernels of channel_moments"),
    "unknown operator": (lambda table: table["entries"][0].update(operator="swiglu"), "of no operator that is tuned"),
    "a missing field": (lambda table: table["entries"][0]["configuration"].pop("warps"), "warps is None"),
    "a field too many": (lambda table: table["entries"][0]["configuration"].update(more=1), "malformed"),
    "a field of another type": (
        lambda table: table["entries"][0]["configuration"].update(stages="4"),
        "stages is '4'",
    ),
    "no size": (lambda table: table["entries"][0].update(element_size=3), "2 or 4 bytes, not 3"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_table_that_does_not_fit(
    change: Callable[[dict[str, Any]], object],
    message: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = written(entry())
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(table))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert channel_moments.configuration_for((9, 0), 2) == SHIPPED
    (line,) = caplog.messages
    assert message in line
    assert line.startswith("tuned configurations are ignored, `pyprune tune` makes new ones: ")
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(file))
    with pytest.raises(InputError, match="PYPRUNE_TUNING: ") as error:
        channel_moments.configuration_for((9, 0), 2)
    assert message in str(error.value)


def test_what_is_no_table(caplog: pytest.LogCaptureFixture) -> None:
    file = written(entry())
    file.write_text("{")
    assert channel_moments.configuration_for((9, 0), 2) == SHIPPED
    assert "not a JSON file" in caplog.text


def test_fingerprints() -> None:
    """They follow from the configurations alone; a Hessian's bits follow from both operators'."""
    device = torch.device("cuda")
    assert tuning.operator_fingerprint("hessian", device) is None
    written(entry())
    moments = tuning.operator_fingerprint("channel_moments", device)
    assert moments == tuning.fingerprint([entry(gain=2.0)])
    assert moments != tuning.fingerprint([entry(SHIPPED)])
    assert tuning.operator_fingerprint("hessian", device) == moments
    written(entry(), entry(hessian.POINTERS, "hessian"))
    assert tuning.operator_fingerprint("channel_moments", device) == moments
    assert tuning.operator_fingerprint("hessian", device) != moments
    assert tuning.operator_fingerprint("swiglu", device) is None


def test_backends_say_what_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tuning, "gpu_of", lambda index: GPU)
    name = "tuned configurations, cuda:0"
    assert describe_installation()[name].startswith("none: `pyprune tune`")
    file = written(entry())
    assert describe_installation()[name] == f"channel_moments of 2 bytes 1.050 x ({file})"
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "off")
    assert describe_installation()[name] == "off (PYPRUNE_TUNING)"


class FakeMeasure:
    """In the place of the GPU's: two residents are a tenth faster in channel moments, anything else is the same."""

    def __init__(self, tunable: Any, element_size: int, device: torch.device) -> None:
        self.gains = tunable is TUNABLE["channel_moments"]

    def __call__(self, configurations: Sequence[Any], shape: Shape, final: bool) -> list[list[float]]:
        for configuration in configurations:
            if not self.gains and configuration.band == 16:
                raise Unusable("OutOfResources: out of resource: shared memory")
        fast = [self.gains and configuration.resident == 2 for configuration in configurations]
        return [[90.0 if own else 100.0] * 25 for own in fast]


def test_tuning_leaves_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "GpuMeasure", FakeMeasure)
    for name in ("set_device", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    lines: list[str] = []
    seen: list[tuple[str, int, int]] = []
    file = tuning.table_file(GPU)
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    report = tune.tune_operators(
        ["channel_moments", "hessian"], GPU, torch.device("cuda"), True, lines.append, lambda *step: seen.append(step)
    )
    assert report["file"] == str(file)
    assert lines[0] == f"replaced: {file}: not a table of format 1"
    assert lines[1].startswith("channel_moments, 2 bytes: resident 2: 1.111 x the shipped one (standard error 0.000)")
    assert any(line.startswith("hessian, 2 bytes: skipped band 16: OutOfResources") for line in lines)
    assert any(line.startswith("hessian, 2 bytes: the shipped one stays") for line in lines)
    assert lines[-1] == f"2 tuned configurations in {file}"
    assert [(one["operator"], one["element_size"], one["taken"]) for one in report["findings"]] == [
        ("channel_moments", 2, True),
        ("channel_moments", 4, True),
        ("hessian", 2, False),
        ("hessian", 4, False),
    ]
    assert {what for what, _, _ in seen} == {
        f"{operator}, {size} bytes" for operator in ("channel_moments", "hessian") for size in (2, 4)
    }
    assert all(0 <= done <= total for _, done, total in seen)
    assert channel_moments.configuration_for((9, 0), 2) == replace(SHIPPED, resident=2)
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name]

    # A search that finds the shipped one as fast takes the entry back; the other operator's stays.
    monkeypatch.setattr(FakeMeasure, "__call__", lambda self, own, shape, final: [[100.0] * 25 for _ in own])
    tune.tune_operators(["hessian"], GPU, torch.device("cuda"), True, lines.append, lambda *step: None)
    assert len(tuning.read_table(file, GPU)) == 2
    tune.tune_operators(["channel_moments"], GPU, torch.device("cuda"), True, lines.append, lambda *step: None)
    assert tuning.read_table(file, GPU) == {}


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "gpu_here", lambda device=None: None)
    outcome = run(capsys, "tune", "--device", "cpu")
    assert outcome.status == 2
    assert outcome.err == "pyprune: pyprune tune times Triton's kernels on a CUDA device, and there is none here\n"
    unknown = run(capsys, "tune", "--operators", "swiglu")
    assert unknown.status == 2
    assert "only channel_moments, hessian have configurations" in unknown.err
    assert channel_moments.configuration_for((9, 0), 2) == SHIPPED


def test_names_of_a_configuration() -> None:
    assert names_of(FASTER, [SHIPPED]) == "resident 2, waves 2"
    assert names_of(SHIPPED, [SHIPPED]).startswith("tile rows 8, tile channels 1024, warps 4")


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_candidates_are_alike_in_what_the_kernels_rely_on(capability: tuple[int, int], element_size: int) -> None:
    moments = moments_configurations(capability, element_size, False)
    assert channel_moments.shipped_configuration(capability, element_size) in moments
    for candidate in moments:
        # A thread owns 16 bytes of a row: no shuffles in a column's sum.
        assert candidate.tile_channels * element_size == 16 * 32 * candidate.warps
        assert not candidate.early_merge or capability >= (9, 0)
    assert len(set(moments)) >= len(moments) - 1
    for candidate in hessian_configurations(capability, element_size, False):
        assert hessian.FLUSH_ROWS % candidate.depth == 0
        assert not candidate.tma or (capability >= (9, 0) and element_size == 2)


def test_candidates_compile() -> None:
    """For sm_90, the deepest of each tile: no spills, and no more shared memory than there is."""
    deepest = {(c.tile_rows, c.warps): c for c in moments_configurations((9, 0), 2, False)}
    for candidate in deepest.values():
        code = compile_chunk_moments(90, "bf16", candidate, True, False)
        assert code.stack == 0
        assert code.resident(90, candidate.warps) >= 2
        assert "shfl" not in code.ptx
    for candidate in hessian_configurations((9, 0), 2, False):
        if candidate.tma and candidate.band == hessian.TMA.band:
            code = compile_tma("bf16", candidate)
            assert code.stack == 0
            assert code.shared <= SHARED_MEMORY[90] - RESERVED_SHARED_MEMORY


@pytest.mark.gpu
def test_tuning_on_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A quick search; afterwards the operators run from its table and are still right."""
    from pyprune.ops import Hessian

    monkeypatch.undo()
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(tmp_path / "table.json"))
    outcome = run(capsys, "tune", "--quick", "--json")
    assert outcome.status == 0, outcome.err
    findings = outcome.json["findings"]
    assert len(findings) == 4
    assert all(one["gain"] > 0.5 for one in findings)
    monkeypatch.setenv("PYPRUNE_BACKEND", "triton")
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    state = Hessian.zeros(256, x.device)
    state.update(x)
    exact = x.double().T @ x.double()
    assert ((state.finish().double() - exact).abs().max() / exact.abs().max()).item() < 1e-5
