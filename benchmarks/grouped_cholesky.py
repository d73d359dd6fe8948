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
from machine import describe_machine
from timing import Timer
from torch import Tensor

from pyprune.ops import grouped_cholesky_errors, grouped_cholesky_errors_reference
from pyprune.ops.backends import choose_backend
from pyprune.ops.grouped_cholesky import OPERATOR, diagonal_blocks

GPU_SHAPES = ["32x128", "64x128", "8x256", "8x1024"]
CPU_SHAPES = ["32x128", "8x256"]
OUT_CHANNELS = 4096
FP32_UNIT = 2.0**-24
STRONGEST = ("solve_against_g", "inverse_factors", "inverse_factors_singly")


class Problem:
    """A = H^-1 of correlated inputs, H damped by 1 %, and W [units, width, out]; all on one device, float32."""

    def __init__(self, units: int, width: int, device: torch.device) -> None:
        self.units, self.width = units, width
        channels = units * width
        generator = torch.Generator(device).manual_seed(0)
        mix = torch.randn(channels, channels, device=device, generator=generator) / channels**0.5
        x = torch.randn(2 * channels, channels, device=device, generator=generator)
        x += x @ mix
        h = x.T @ x
        h.diagonal().add_(0.01 * h.diagonal().mean())
        self.a = torch.cholesky_inverse(torch.linalg.cholesky(h)).mT.contiguous()
        w = torch.randn(OUT_CHANNELS, channels, device=device, generator=generator)
        self.g = w.T @ w
        self.w = w.T.reshape(units, width, OUT_CHANNELS).contiguous()

    def operator(self) -> Tensor:
        return grouped_cholesky_errors(self.a, self.g, self.width)

    def operator_diagonal(self) -> Tensor:
        return grouped_cholesky_errors(self.a, self.g, self.width, True)

    def solve_weights(self) -> Tensor:
        """‖L^-1 Wᵀ‖² for every unit."""
        factors = torch.linalg.cholesky_ex(diagonal_blocks(self.a, self.width))[0]
        return torch.linalg.solve_triangular(factors, self.w, upper=False).square().sum((1, 2))

    def solve_products(self) -> Tensor:
        """Two triangular solves against G."""
        factors = torch.linalg.cholesky_ex(diagonal_blocks(self.a, self.width))[0]
        return torch.cholesky_solve(diagonal_blocks(self.g, self.width), factors).diagonal(dim1=1, dim2=2).sum(1)

    def invert_factors(self) -> Tensor:
        """Σ G∘(MᵀM), M = L^-1: less work than two solves against G."""
        factors = torch.linalg.cholesky_ex(diagonal_blocks(self.a, self.width))[0]
        identity = torch.eye(self.width, device=self.a.device).expand_as(factors)
        inverse = torch.linalg.solve_triangular(factors, identity, upper=False)
        return (diagonal_blocks(self.g, self.width) * (inverse.mT @ inverse)).sum((1, 2))

    def invert_factors_singly(self) -> Tensor:
        """The same, one unit after the other: the batched factorisation is made for small matrices."""
        identity = torch.eye(self.width, device=self.a.device)
        errors = []
        for a, g in zip(diagonal_blocks(self.a, self.width), diagonal_blocks(self.g, self.width), strict=True):
            factor = torch.linalg.cholesky_ex(a)[0]
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            errors.append((g * (inverse.mT @ inverse)).sum())
        return torch.stack(errors)

    def fault(self) -> str | None:
        """What is wrong: an error above twice the strongest PyTorch's in float32 + 4 roundings."""
        for call, reference, diagonal in (
            (self.operator, self.solve_products, False),
            (self.operator_diagonal, lambda: grouped_cholesky_errors_reference(self.a, self.g, self.width, True), True),
        ):
            exact = grouped_cholesky_errors_reference(self.a.double(), self.g.double(), self.width, diagonal)
            error, limit = ((result() / exact - 1).abs().max().item() for result in (call, reference))
            if not error <= 2 * limit + 4 * FP32_UNIT:
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
