"""Channel moments: every backend against torch.var_mean, FLAP's formulation and a device copy.

    python benchmarks/moments.py [--device cuda] [--shapes 65536x4096 ...] [--sweep] [--output FILE.json]

All contestants run in one process on the same random normal bfloat16 tensor. A backend is timed only after
its result was compared with float64. Before each repetition the caches are filled by reading a large buffer:
x is then cold, and no dirty line waits to be written back at the contestant's expense. Device times come from
CUDA events, enqueued while the buffer is still being read, which hides the host's work; that is reported
apart (`host us`).
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from contest import (
    backends_for,
    contest_parser,
    prepare_device,
    random_input,
    sizes_of,
    start_report,
    write_report,
)
from torch import Tensor

from pyprune.benchmark.case import forced
from pyprune.benchmark.cases.channel_moments import ROUNDINGS, Flap, largest_errors, var_mean
from pyprune.benchmark.timing import Timer, Timing
from pyprune.ops import channel_moments_update

GPU_SHAPES = ["65536x4096", "262144x4096", "65536x11008", "32768x28672", "2048x4096", "37x1000"]
CPU_SHAPES = ["8192x4096"]
# From this size on the targets hold; smaller inputs are reported, and left out of the geometric means.
LARGE_BYTES = 256 * 2**20

# (rows before, mean, M2) -> None: one update with the rows of an x that is already bound
Update = Callable[[int, Tensor, Tensor], None]


def fault_of(x: Tensor, update: Update) -> str | None:
    """What is wrong with the first call: an error above twice torch.var_mean's in float32, and ROUNDINGS."""
    mean, m2 = torch.zeros(2, x.shape[1], device=x.device)
    update(0, mean, m2)
    limits = largest_errors(x, *var_mean(x.float()))
    for what, error, limit in zip(("mean", "M2"), largest_errors(x, mean, m2), limits, strict=True):
        if not error <= 2 * limit + ROUNDINGS:
            return f"error of {what} {error:.1e}, torch.var_mean {limit:.1e}"
    return None


def time_correct(name: str, x: Tensor, update: Update, timer: Timer) -> Timing | None:
    """The time of an update into a running state; None, said aloud, where the result is wrong."""
    fault = fault_of(x, update)
    if fault is not None:
        print(f"WRONG RESULT, not timed: {name} on {list(x.shape)}: {fault}")
        return None
    mean, m2 = torch.zeros(2, x.shape[1], device=x.device)
    return timer(partial(update, len(x), mean, m2))


def time_backend(name: str, x: Tensor, timer: Timer) -> Timing | None:
    with forced(name):
        return time_correct(name, x, partial(channel_moments_update, x), timer)


def time_var_mean(x: Tensor, timer: Timer) -> tuple[str, Timing]:
    """The faster of the two ways to call it: on x (which rounds the result to x's dtype) and on x.float()."""
    ways = {
        f"var_mean({str(x.dtype).removeprefix('torch.')})": timer(lambda: torch.var_mean(x, dim=0)),
        "var_mean(float32)": timer(lambda: torch.var_mean(x.float(), dim=0)),
    }
    return min(ways.items(), key=lambda way: way[1].median)


def time_flap(x: Tensor, timer: Timer) -> Timing:
    """The faster of FLAP's formulation on x transposed, as its authors have it, and on x as it lies."""
    return min((timer(partial(Flap(x, way).update, x)) for way in (True, False)), key=lambda way: way.median)


def copy_bandwidth(x: Tensor, timer: Timer) -> tuple[Timing, float]:
    """A copy of x, and its bytes a second, read and written."""
    target = torch.empty_like(x)
    timing = timer(lambda: target.copy_(x))
    return timing, 2 * x.nbytes / (timing.median * 1e-6)


def run(shapes: list[str], device: torch.device, timer: Timer) -> tuple[list[dict[str, Any]], bool]:
    """One result for each shape and correct backend, printed as it comes; whether all were correct."""
    results = []
    all_correct = True
    print(f"{'shape':>14} {'backend':>10} |       us |  GB/s | % of copy | x var_mean | x FLAP | host us")
    for shape in shapes:
        x = random_input(shape, device)
        copy, bandwidth = copy_bandwidth(x, timer)
        var_mean_name, var_mean = time_var_mean(x, timer)
        flap = time_flap(x, timer)
        for name in backends_for("channel_moments", x):
            timing = time_backend(name, x, timer)
            if timing is None:
                all_correct = False
                continue
            rate = x.nbytes / (timing.median * 1e-6)
            result = {
                "shape": list(x.shape),
                "dtype": "bfloat16",
                "backend": name,
                "microseconds": asdict(timing),
                "gigabytes_per_second": rate * 1e-9,
                "fraction_of_copy": rate / bandwidth,
                "times_var_mean": var_mean.median / timing.median,
                "times_flap": flap.median / timing.median,
                "var_mean": {"call": var_mean_name, **asdict(var_mean)},
                "flap": asdict(flap),
                "copy": asdict(copy),
                "large": x.nbytes >= LARGE_BYTES,
            }
            results.append(result)
            print(line(shape, name, result))
    return results, all_correct


def line(shape: str, name: str, result: dict[str, Any]) -> str:
    time_us = result["microseconds"]
    return (
        f"{shape:>14} {name:>10} | {time_us['median']:8.1f} | {result['gigabytes_per_second']:5.0f} | "
        f"{result['fraction_of_copy']:9.1%} | {result['times_var_mean']:10.2f} | {result['times_flap']:6.1f}"
        f" | {time_us['host']:7.1f}   ({time_us['low']:.1f} to {time_us['high']:.1f})"
    )


def print_geometric_means(results: list[dict[str, Any]]) -> None:
    measures = ("fraction_of_copy", "times_var_mean", "times_flap")
    for backend in dict.fromkeys(result["backend"] for result in results):
        chosen = [result for result in results if result["backend"] == backend and result["large"]]
        if chosen:
            means = (statistics.geometric_mean(result[measure] for result in chosen) for measure in measures)
            copy, var_mean, flap = means
            print(
                f"geometric mean of {len(chosen)} large shapes, {backend}: "
                f"{copy:.1%} of copy, {var_mean:.2f} x var_mean, {flap:.1f} x FLAP"
            )


def sweep(shapes: list[str], device: torch.device, timer: Timer) -> tuple[list[dict[str, Any]], bool]:
    """Time the Triton kernels with other configurations, all of which fit sm_90 without spills; best last.

    Also whether all were correct.
    """
    from pyprune.triton_kernels.channel_moments import (
        Configuration,
        channel_moments_triton,
        shipped_configuration,
    )

    capability = torch.cuda.get_device_capability(device)
    table = shipped_configuration(capability, torch.bfloat16.itemsize)
    early = capability >= (9, 0)
    tiles = [
        Configuration(8, 1024, warps=4, stages=4, resident=4, waves=1, early_merge=early),
        Configuration(8, 1024, warps=4, stages=4, resident=3, waves=1, early_merge=early),
        Configuration(8, 1024, warps=4, stages=1, resident=5, waves=1, early_merge=early),
        Configuration(8, 512, warps=2, stages=4, resident=8, waves=1, early_merge=early),
        Configuration(4, 1024, warps=4, stages=6, resident=5, waves=1, early_merge=early),
        Configuration(16, 512, warps=2, stages=1, resident=6, waves=1, early_merge=early),
    ]
    candidates = [replace(tile, waves=waves) for tile in tiles for waves in (1, 2, 4)]
    candidates += [replace(tile, early_merge=False) for tile in tiles[:3] if early]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    fractions: dict[Configuration, list[float]] = {candidate: [] for candidate in candidates}
    for shape in shapes:
        x = random_input(shape, device)
        _, bandwidth = copy_bandwidth(x, timer)
        for candidate in list(fractions):
            update = partial(channel_moments_triton, x, configuration=candidate, multiprocessors=multiprocessors)
            timing = time_correct(str(candidate), x, update, timer)
            if timing is None:
                fractions.pop(candidate)
            else:
                fractions[candidate].append(x.nbytes / (timing.median * 1e-6) / bandwidth)
    ranked = sorted(fractions, key=lambda candidate: statistics.geometric_mean(fractions[candidate]))
    print(f"\nTriton configurations, fraction of the copy rate at {', '.join(shapes)}, best last")
    for candidate in ranked:
        marker = "  <- the table's" if candidate == table else ""
        percentages = " ".join(f"{fraction:6.1%}" for fraction in fractions[candidate])
        print(
            f"{candidate.tile_rows:>3} x {candidate.tile_channels:<4} warps {candidate.warps} "
            f"stages {candidate.stages} resident {candidate.resident} waves {candidate.waves} "
            f"early merge {candidate.early_merge!s:5} | {percentages}{marker}"
        )
    figures = [asdict(candidate) | {"fraction_of_copy": fractions[candidate]} for candidate in ranked]
    return figures, len(fractions) == len(candidates)


def main() -> None:
    parser = contest_parser(__doc__, repeat="50 on a GPU, 10 on a CPU")
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCHANNELS")
    parser.add_argument("--sweep", action="store_true", help="also time other Triton configurations")
    arguments = parser.parse_args()

    device = prepare_device(arguments)
    on_gpu = device.type == "cuda"
    if arguments.sweep and not on_gpu:
        parser.error("--sweep needs --device cuda")
    repeat = arguments.repeat or (50 if on_gpu else 10)
    shapes = arguments.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    report = start_report(device, repeat)
    timer = Timer(device, repeat)
    report["results"], all_correct = run(shapes, device, timer)
    print_geometric_means(report["results"])
    write_report(report, arguments.output)
    if arguments.sweep:
        large = [shape for shape in shapes if math.prod(sizes_of(shape)) * 2 >= LARGE_BYTES]
        report["sweep"], sweep_correct = sweep(large, device, timer)
        all_correct &= sweep_correct
        write_report(report, arguments.output)
    if not all_correct:
        raise SystemExit("a result was wrong, see above")


if __name__ == "__main__":
    main()
