"""`pyprune benchmark`: every operator's rows on a CPU, correctness before time, interruption, one-line errors."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.benchmark_runs import benchmark, make_quick, timed
from support.command_line import run
from torch import Tensor

from pyprune.benchmark import results, runner
from pyprune.benchmark.case import FULL, SMALL, Candidate, Problem
from pyprune.benchmark.cases import hessian, layer_steps, selection
from pyprune.benchmark.catalogue import MODELS, OPERATORS, SWEEPS, case_named, catalogue, choose_cases
from pyprune.benchmark.rates import Rates, Work
from pyprune.benchmark.runner import Runner
from pyprune.benchmark.timing import LEAST_REPEAT, Timer

CPU = torch.device("cpu")
NORM = "rms_norm/tiny/1024x64/bf16"
MOMENTS = "channel_moments/tiny-down/2048x160/bf16"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys_of(inner)}
    return {key for inner in value for key in keys_of(inner)} if isinstance(value, list) else set()


def test_every_operator_is_correct_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "results.json"
    outcome = benchmark(capsys, "--shapes", "tiny", "--output", file)
    assert outcome.status == 0, outcome.err
    document = json.loads(file.read_text())
    rows = document["rows"]
    listed = benchmark(capsys, "--shapes", "tiny", "--list").out.split()
    assert [row["id"] for row in rows] == listed
    assert {row["operator"] for row in rows} == set(OPERATORS)
    lines = outcome.out.splitlines()
    assert [line.split("  ")[0] for line in lines[: len(rows)]] == listed
    assert lines[len(rows) :] == [str(file), str(file.with_suffix(".html"))]
    for row in rows:
        assert row["faults"] == []
        own = timed(row, "pyprune")
        assert own, row["id"]
        for one in own:
            assert set(row["allowed"]) <= set(one["errors"])
            assert all(one["errors"][what] <= most for what, most in row["allowed"].items()), row["id"]
        assert timed(row, "pytorch") or timed(row, "other"), row["id"]
        for one in row["candidates"]:
            assert (one["microseconds"] is None) == (one["status"] != "timed")
            assert bool(one["source"]) == (one["kind"] == "other")
            if one["microseconds"]:
                assert 0 < one["microseconds"]["low"] <= one["microseconds"]["median"] <= one["microseconds"]["high"]
    # The facts of the machine and the names of errors are not the schema's.
    for part in ("machine", "rates"):
        document.pop(part)
    for row in rows:
        row["allowed"] = None
        for one in row["candidates"]:
            one["errors"] = None
    described = results.__doc__ or ""
    assert {key for key in keys_of(document) if key not in described} == set()


def test_one_document_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = benchmark(capsys, "--row", NORM, "--row", MOMENTS, "--json")
    assert outcome.status == 0
    document = outcome.json
    assert (document["format"], document["kind"]) == (2, "pyprune benchmark")
    assert [row["id"] for row in document["rows"]] == [NORM, MOMENTS]
    assert document["machine"]["torch"] == torch.__version__
    assert document["rates"]["copy"] > 0
    assert document["rates"]["tf32"] is None


def test_a_wrong_result_is_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layer_steps.rms_norm

    def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, weight, eps) * 1.02

    file = tmp_path / "results.json"
    monkeypatch.setattr(layer_steps, "rms_norm", wrong)
    outcome = benchmark(capsys, "--row", NORM, "--row", MOMENTS, "--output", file)
    assert outcome.status == 1
    assert "1 of 2 rows are not correct: rms_norm/tiny" in outcome.err
    assert f"{NORM}  NOT CORRECT, not timed: reference: wrong: error of result 0.02" in outcome.out
    first, second = json.loads(file.read_text())["rows"]
    assert timed(first, "pyprune") == []
    assert timed(first, "other") != []
    assert timed(second, "pyprune") != []
    assert "not correct" in file.with_suffix(".html").read_text()

    monkeypatch.undo()
    make_quick(monkeypatch)
    again = benchmark(capsys, "--row", NORM, "--row", MOMENTS, "--output", file, "--resume")
    assert again.status == 0
    assert NORM in again.out
    assert MOMENTS not in again.out
    assert sum(bool(timed(row, "pyprune")) for row in json.loads(file.read_text())["rows"]) == 2


def test_what_a_candidate_raises_is_its_outcome(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(layer_steps, "functional", SimpleNamespace(rms_norm=too_large))
    outcome = benchmark(capsys, "--row", NORM, "--json")
    assert outcome.status == 0
    (row,) = outcome.json["rows"]
    (baseline,) = [one for one in row["candidates"] if one["name"] == "functional.rms_norm"]
    assert (baseline["status"], baseline["reason"]) == ("out of memory", "OutOfMemoryError: CUDA out of memory")
    assert len(timed(row, "pyprune")) == 1

    monkeypatch.setattr(layer_steps, "rms_norm", too_large)
    outcome = benchmark(capsys, "--row", NORM)
    assert outcome.status == 0
    assert "not timed: reference: out of memory" in outcome.out

    def broken(*arguments: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(layer_steps, "rms_norm", broken)
    outcome = benchmark(capsys, "--row", NORM)
    assert outcome.status == 1
    assert "reference: failed: RuntimeError: a bug of ours" in outcome.out


def test_inputs_that_do_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ...")

    monkeypatch.setattr(layer_steps, "normal", too_large)
    outcome = benchmark(capsys, "--row", NORM, "--row", MOMENTS)
    assert outcome.status == 0
    assert outcome.out.startswith(f"{NORM}  the inputs do not fit:")
    assert MOMENTS in outcome.out


def test_an_interrupted_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Runner.row

    def interrupted(self: Runner, case: Any) -> dict[str, Any]:
        if case.id == MOMENTS:
            raise KeyboardInterrupt
        return original(self, case)

    file = tmp_path / "results.json"
    monkeypatch.setattr(Runner, "row", interrupted)
    outcome = benchmark(capsys, "--row", NORM, "--row", MOMENTS, "--output", file)
    assert outcome.status == 130
    assert outcome.err.endswith(
        f"pyprune: interrupted; {file} keeps the rows that are finished: repeat with --resume\n"
    )
    (kept,) = json.loads(file.read_text())["rows"]
    assert NORM in file.with_suffix(".html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.html", "results.json"]

    monkeypatch.setattr(Runner, "row", original)
    outcome = benchmark(capsys, "--row", NORM, "--row", MOMENTS, "--output", file, "--resume")
    assert outcome.status == 0
    document = json.loads(file.read_text())
    assert document["rows"][0] == kept
    assert [row["id"] for row in document["rows"]] == [NORM, MOMENTS]

    document["machine"]["torch"] = "1.0"
    file.write_text(json.dumps(document))
    refused = benchmark(capsys, "--row", NORM, "--output", file, "--resume")
    assert refused.status == 2
    assert f"torch 1.0 there, {torch.__version__} here" in refused.err
    assert json.loads(file.read_text()) == document


def test_a_folder_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(capsys, "--row", NORM, "--output", tmp_path).status == 0
    (file,) = tmp_path.glob("*.json")
    assert benchmark(capsys, "--row", MOMENTS, "--output", tmp_path, "--resume").status == 0
    assert list(tmp_path.glob("*.json")) == [file]
    assert [row["id"] for row in json.loads(file.read_text())["rows"]] == [NORM, MOMENTS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operators", "softmax"], "unknown operator 'softmax'; one of channel_moments"),
        (["--row", NORM.replace("64", "65")], f"did you mean {NORM}?"),
        (["--backends", "gpu"], "unknown backend 'gpu'; one of cuda, triton, cpu, reference"),
        (["--operators", "rms_norm", "--backends", "triton"], "no row runs on triton here"),
        (["--shapes", "gpt-5"], "unknown shape 'gpt-5'"),
        (["--row", NORM, "--operators", "rms_norm"], "leave --operators, --shapes and --sweep out"),
        (["--row", NORM, "--sweep"], "leave --operators, --shapes and --sweep out"),
        (["--sweep", "--shapes", "tiny"], "--sweep has sizes of no model: leave --shapes out"),
        (["--sweep", "--operators", "swiglu,rotary"], "swiglu, rotary: no sweep; there are sweeps of channel_moments"),
        (["--resume"], "name it with --output"),
        (["--history"], "name a result with --output"),
        (["results.json"], "give earlier results with --history or --page"),
        (["--page"], "give FILES and --output PAGE.html"),
        (["--page", "absent.json", "--output", "page.html"], "absent.json: there is no such file"),
        (["--row", NORM, "--output", "results.txt"], "--output is a FILE.json or a folder"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = benchmark(capsys, *arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_backends_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = benchmark(capsys, "--row", MOMENTS, "--backends", "reference,cpu", "--json").json["rows"]
    own = [one["name"] for one in row["candidates"] if one["kind"] == "pyprune"]
    assert own[-1] == "reference"


def test_rows_of_a_gpu() -> None:
    cases = catalogue(MODELS, FULL, list(OPERATORS))
    ids = [case.id for case in cases]
    assert ids == [case.id for case in choose_cases(torch.device("cuda"))]
    assert len(set(ids)) == len(ids)
    assert {case.operator for case in cases} == set(OPERATORS)
    # 4096 channels are in two models: one row.
    assert sum(case.id.startswith("hessian/") and "x4096/" in case.id for case in cases) == 1
    for case in cases:
        assert case_named(case.id).measures == case.measures
    assert case_named("hessian/llama-3.1-8b-o/32768x4096/bf16").size == "32768x4096"
    small = choose_cases(torch.device("cuda"), quick=True)
    assert [case.id for case in small] == [case.id for case in choose_cases(CPU)]
    assert all(case.where.startswith("smollm2-135m") for case in small)


@pytest.mark.slow
def test_a_sweep_is_correct_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = benchmark(capsys, "--sweep", "--json")
    assert outcome.status == 0, outcome.err
    rows = outcome.json["rows"]
    assert {row["operator"] for row in rows} == set(SWEEPS)
    assert all(timed(row, "pyprune") for row in rows)
    assert [row["id"] for row in rows] == benchmark(capsys, "--sweep", "--list").out.split()
    full = choose_cases(torch.device("cuda"), sweep=True)
    assert len({case.id for case in full}) == len(full) > len(rows)
    assert all(case_named(case.id).measures == case.measures for case in full)
    models = {case.measures for case in choose_cases(torch.device("cuda"))}
    assert not [case.id for case in full if case.measures in models and "runs" not in case.id]
    drift = next(case for case in full if case.where == "drift")
    rows, d, updates = 2**20, 4096, 32
    assert drift.work.flops == rows * d * (d + 1)
    assert drift.work.bytes == 2 * rows * d + updates * 4 * d * (d + 1)


def test_a_drifting_hessian_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every update takes a little from the diagonal, too little to be seen in an element of one."""

    def cut_off(x: Tensor, h: Tensor) -> None:
        hessian.update_float32(x, h)
        h.diagonal().mul_(1 - 1e-6)

    row = "hessian/drift/4096x64by128/bf16"
    (right,) = benchmark(capsys, "--row", row, "--json").json["rows"]
    assert right["allowed"]["diagonal"] < 3e-6
    monkeypatch.setattr(hessian, "update_ours", cut_off)
    outcome = benchmark(capsys, "--row", row)
    assert outcome.status == 1
    # An update is multiplied by what the 1 to 32 updates from it on take: 16.5e-6 on average.
    assert "wrong: error of diagonal 1.7e-05" in outcome.out


def test_selections_in_runs() -> None:
    generator = torch.Generator().manual_seed(1)
    index = selection.selection_in_runs(4096, 2048, generator)
    assert len(index) == 2048
    assert index.diff().min() > 0
    assert 0 <= index[0] <= index[-1] < 4096
    runs = 1 + (index.diff() > 1).sum().item()
    assert 6 < 2048 / runs < 10  # MEAN_RUN is 8


def test_least_work() -> None:
    """Against sums that are written out."""
    work = {case.operator: case for model in ("tiny",) for case in catalogue([model], SMALL, list(OPERATORS))}
    rows, d = 2048, 160
    assert work["hessian"].work.flops == sum(2 * rows for i in range(d) for _ in range(i + 1))
    assert work["hessian"].work.bytes == 2 * rows * d + 2 * 4 * sum(i + 1 for i in range(d))
    assert work["spd_inverse"].work.flops == d**3
    count, outputs = 32, 64
    elimination = sum(3 * (d - k) ** 2 for k in range(1, count + 1))
    solve, product = outputs * count**2, 2 * outputs * count * (d - count)
    assert work["eliminate"].work.flops == outputs * d**2 + elimination + solve + product
    assert work["swiglu"].work.bytes == 3 * 2 * 1024 * 160
    assert work["scatter_add"].work.bytes == 3 * 2 * 1024 * 32


def test_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    rates = Rates(copy=1e12, bfloat16=8e14, float32=5e13, tf32=3e14)
    assert rates.product_rate("float32") == 1e14  # split over three TF32 products
    assert rates.product_rate("bfloat16") == 8e14
    floor = rates.floor(Work(10**9, 10**9))
    assert (floor.bound, floor.microseconds) == ("memory", pytest.approx(1000))
    floor = rates.floor(Work(10**6, 8 * 10**12, "bfloat16"))
    assert (floor.bound, floor.microseconds) == ("arithmetic", pytest.approx(10000))
    assert Rates(1.0, 1.0, 50.0, None).product_rate("bfloat16") == 50.0


def test_repetitions_follow_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(CPU, 30)
    calls: list[str] = []

    def once(call: Any, prepare: Any) -> tuple[Any, float]:
        prepare()
        call()
        return lambda: 1e6 * seconds, 1.0

    monkeypatch.setattr(timer, "once", once)
    for seconds, expected in ((1e-6, 30), (0.05, 6), (1.0, LEAST_REPEAT), (20.0, 1)):
        calls.clear()
        timing = timer.within(0.3, lambda: calls.append("call"), lambda: calls.append("prepare"))
        assert timing.repeat == expected
        assert calls == ["prepare", "call"] * expected
        assert timing.low == timing.median == timing.high == pytest.approx(1e6 * seconds)


def test_without_its_accuracy_reference_nothing_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = case_named(NORM)
    problem = Problem(
        Candidate("own", lambda: torch.ones(1)),
        (Candidate("accuracy_reference", fails),),
        lambda result: {"result": 0.0},
        "accuracy_reference",
        lambda plain: plain,
    )
    own = Runner(CPU, Timer(CPU, 2), Rates(1.0, 1.0, 1.0, None))
    outcomes, allowed = own.compete(case, problem)
    assert allowed == {}
    assert [outcome.status for outcome in outcomes] == [runner.UNJUDGED, runner.OUT_OF_MEMORY]


@pytest.mark.gpu
def test_every_operator_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every operator on every eligible backend, small; one row of a real size."""
    file = tmp_path / "results.json"
    outcome = run(capsys, "benchmark", "--device", "cuda", "--quick", "--repeat", 5, "--output", file)
    assert outcome.status == 0, outcome.err
    rows = json.loads(file.read_text())["rows"]
    assert {row["operator"] for row in rows} == set(OPERATORS)
    for row in rows:
        assert timed(row, "pyprune"), row
        assert all(one["status"] == "timed" for one in row["candidates"] if one["kind"] == "pyprune"), row
        assert all(one["peak_bytes"] is not None for one in timed(row, "pyprune"))
    backends = {one["name"] for row in rows for one in timed(row, "pyprune")}
    assert {"cuda", "triton"} <= backends
    row = "hessian/llama-2-7b-o/32768x4096/bf16"
    outcome = run(capsys, "benchmark", "--row", row, "--json")
    assert outcome.status == 0, outcome.err
    assert len(timed(outcome.json["rows"][0], "pyprune")) == 2


@pytest.mark.gpu
def test_compiled_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    row = "swiglu/qwen3-0.6b/1024x3072/bf16"
    outcome = run(capsys, "benchmark", "--row", row, "--compile", "--repeat", 3, "--json")
    assert outcome.status == 0, outcome.err
    assert "transformers' steps, compiled" in {one["name"] for one in timed(outcome.json["rows"][0], "other")}
