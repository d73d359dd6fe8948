"""Hessian, H += XᵀX: every backend against what plain PyTorch offers, and the drift of the diagonal.

    python benchmarks/hessian.py [--device cuda] [--shapes 32768x4096 ...] [--sweep] [--output FILE.json]

All contestants run in one process on the same random normal bfloat16 tensor, with cold caches
(pyprune/benchmark/timing.py). Plain PyTorch is the fastest of HALF_WAYS, which keep bfloat16 products in float32.
Others' formulation converts to float32 and multiplies without TF32. A backend is timed only after its result was
compared with float64. TFLOP/s are those of a full product, 2·rows·channels² / time: symmetry shows as a rate above the
hardware's.
"""

import statistics
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from contest import backends_for, contest_parser, prepare_device, random_input, start_report, write_report
from torch import Tensor

from pyprune.benchmark.case import forced
from pyprune.benchmark.cases.hessian import (
    HALF_WAYS,
    Update,
    largest_allowed,
    largest_error,
    update_float32,
    update_mm,
    update_ours,
)
from pyprune.benchmark.timing import Timer, Timing
from pyprune.ops.dispatch import Problem, eligible_backends
from pyprune.ops.hessian import hessian_finish, hessian_update

GPU_SHAPES = [
    "32768x4096",
    "32768x5120",
    "32768x8192",
    "32768x11008",
    "32768x13824",
    "16384x28672",
    "131072x4096",
    "2048x4096",
    "32768x2048",
]
CPU_SHAPES = ["4096x2048"]
# From this size on the targets hold; smaller inputs are reported, and left out of the geometric means.
LARGE_CHANNELS, LARGE_ROWS = 4096, 16384

# A contestant of more than this is repeated only SLOW_REPEAT times: float32 at 28672 channels takes 0.5 s.
SLOW_REPEAT = 3

DRIFT_ROWS, DRIFT_BATCH, DRIFT_CHANNELS = 2**20, 2**15, 4096


def update_tf32(x: Tensor, h: Tensor) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    update_float32(x, h)
    torch.set_float32_matmul_precision(before)


def error_of(x: Tensor, update: Update) -> float:
    h = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    update(x, h)
    return largest_error(x, h)


def correct_error(name: str, x: Tensor, update: Update, float32_error: float) -> float | None:
    """The error of an update; None, said aloud, where it is more than rounding and truncation explain."""
    error = error_of(x, update)
    limit = largest_allowed(float32_error, len(x))
    if not error <= limit:
        print(f"WRONG RESULT, not timed: {name} on {list(x.shape)}: error {error:.1e}, allowed {limit:.1e}")
        return None
    return error


def time_update(x: Tensor, h: Tensor, update: Update, timer: Timer) -> Timing:
    return timer(partial(update, x, h))


def time_plain(x: Tensor, h: Tensor, timer: Timer) -> dict[str, Timing]:
    """Those of HALF_WAYS that this PyTorch has on this device."""
    timings = {}
    for name, update in HALF_WAYS.items():
        try:
            update(x, h)
        except (RuntimeError, TypeError) as error:
            print(f"not in this PyTorch on {x.device.type}: {name} ({str(error).split('. ')[0]})")
            continue
        timings[name] = time_update(x, h, update, timer)
    return timings


def time_finish(h: Tensor, timer: Timer) -> tuple[Timing, float]:
    """Completing H, and the bytes a second that are read (one triangle) and written (the other one)."""
    timing = timer(lambda: hessian_finish(h, None, 1))
    return timing, h.nbytes / (timing.median * 1e-6)


def run(shapes: list[str], device: torch.device, timer: Timer, slow: Timer) -> tuple[list[dict[str, Any]], bool]:
    """One result for each shape and correct backend, printed as it comes; whether all were correct."""
    results = []
    all_correct = True
    for shape in shapes:
        x = random_input(shape, device)
        channels = x.shape[1]
        h = torch.zeros(channels, channels, device=device)
        float32 = time_update(x, h, update_float32, slow)
        tf32 = time_update(x, h, update_tf32, slow)
        plain = time_plain(x, h, timer)
        best = min(plain, key=lambda name: plain[name].median, default=None)
        float32_error = error_of(x, update_float32)
        finish, finish_rate = time_finish(h, slow)
        sums = torch.zeros(channels, device=device)
        shape_results = []
        for name in backends_for("hessian", x):
            with forced(name):
                error = correct_error(name, x, update_ours, float32_error)
                if error is None:
                    all_correct = False
                    continue
                timing = time_update(x, h, update_ours, timer)
                with_sums = timer(partial(hessian_update, x, h, sums))
            shape_results.append(
                {
                    "shape": list(x.shape),
                    "dtype": "bfloat16",
                    "backend": name,
                    "microseconds": asdict(timing),
                    "microseconds_with_sums": asdict(with_sums),
                    "teraflops": teraflops(x, timing),
                    "times_plain": plain[best].median / timing.median if best else None,
                    "times_float32": float32.median / timing.median,
                    "times_tf32": tf32.median / timing.median,
                    "error": error,
                    "error_float32": float32_error,
                    "plain": {way: asdict(way_timing) for way, way_timing in plain.items()},
                    "best_plain": best,
                    "float32": asdict(float32),
                    "tf32": asdict(tf32),
                    "finish": asdict(finish) | {"gigabytes_per_second": finish_rate * 1e-9},
                    "large": channels >= LARGE_CHANNELS and len(x) >= LARGE_ROWS,
                }
            )
        print_shape(x, plain, float32, tf32, finish, finish_rate, shape_results)
        results += shape_results
    return results, all_correct


def teraflops(x: Tensor, timing: Timing) -> float:
    return 2 * len(x) * x.shape[1] ** 2 / timing.median * 1e-6


def print_shape(
    x: Tensor,
    plain: dict[str, Timing],
    float32: Timing,
    tf32: Timing,
    finish: Timing,
    finish_rate: float,
    results: list[dict[str, Any]],
) -> None:
    print(f"\n{len(x)} x {x.shape[1]}")
    for name, timing in {"float32": float32, "TF32": tf32, **plain}.items():
        print(f"  {name:<50} {timing.median:10.1f} us {teraflops(x, timing):6.4g} TFLOP/s")
    print(f"  {'finish':<50} {finish.median:10.1f} us {finish_rate * 1e-9:6.4g} GB/s")
    for result in results:
        time_us = result["microseconds"]
        times_plain = f"{result['times_plain']:.2f} x plain | " if result["best_plain"] else ""
        print(
            f"  {result['backend']:<50} {time_us['median']:10.1f} us {result['teraflops']:6.4g} TFLOP/s | "
            f"{times_plain}{result['times_float32']:.1f} x float32 | {result['times_tf32']:.1f} x TF32 | "
            f"with sums {result['microseconds_with_sums']['median']:.1f} us | host {time_us['host']:.0f} us | "
            f"error {result['error']:.1e}   ({time_us['low']:.1f} to {time_us['high']:.1f})"
        )


def print_geometric_means(results: list[dict[str, Any]]) -> None:
    for backend in dict.fromkeys(result["backend"] for result in results):
        chosen = [result for result in results if result["backend"] == backend and result["large"]]
        chosen = [result for result in chosen if result["times_plain"] is not None]
        if chosen:
            plain, float32, rate = (
                statistics.geometric_mean(result[measure] for result in chosen)
                for measure in ("times_plain", "times_float32", "teraflops")
            )
            worst = min(result["times_plain"] for result in chosen)
            print(
                f"geometric mean of {len(chosen)} large shapes, {backend}: {rate:.0f} TFLOP/s, {plain:.2f} x plain "
                f"PyTorch (at least {worst:.2f}), {float32:.1f} x float32"
            )


def measure_drift(device: torch.device) -> dict[str, float]:
    """mean(diag(H) / exact − 1) after 1 M rows in updates of 32768, of each backend, float32 and bfloat16 mm."""
    contestants: dict[str, tuple[str | None, Update]] = {
        "float32": (None, update_float32),
        "h += mm(out_dtype=float32)": (None, update_mm),
    }
    for name in eligible_backends("hessian", Problem(device, torch.bfloat16, (DRIFT_BATCH, DRIFT_CHANNELS))):
        if name != "reference":
            contestants[name] = (name, update_ours)
    states = {name: torch.zeros(DRIFT_CHANNELS, DRIFT_CHANNELS, device=device) for name in contestants}
    exact = torch.zeros(DRIFT_CHANNELS, dtype=torch.float64, device=device)
    generator = torch.Generator(device).manual_seed(1)
    for _ in range(DRIFT_ROWS // DRIFT_BATCH):
        x = torch.randn(DRIFT_BATCH, DRIFT_CHANNELS, dtype=torch.bfloat16, device=device, generator=generator)
        exact += x.double().square_().sum(0)
        for name, (backend, update) in contestants.items():
            if backend is None:
                update(x, states[name])
            else:
                with forced(backend):
                    update(x, states[name])
    drifts = {name: (h.diagonal().double() / exact - 1).mean().item() for name, h in states.items()}
    print(f"\ndrift of the diagonal over {DRIFT_ROWS} rows x {DRIFT_CHANNELS} in updates of {DRIFT_BATCH}")
    for name, drift in drifts.items():
        print(f"  {name:<50} {drift:+.1e}")
    return drifts


def sweep(shapes: list[str], device: torch.device, timer: Timer) -> tuple[list[dict[str, Any]], bool]:
    """Time the Triton kernel with other configurations, all of which fit sm_90 without spills.

    Also whether all were correct.
    """
    from pyprune.triton_kernels.hessian import TMA, Configuration, hessian_triton

    everything = 1 << 20  # one band: after its first column, row by row
    candidates: list[Configuration] = [
        TMA,
        replace(TMA, stages=5),
        replace(TMA, stages=4),
        replace(TMA, band=8),
        replace(TMA, band=everything),
    ]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    figures = []
    all_correct = True
    for shape in shapes:
        x = random_input(shape, device)
        h = torch.zeros(x.shape[1], x.shape[1], device=device)
        float32_error = error_of(x, update_float32)
        print(f"\nTriton configurations at {shape}")
        for candidate in candidates:

            def update(x: Tensor, h: Tensor, candidate: Configuration = candidate) -> None:
                hessian_triton(x, h, None, candidate, multiprocessors)

            if correct_error(str(candidate), x, update, float32_error) is None:
                all_correct = False
                continue
            timing = time_update(x, h, update, timer)
            figures.append({"shape": list(x.shape)} | asdict(candidate) | {"microseconds": asdict(timing)})
            print(
                f"  stages {candidate.stages} band {candidate.band:<8} {timing.median:10.1f} us "
                f"{teraflops(x, timing):6.4g} TFLOP/s"
            )
    return figures, all_correct


def main() -> None:
    parser = contest_parser(__doc__, repeat="15 on a GPU, 3 on a CPU")
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCHANNELS")
    parser.add_argument("--sweep", action="store_true", help="also time other Triton configurations")
    arguments = parser.parse_args()

    device = prepare_device(arguments)
    on_gpu = device.type == "cuda"
    if arguments.sweep and not on_gpu:
        parser.error("--sweep needs --device cuda")
    repeat = arguments.repeat or (15 if on_gpu else 3)
    shapes = arguments.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    report = start_report(device, repeat)
    timer = Timer(device, repeat)
    slow = copy(timer)
    slow.repeat = SLOW_REPEAT
    report["results"], all_correct = run(shapes, device, timer, slow)
    print_geometric_means(report["results"])
    write_report(report, arguments.output)
    if on_gpu:
        report["drift"] = measure_drift(device)
        write_report(report, arguments.output)
    if arguments.sweep:
        report["sweep"], sweep_correct = sweep(shapes, device, slow)
        all_correct &= sweep_correct
        write_report(report, arguments.output)
    if not all_correct:
        raise SystemExit("a result was wrong, see above")


if __name__ == "__main__":
    main()
