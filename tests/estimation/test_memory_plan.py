"""The budget of a GPU: what runs how, what is refused, and predictions against runs that were measured."""

import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.command_line import run
from support.paths import ROOT

from pyprune.architectures import LayerShape
from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError
from pyprune.estimation.estimate import estimate
from pyprune.estimation.memory import plan_memory
from pyprune.estimation.procedures import PROCEDURES, costs_of
from pyprune.estimation.sizes import Sizes
from pyprune.estimation.time import GPU_RATES
from pyprune.job.config import PruneConfig
from pyprune.methods import METHODS, make_method
from pyprune.passes import PASSES
from pyprune.pipeline.run import prune
from pyprune.runtime.device import check_room, memory_limit

SHAPES = {
    "llama-2-13b": [LayerShape(5120, 128, 40, 1, 13824)] * 40,
    "llama-3.3-70b": [LayerShape(8192, 128, 8, 8, 28672)] * 80,
}
RUNS = sorted((ROOT / "benchmarks" / "results").glob("end-to-end-*.json"))


def sizes(shape: str, method: str, samples: int = 128, ratio: float = 0.2, processes: int = 1) -> Sizes:
    return Sizes(SHAPES[shape], make_method(method, {}), ratio, samples, 2048, 2, 2, processes)


@pytest.mark.parametrize("method", ["flap", "wanda-sp", "slimgpt", "obs", "magnitude"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_smaller_budget_is_kept_or_refused(shape: str, method: str) -> None:
    whole = plan_memory(sizes(shape, method), int(140e9))
    assert whole.host_bytes == 0
    peaks = [whole.peak]
    fits = True
    for gigabytes in (40, 24, 16, 12, 8, 6, 4, 2, 1):
        budget = int(gigabytes * 1e9)
        if fits:
            try:
                plan = plan_memory(sizes(shape, method), budget)
                assert plan.peak <= budget
                assert 1 <= plan.batch <= whole.batch
                peaks.append(plan.peak)
            except InputError:
                fits = False
        if not fits:  # and no smaller one does
            with pytest.raises(InputError, match="--device-memory"):
                plan_memory(sizes(shape, method), budget)
    assert not fits
    assert peaks == sorted(peaks, reverse=True)


def test_a_run_that_began_goes_on_with_its_batches() -> None:
    """Less memory than at first: hidden states move, batches stay, since sums over others round otherwise."""
    model = sizes("llama-3.3-70b", "obs")
    roomy = plan_memory(model, int(140e9))
    budgets = [int(gigabytes * 1e9) for gigabytes in range(18, 30)]
    assert any(plan_memory(model, budget).batch < roomy.batch for budget in budgets)
    assert all(plan_memory(model, budget, roomy.batch).batch == roomy.batch for budget in budgets)
    with pytest.raises(InputError, match="batches of 8 windows that the run began with"):
        plan_memory(model, int(8e9), roomy.batch)


def test_two_processes_need_less_each() -> None:
    one, two = (plan_memory(sizes("llama-2-13b", "obs", processes=n), int(140e9)) for n in (1, 2))
    assert two.peak < one.peak


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_predictions_of_measured_runs(file: Path) -> None:
    """Memory within 15 %, seconds of a pass within 30 %, for runs on an H200 that waited for no disk."""
    measured = json.loads(file.read_text())
    if measured["machine"].get("gpu") != "NVIDIA H200":
        pytest.skip("another device")
    shape = [SHAPES[measured["shape"]][0]] * measured["sizes"]["layers"]
    method = make_method(measured["method"], {})
    run_sizes = Sizes(shape, method, measured["ratio"], measured["samples"], measured["sequence_length"], 2, 2)
    budget = int((measured["device_memory_gb"] or 140) * 1e9)
    peak = measured["peak_memory"]["device_reserved_bytes"]
    assert plan_memory(run_sizes, budget).peak == pytest.approx(peak, rel=0.15)
    if measured["source"] == "generated":
        for name, cost in costs_of(run_sizes).items():
            seconds, own = cost.seconds(GPU_RATES["h200"]), measured["passes"][name]
            if not seconds:  # a pass without a forward
                continue
            warm = own["seconds"] - own["layers"][0]["seconds"]  # the first layer loads the kernels
            assert seconds * (len(shape) - 1) / len(shape) == pytest.approx(warm, rel=0.3), name


@pytest.mark.parametrize("method", ["flap", "wanda-sp", "slimgpt", "obs", "magnitude"])
def test_a_gpu_that_is_not_here(method: str, tiny_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader(tiny_checkpoint())
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    result = estimate(reader, make_method(method, {}), 0.3, 16, 64, cpu, dtype, named="h200")
    assert result.device == "h200"
    assert result.peak_memory_bytes > 0
    assert result.bytes_read in (reader.bytes, 2 * reader.bytes)
    assert all(own["seconds"] >= 0 for own in result.passes)
    slower = estimate(reader, make_method(method, {}), 0.3, 16, 64, cpu, dtype, named="a100")
    assert slower.peak_memory_bytes == result.peak_memory_bytes


def test_flops_of_a_survey_on_fewer_windows() -> None:
    shapes = SHAPES["llama-2-13b"][:2]
    few, all_ = (
        costs_of(Sizes(shapes, make_method("obs", {"allocation_samples": n}), 0.2, 128, 64, 2, 2)) for n in (32, 500)
    )
    assert few["calibration"].flops() == pytest.approx(all_["calibration"].flops() / 4)
    assert few["prune"].flops() == all_["prune"].flops()


def test_every_procedure_has_passes_and_costs() -> None:
    assert PASSES.keys() == PROCEDURES.keys() == {method.procedure for method in METHODS.values()}


def test_sizes_on_the_command_line(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", demo_model, "--ratio", 0.3, "--method", "obs", "--json")
    for size in ("2GB", "2000 MB", "2000000000"):
        result = run(capsys, *plan, "--on", "h200", "--device-memory", size)
        assert result.status == 0, result.err
    small = run(capsys, *plan, "--on", "h200", "--device-memory", "20MB")
    assert (small.status, "device memory" in small.err) == (2, True)
    wrong = run(capsys, *plan, "--on", "h200", "--device-memory", "much")
    assert (wrong.status, "no size" in wrong.err) == (2, True)
    here = run(capsys, *plan, "--device", "cpu", "--device-memory", "2GB")
    assert (here.status, "--on" in here.err) == (2, True)
    pruned = run(capsys, "prune", demo_model, tmp_path / "out", "--method", "flap", "--ratio", 0.3, "--device", "cpu",
                "--device-memory", "2GB", "--calibration", "self")  # fmt: skip
    assert (pruned.status, "CUDA" in pruned.err) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["flap", "slimgpt", "obs"])
def test_a_run_stays_in_its_budget(method: str, demo_model: Path, tmp_path: Path) -> None:
    """PyTorch is held to the budget meanwhile: one byte beyond it would end the run."""
    held = torch.cuda.memory_allocated()  # by other tests
    record = prune(limited(method, demo_model, tmp_path))
    assert 0 < record.peak_memory_bytes - held <= BUDGET


BUDGET = 400 * 10**6


def limited(method: str, model: Path, folder: Path, budget: int | None = BUDGET) -> PruneConfig:
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4000)
    return PruneConfig(
        str(model), folder / "out", method, 0.3, {}, str(text), 64, 256, device="cuda", device_memory=budget
    )


class Cycle:
    """A tensor that only the collector of cycles frees."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.own = x, self


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["flap", "slimgpt", "obs"])
def test_a_run_stays_in_its_budget_beside_tensors_of_the_caller(method: str, demo_model: Path, tmp_path: Path) -> None:
    """He holds more than the budget, and pieces of a cache of several times as much; all of his tensors stay."""
    large = torch.full((150, 10**6), 7.0, device="cuda")
    pieces = [torch.full((sizes,), 3.0, device="cuda") for sizes in (1000, 400_000, 3_000_000) for _ in range(100)]
    Cycle(torch.empty(10**9, dtype=torch.uint8, device="cuda"))
    del pieces[::2]
    fraction = torch.cuda.get_per_process_memory_fraction()
    gc.collect()
    torch.cuda.empty_cache()
    held, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    Cycle(torch.empty(10**9, dtype=torch.uint8, device="cuda"))
    torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda")  # in the cache from here on
    assert torch.cuda.memory_reserved() >= held + 2 * 10**9
    record = prune(limited(method, demo_model, tmp_path))
    assert torch.cuda.max_memory_reserved() <= held + BUDGET  # since the last layer began
    assert 0 < record.peak_memory_bytes - allocated <= BUDGET
    assert torch.cuda.get_per_process_memory_fraction() == fraction
    assert (large == 7).all()
    assert all((piece == 3).all() for piece in pieces)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [BUDGET, None])
def test_a_run_that_does_not_fit_beside_tensors_of_the_caller(
    budget: int | None, demo_model: Path, tmp_path: Path
) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.empty(torch.cuda.mem_get_info()[0] - (100 << 20), dtype=torch.uint8, device="cuda")
    options = limited("obs", demo_model, tmp_path, budget)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="free beside the .* GB that this process holds" if budget else "too few"):
        prune(options)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != ".pyprune-cache"] == before
    del held
    assert prune(options).peak_memory_bytes > 0


@pytest.mark.gpu
def test_the_limit_is_what_the_run_gets() -> None:
    """On top of what is held, to a segment; and the caller's own limit is back afterwards, after an error too."""
    cuda = torch.device("cuda", 0)
    kept = torch.ones(50 << 20, device=cuda)
    own = torch.cuda.get_per_process_memory_fraction(cuda)
    for size in (90 << 20, 110 << 20):
        with memory_limit(cuda, 100 << 20):
            if size < 100 << 20:
                torch.empty(size, dtype=torch.uint8, device=cuda)
            else:  # what is held may have room within its segments
                room = torch.cuda.memory_reserved(cuda) - torch.cuda.memory_allocated(cuda)
                with pytest.raises(torch.OutOfMemoryError):
                    torch.empty(size + room, dtype=torch.uint8, device=cuda)
        assert torch.cuda.get_per_process_memory_fraction(cuda) == own
    assert kept.sum() == kept.numel()


@pytest.mark.parametrize(
    ("limit", "held", "free", "fits"),
    [(4, 0, 8, True), (4, 70, 8, True), (8, 70, 8, True), (9, 70, 8, False), (78, 70, 8, False), (85, 70, 8, True),
     (85, 0, 79, True)],
)  # fmt: skip
def test_what_is_asked_for_beside_what_is_held(limit: int, held: int, free: int, fits: bool) -> None:
    """In GB. A limit above all that the device has is none; one that the caller's tensors stand in the way of fails."""
    with nullcontext() if fits else pytest.raises(InputError, match=f"{limit}.0 GB.* {free}.0 GB.* {held}.0 GB that"):
        check_room(torch.device("cuda", 0), limit * 10**9, held * 10**9, free * 10**9)
