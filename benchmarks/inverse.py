"""The inverse of a damped Hessian: the sweep against torch's Cholesky factorisation and inverse from it.

    python benchmarks/inverse.py [--device cuda] [--sizes 4096 11008 ...] [--sweep [SWEPT,UPDATED,SPLIT,AHEAD ...]]
        [--output FILE.json]

Both in float32, in one process on the same matrix: XᵀX of correlated inputs, damped by 1 %. Correctness comes first.
Up to --exact-below channels the relative Frobenius errors are taken against the inverse in float64; beyond, where that
would take minutes, ‖(AH − 1)V‖ / ‖V‖ in float64 for 16 random vectors V. The operator may have at most twice the
library's error. Peak memory counts what a call allocates beside the matrix. --sweep also times other blockings, all
of a list or the ones named, e.g. 256,2048,128,1 for Blocking(256, 2048, split=128, look_ahead=True).
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.benchmark.cases.inverse import PROBE_ROWS, PROBES, damped_hessian, product
from pyprune.benchmark.machine import describe_machine
from pyprune.benchmark.timing import Timer
from pyprune.ops.gauss_jordan import BLOCKING, Blocking, inverse_
from pyprune.ops.precision import exact_float32
from pyprune.ops.spd_inverse import shifted, spd_inverse

GPU_SIZES = [4096, 8192, 11008, 13824, 28672]
CPU_SIZES = [1024, 2048]
LARGE = 11008  # from here on the target holds
SLOW = 20000  # larger ones are timed three times
GPU_BLOCKINGS = [
    Blocking(uses_gauss_jordan, updated, split, look_ahead)
    for uses_gauss_jordan in (256, 512)
    for updated in (1024, 2048, 4096)
    for split in (0, 64, 128, 256)
    for look_ahead in (False, True)
    if split or updated == 1024
]
CPU_BLOCKINGS = [Blocking(uses_gauss_jordan, updated) for uses_gauss_jordan in (128, 256) for updated in (256, 1024)]


def library(h: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(h))


def error_against(exact: Tensor) -> Callable[[Tensor], float]:
    norm = exact.norm()
    return lambda a: (
        torch.stack([(x - y).norm() for x, y in zip(a.split(PROBE_ROWS), exact.split(PROBE_ROWS), strict=True)]).norm()
        / norm
    ).item()


def residual_with(h: Tensor) -> Callable[[Tensor], float]:
    generator = torch.Generator(h.device).manual_seed(1)
    v = torch.randn(len(h), PROBES, dtype=torch.float64, device=h.device, generator=generator)
    image = product(h, v)
    return lambda a: ((product(a, image) - v).norm() / v.norm()).item()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call allocates at most beside what is there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def run(
    sizes: list[int], device: torch.device, repeat: int, exact_below: int, others: list[Blocking]
) -> tuple[list[dict[str, Any]], bool]:
    """One result for each size, printed as it comes; whether all were correct."""
    results, all_correct = [], True
    print(f"{'d':>6} |       ms | TFLOP/s |  torch ms |  ratio |   error | torch's |  d² buffers | torch's")
    for d in sizes:
        h = damped_hessian(d, device)
        measure = "error" if d <= exact_below else "residual"
        error_of = error_against(library(h.double())) if measure == "error" else residual_with(h)
        own_error, library_error = error_of(spd_inverse(h, 0.0)[0]), error_of(library(h))
        if not own_error <= 2 * library_error:
            print(f"WRONG RESULT, not timed: {d}: {measure} {own_error:.1e}, torch {library_error:.1e}")
            all_correct = False
            continue
        timer = Timer(device, 3 if d > SLOW else repeat)
        own, other = timer(lambda h=h: spd_inverse(h, 0.0)), timer(lambda h=h: library(h))
        peaks = [peak_bytes(call, device) for call in (lambda h=h: spd_inverse(h, 0.0), lambda h=h: library(h))]
        result: dict[str, Any] = {
            "channels": d,
            "dtype": "float32",
            "microseconds": {"operator": asdict(own), "library": asdict(other)},
            "teraflops": d**3 / own.median * 1e-6,
            "times_library": other.median / own.median,
            measure: {"operator": own_error, "library": library_error},
            "peak_bytes": dict(zip(("operator", "library"), peaks, strict=True)),
            "matrix_bytes": h.nbytes,
        }
        buffers = [" " * 7 if peak is None else f"{peak / h.nbytes:7.2f}" for peak in peaks]
        print(
            f"{d:>6} | {own.median * 1e-3:8.2f} | {result['teraflops']:7.1f} | {other.median * 1e-3:9.2f} | "
            f"{result['times_library']:6.2f} | {own_error:7.1e} | {library_error:7.1e} |     {' | '.join(buffers)}"
        )
        if others:
            result["blocks"] = time_blocks(h, timer, error_of, other.median, others)
        results.append(result)
        del h, error_of
    return results, all_correct


def time_blocks(
    h: Tensor, timer: Timer, error_of: Callable[[Tensor], float], library_median: float, blockings: list[Blocking]
) -> list[dict[str, Any]]:
    """The sweep in other blocks, without the library path for small matrices."""
    rows = []
    for blocking in blockings:
        with exact_float32():
            timing = timer(lambda blocking=blocking: inverse_(shifted(h, 0.0), blocking))
            a = shifted(h, 0.0)
            inverse_(a, blocking)
        error = error_of(a)
        rows.append(asdict(blocking) | {"microseconds": asdict(timing), "error": error})
        marker = "  <- the table's" if BLOCKING.get(h.device.type) == blocking else ""
        print(
            f"       swept {blocking.uses_gauss_jordan:>4} updated {blocking.updated:>4} split {blocking.split:>3} "
            f"ahead {blocking.look_ahead:d}: {timing.median * 1e-3:8.2f} ms, {library_median / timing.median:5.2f} x "
            f"library, error {error:7.1e}{marker}"
        )
    return rows


def blocking_of(text: str) -> Blocking:
    uses_gauss_jordan, updated, split, look_ahead = (int(part) for part in text.split(","))
    return Blocking(uses_gauss_jordan, updated, split, bool(look_ahead))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="CHANNELS")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default 5; 3 above 20000 channels)")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU (default 2)")
    parser.add_argument("--exact-below", type=int, default=11008, help="largest size that is inverted in float64")
    parser.add_argument(
        "--sweep", nargs="*", type=blocking_of, metavar="SWEPT,UPDATED,SPLIT,AHEAD", help="also time other blockings"
    )
    parser.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(arguments.threads)
    machine = describe_machine(device)
    print(json.dumps(machine))
    sizes = arguments.sizes or (GPU_SIZES if on_gpu else CPU_SIZES)
    others = arguments.sweep or (GPU_BLOCKINGS if on_gpu else CPU_BLOCKINGS) if arguments.sweep is not None else []
    results, all_correct = run(sizes, device, arguments.repeat, arguments.exact_below, others)
    large = [result["times_library"] for result in results if result["channels"] >= LARGE]
    if large:
        print(f"geometric mean of {len(large)} sizes from {LARGE} on: {statistics.geometric_mean(large):.2f} x library")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine, "repeat": arguments.repeat, "results": results}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if not all_correct:
        raise SystemExit("a result was wrong, see above")


if __name__ == "__main__":
    main()
