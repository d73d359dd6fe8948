"""Greedy elimination: choosing channels one by one, exactly, against SlimGPT's loop for the same size and count.

    python benchmarks/eliminate.py [--device cuda] [--shapes 11008@0.2 ...] [--output FILE.json]

A shape is CHANNELS@SHARE, the share of the channels that is removed. First every backend's choice at 2048 channels is
compared with that of a float64 elimination: the exact errors of the two sets, in float64. Then all contestants run in
one process on the same Hessian, inverse and weight.

ours       G = WᵀW, the elimination, and the refit, each timed apart and as medians; the panel kernels alone as well.
slimgpt    the loop of arXiv 2412.18110 with its dynamic groups, in plain PyTorch, run once: each step removes the
           columns of smallest ‖W_j‖²/A_jj, updates W, and inverts the Hessian of the others by Cholesky. From
           EXTRAPOLATE_FROM channels on three of its steps are timed and the others interpolated; the JSON says so.

Both start from the same first inverse, which is timed too: `ratio` leaves it out on both sides, `ratio_with_inverse`
counts it on both.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from contest import contest_parser, prepare_device, start_report, write_report
from torch import Tensor

from pyprune.benchmark.case import forced
from pyprune.benchmark.cases.slimgpt import SlimGpt, group_sizes, inverse
from pyprune.ops.dispatch import Problem, eligible_backends
from pyprune.ops.eliminate import Elimination, EliminationState, Panel, eliminate, refit

GPU_SHAPES = ["11008@0.2", "11008@0.5", "28672@0.2", "4096@0.5"]
CPU_SHAPES = ["1024@0.2", "2048@0.2"]
CHECKED_CHANNELS = 2048
CHECKED_SHARES = (0.2, 0.5)
SET_TOLERANCE = 1.001  # error of a float32 choice / error of float64's: the tests' bound
REFERENCE_CHANNELS = 4096  # the reference is timed up to here: it launches some twenty kernels a removal
EXTRAPOLATE_FROM = 16384


class Clock:
    """Seconds of single calls on one device; nothing else runs meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        before.record()
        call()
        after.record()
        torch.cuda.synchronize(self.device)
        return before.elapsed_time(after) * 1e-3


def random_problem(channels: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A damped Hessian [d, d] of channels that share 64 common causes, and a weight [out, d]; float32."""
    generator = torch.Generator(device).manual_seed(channels)
    mixing = torch.randn(64, channels, device=device, generator=generator)
    hessian = torch.zeros(channels, channels, device=device)
    for _ in range(2):
        causes = torch.randn(channels, 64, device=device, generator=generator)
        x = torch.randn(channels, channels, device=device, generator=generator).addmm_(causes, mixing, beta=4)
        hessian.addmm_(x.T, x)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian, torch.randn(outputs, channels, device=device, generator=generator)


def copy_of(matrix: Tensor) -> Tensor:
    """A contiguous copy, to be consumed."""
    return matrix.clone(memory_format=torch.contiguous_format)


def time_slimgpt(hessian: Tensor, first_inverse: Tensor, weight: Tensor, count: int, clock: Clock) -> dict[str, Any]:
    sizes = group_sizes(count)
    facts: dict[str, Any] = {"steps": len(sizes), "extrapolated": len(hessian) >= EXTRAPOLATE_FROM and len(sizes) > 3}
    if not facts["extrapolated"]:
        clock(lambda: inverse(hessian[:1024, :1024]))  # the library's handles and workspaces
        facts["seconds"] = clock(partial(SlimGpt(hessian, first_inverse, weight).run, count))
        return facts
    # Of a step that starts with m channels; those of the steps between are interpolated in m.
    starts = [len(hessian) - sum(sizes[:step]) for step in range(len(sizes))]
    timed = [0, len(sizes) // 2, len(sizes) - 2]
    measured = []
    for step in timed:
        m = starts[step]
        loop = SlimGpt(hessian[:m, :m], first_inverse[:m, :m], weight[:, :m])
        measured.append((m, clock(partial(loop.step, sizes[step], last=False))))
    facts["timed_steps"] = [{"channels": m, "seconds": seconds} for m, seconds in measured]
    facts["seconds"] = sum(interpolate(measured, m) for m in starts[:-1])  # the last one inverts nothing
    return facts


def interpolate(points: list[tuple[int, float]], x: int) -> float:
    """Linear between neighbouring points, which descend in x."""
    pairs = list(pairwise(points))
    upper, lower = next((pair for pair in pairs if x >= pair[1][0]), pairs[-1])
    return lower[1] + (upper[1] - lower[1]) * (x - lower[0]) / (upper[0] - lower[0])


def set_error(hessian: Tensor, weight: Tensor, removed: Tensor) -> float:
    """tr(W_S A_SS⁻¹ W_Sᵀ) in float64: the exact error of removing these channels."""
    block = torch.linalg.inv(hessian.double())[removed][:, removed]
    columns = weight.double()[:, removed]
    return (columns * torch.linalg.solve(block, columns.T).T).sum().item()


def check_choices(backends: list[str], device: torch.device) -> tuple[list[dict[str, Any]], bool]:
    """Each backend's set, and SlimGPT's, as error / error of float64's set; whether ours are within the tolerance."""
    hessian, weight = random_problem(CHECKED_CHANNELS, 512, device)
    results, all_correct = [], True
    for share in CHECKED_SHARES:
        count = int(share * CHECKED_CHANNELS)
        exact_inverse = torch.linalg.inv(hessian.double())
        gram = weight.double().T @ weight.double()
        exact = eliminate(copy_of(exact_inverse), gram, count, keep_factor=False)
        best = set_error(hessian, weight, exact.order)
        loop = SlimGpt(hessian, exact_inverse.float(), weight)
        loop.run(count)
        left = torch.ones(CHECKED_CHANNELS, dtype=torch.bool, device=device)
        left[loop.channels] = False
        errors = {"slimgpt": set_error(hessian, weight, left.nonzero().flatten()) / best}
        for backend in backends:
            with forced(backend):
                chosen = eliminate(copy_of(exact_inverse.float()), weight.T @ weight, count, keep_factor=False)
            errors[backend] = set_error(hessian, weight, chosen.order) / best
            if not errors[backend] <= SET_TOLERANCE:
                all_correct = False
                print(f"WRONG CHOICE: {backend} at {CHECKED_CHANNELS}@{share}: {errors[backend]:.4f} x float64's error")
        results.append({"channels": CHECKED_CHANNELS, "share": share, "error_over_float64": errors})
        print(f"error / float64's at {CHECKED_CHANNELS}@{share}: {errors}")
    return results, all_correct


@contextmanager
def panels_timed(clock: Clock) -> Iterator[list[float]]:
    """Collects the seconds of every panel of the eliminations inside, each waited for."""
    module: Any = importlib.import_module("pyprune.ops.eliminate")
    original = module.eliminate_channels
    seconds: list[float] = []

    def eliminate_channels(
        a: Tensor, g: Tensor, count: int, keep_factor: bool, tf32: bool, panel: Panel, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        def timed(
            a: Tensor, g: Tensor, selection: EliminationState, first: int, lower: Tensor, products: Tensor
        ) -> None:
            seconds.append(clock(lambda: panel(a, g, selection, first, lower, products)))

        return original(a, g, count, keep_factor, tf32, timed, size)

    module.eliminate_channels = eliminate_channels
    yield seconds
    module.eliminate_channels = original


def time_backend(
    backend: str, first_inverse: Tensor, weight: Tensor, count: int, clock: Clock, repeat: int
) -> dict[str, float]:
    """Medians, in seconds, of what follows the inverse: Gram matrix, elimination, refit; the panels in one run more."""
    a, g = (torch.empty(first_inverse.shape, device=first_inverse.device) for _ in range(2))
    result: list[Elimination] = []

    def choose() -> None:
        result[:] = [eliminate(a, g, count)]

    times: dict[str, list[float]] = {"gram": [], "eliminate": [], "refit": []}
    with forced(backend):
        for repetition in range(repeat + 1):
            a.copy_(first_inverse)
            gram = clock(lambda: torch.mm(weight.T, weight, out=g))
            seconds = {"gram": gram, "eliminate": clock(choose), "refit": clock(lambda: refit(weight, result[0]))}
            if repetition:  # the first one warms up
                for name, value in seconds.items():
                    times[name].append(value)
        a.copy_(first_inverse)
        torch.mm(weight.T, weight, out=g)
        with panels_timed(clock) as panels:
            choose()
    return {name: statistics.median(values) for name, values in times.items()} | {"panels": sum(panels)}


def run(shapes: list[str], device: torch.device, repeat: int) -> tuple[dict[str, Any], bool]:
    clock = Clock(device)
    problem = Problem(device, torch.float32, None)
    eligible = eligible_backends("eliminate", problem)
    choices, all_correct = check_choices(eligible, device)
    print(f"{'shape':>10} {'backend':>10} | eliminate s | us/pivot | panels us/pivot | gram s | refit s | x SlimGPT")
    results = []
    for shape in shapes:
        channels, share = int(shape.split("@")[0]), float(shape.split("@")[1])
        count = int(share * channels)
        hessian, weight = random_problem(channels, 8192 if channels > 16384 else 4096, device)
        inverse(hessian)
        first_inverse = inverse(hessian)
        first_seconds = clock(lambda hessian=hessian: inverse(hessian))
        slimgpt = time_slimgpt(hessian, first_inverse, weight, count, clock)
        del hessian
        for backend in eligible:
            if backend == "reference" and channels > REFERENCE_CHANNELS:
                continue
            seconds = time_backend(backend, first_inverse, weight, count, clock, repeat)
            whole = seconds["gram"] + seconds["eliminate"] + seconds["refit"]
            result = {
                "channels": channels,
                "count": count,
                "outputs": len(weight),
                "backend": backend,
                "seconds": seconds,
                "microseconds_per_pivot": seconds["eliminate"] / count * 1e6,
                "panel_microseconds_per_pivot": seconds["panels"] / count * 1e6,
                "inverse_seconds": first_seconds,
                "slimgpt": slimgpt,
                "ratio": slimgpt["seconds"] / whole,
                "ratio_with_inverse": (slimgpt["seconds"] + first_seconds) / (whole + first_seconds),
            }
            results.append(result)
            print(line(shape, result))
        del first_inverse, weight
    return {"choices": choices, "results": results}, all_correct


def line(shape: str, result: dict[str, Any]) -> str:
    seconds, slimgpt = result["seconds"], result["slimgpt"]
    return (
        f"{shape:>10} {result['backend']:>10} | {seconds['eliminate']:11.4f} | "
        f"{result['microseconds_per_pivot']:8.1f} | {result['panel_microseconds_per_pivot']:15.1f} | "
        f"{seconds['gram']:6.4f} | {seconds['refit']:7.4f} | {result['ratio']:6.1f} "
        f"({result['ratio_with_inverse']:.1f} with the inverse, {result['inverse_seconds']:.3f} s; "
        f"SlimGPT {slimgpt['seconds']:.3f} s in {slimgpt['steps']} steps{', extrapolated' * slimgpt['extrapolated']})"
    )


def main() -> None:
    parser = contest_parser(__doc__, repeat="5, of ours")
    parser.add_argument("--shapes", nargs="+", metavar="CHANNELS@SHARE")
    arguments = parser.parse_args()

    device = prepare_device(arguments)
    repeat = arguments.repeat or 5
    report = start_report(device, repeat)
    shapes = arguments.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    figures, all_correct = run(shapes, device, repeat)
    write_report(report | figures, arguments.output)
    if not all_correct:
        raise SystemExit("a choice was wrong, see above")


if __name__ == "__main__":
    main()
