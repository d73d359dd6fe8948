"""The errors of removing single units: one launch against Cholesky, triangular solve and norm from the library.

    python benchmarks/grouped_cholesky.py [--device cuda] [--shapes 32x128 64x128 ...] [--output FILE.json]

Shapes are units x width. Contestants, in one process on the same tensors: the operator; what people do, torch's batched
Cholesky of the diagonal blocks of A, a triangular solve against W [units, width, out] and the norm; the strongest plain
PyTorch of three that use the diagonal blocks of G = WᵀW (not timed: it is made once and used for every choice).
The operator is timed only after its result was compared with float64.
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

from pyprune.benchmark.cases.grouped_cholesky import ROUNDINGS, Units
from pyprune.benchmark.machine import describe_machine
from pyprune.benchmark.timing import Timer
from pyprune.ops import grouped_cholesky_errors, grouped_cholesky_errors_reference
from pyprune.ops.dispatch import choose_backend
from pyprune.ops.grouped_cholesky import OPERATOR

GPU_SHAPES = ["32x128", "64x128", "8x256", "8x1024"]
CPU_SHAPES = ["32x128", "8x256"]
OUT_CHANNELS = 4096
STRONGEST = ("solve_against_g", "inverse_factors", "inverse_factors_singly")


class Problem(Units):
    """The rivals of pyprune.benchmark on one problem, and the operator with the diagonal of G alone."""

    def __init__(self, units: int, width: int, device: torch.device) -> None:
        super().__init__(units, width, OUT_CHANNELS, device)

    def operator_diagonal(self) -> Tensor:
        return grouped_cholesky_errors(self.a, self.g, self.width, True)

    def fault(self) -> str | None:
        """What is wrong: an error above twice the strongest PyTorch's in float32, and ROUNDINGS."""
        for call, reference, diagonal in (
            (self.operator, self.solve_products, False),
            (self.operator_diagonal, lambda: grouped_cholesky_errors_reference(self.a, self.g, self.width, True), True),
        ):
            exact = grouped_cholesky_errors_reference(self.a.double(), self.g.double(), self.width, diagonal)
            error, limit = ((result() / exact - 1).abs().max().item() for result in (call, reference))
            if not error <= 2 * limit + ROUNDINGS:
                return f"relative error {error:.1e}, torch {limit:.1e}, diagonal={diagonal}"
        return None


def run(shapes: list[str], device: torch.device, timer: Timer) -> tuple[list[dict[str, Any]], bool]:
    """One result for each shape, printed as it comes; whether all were correct."""
    results, all_correct = [], True
    print(f"{'shape':>9} {'backend':>9} |      us |  diagonal us | x solve against W | x strongest PyTorch | host us")
    for shape in shapes:
        units, width = (int(size) for size in shape.split("x"))
        problem = Problem(units, width, device)
        fault = problem.fault()
        if fault is not None:
            print(f"WRONG RESULT, not timed: {shape}: {fault}")
            all_correct = False
            continue
        contestants: dict[str, Callable[[], Tensor]] = {
            "operator": problem.operator,
            "operator_diagonal": problem.operator_diagonal,
            "solve_against_w": problem.solve_weights,
            "solve_against_g": problem.solve_products,
            "inverse_factors": problem.invert_factors,
            "inverse_factors_singly": problem.invert_factors_singly,
        }
        timings = {name: timer(call) for name, call in contestants.items()}
        strongest = min(STRONGEST, key=lambda name: timings[name].median)
        own = timings["operator"]
        result = {
            "units": units,
            "width": width,
            "out_channels": OUT_CHANNELS,
            "dtype": "float32",
            "backend": choose_backend(OPERATOR, problem.a, (units, width)),
            "microseconds": {name: asdict(timing) for name, timing in timings.items()},
            "times_solve_against_w": timings["solve_against_w"].median / own.median,
            "strongest_pytorch": strongest,
            "times_strongest_pytorch": timings[strongest].median / own.median,
        }
        results.append(result)
        print(
            f"{shape:>9} {result['backend']:>9} | {own.median:7.1f} | {timings['operator_diagonal'].median:12.1f} | "
            f"{result['times_solve_against_w']:17.1f} | {result['times_strongest_pytorch']:19.1f} | {own.host:7.1f}"
        )
        print(" " * 10 + ", ".join(f"{name} {timings[name].median:.1f} us" for name in STRONGEST))
    return results, all_correct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", metavar="UNITSxWIDTH")
    parser.add_argument("--repeat", type=int, help="repetitions (default 50 on a GPU, 3 on a CPU)")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU (default 2)")
    parser.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(arguments.threads)
    repeat = arguments.repeat or (50 if on_gpu else 3)
    machine = describe_machine(device)
    print(json.dumps(machine))
    shapes = arguments.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    results, all_correct = run(shapes, device, Timer(device, repeat))
    kernel = [result for result in results if result["backend"] != "reference"]
    if kernel:
        means = [
            statistics.geometric_mean(result[measure] for result in kernel)
            for measure in ("times_solve_against_w", "times_strongest_pytorch")
        ]
        print(
            f"geometric mean of {len(kernel)} shapes: {means[0]:.1f} x solve against W, "
            f"{means[1]:.1f} x strongest PyTorch"
        )
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine, "repeat": repeat, "results": results}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if not all_correct:
        raise SystemExit("a result was wrong, see above")


if __name__ == "__main__":
    main()
