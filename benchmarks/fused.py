"""A decoder layer's elementwise steps, each in one pass: RMSNorm, rotary embedding and SwiGLU against plain PyTorch.

    python benchmarks/fused.py [--device cuda] [--tokens 16384] [--shapes llama-2-13b ...] [--output FILE.json]

Contestants: the operator of pyprune.ops; PyTorch's steps as transformers writes them; the same under torch.compile;
for RMSNorm also torch.nn.functional.rms_norm, whose rounding differs. bfloat16, on the activations of a micro-batch.
Correctness comes first: the relative Frobenius error against float64 may be at most that of transformers' steps and a
hundredth more. `bytes` is what has to be read and written, the rate is held against a copy's of as many bytes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from contest import contest_parser, prepare_device, start_report, write_report
from torch import Tensor

from pyprune.benchmark.cases.layer_steps import EPS, rotated
from pyprune.benchmark.timing import Timer
from pyprune.ops import rms_norm, rotate_, swiglu_
from pyprune.ops.rms_norm import rms_norm_reference
from pyprune.ops.rotary import rotate_reference
from pyprune.ops.swiglu import swiglu_reference
from pyprune.testing.random_checkpoint import SHAPES

HEAD_DIM = 128
Contestants = dict[str, Callable[[], Tensor]]


def activated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def in_place(operator: Callable[..., None], x: Tensor, *others: Tensor) -> Tensor:
    operator(x, *others)
    return x


def contests(sizes: dict[str, Any], tokens: int, device: torch.device) -> dict[str, tuple[Contestants, Tensor, int]]:
    """By step: contestants, the exact result, and the bytes that have to move. In-place ones work on copies."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(torch.bfloat16)

    hidden, heads, channels = sizes["hidden_size"], sizes["heads"], sizes["intermediate_size"]
    x, weight = draw(tokens, hidden), draw(hidden)
    q = draw(1, tokens, heads * HEAD_DIM).view(1, tokens, heads, HEAD_DIM).transpose(1, 2)
    angles = torch.rand(1, tokens, HEAD_DIM, generator=generator, device=device)
    cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    gate, up = draw(tokens, channels), draw(tokens, channels)
    own_q, own_gate = q.clone(), gate.clone()
    exact_q, exact_gate = q.double(), gate.double()
    rotate_reference(exact_q, cos.double(), sin.double())
    swiglu_reference(exact_gate, up.double())
    compiled = [torch.compile(step) for step in (rms_norm_reference, rotated, activated)]
    return {
        "rms_norm": (
            {
                "pyprune": lambda: rms_norm(x, weight, EPS),
                "steps": lambda: rms_norm_reference(x, weight, EPS),
                "compiled": lambda: compiled[0](x, weight, EPS),
                "torch": lambda: torch.nn.functional.rms_norm(x, (hidden,), weight, EPS),
            },
            rms_norm_reference(x.double(), weight.double(), EPS),
            2 * x.nbytes,
        ),
        "rotary": (
            {
                "pyprune": lambda: in_place(rotate_, own_q, cos, sin),
                "steps": lambda: rotated(q, cos, sin),
                "compiled": lambda: compiled[1](q, cos, sin),
            },
            exact_q,
            2 * q.nbytes,
        ),
        "swiglu": (
            {
                "pyprune": lambda: in_place(swiglu_, own_gate, up),
                "steps": lambda: activated(gate, up),
                "compiled": lambda: compiled[2](gate, up),
            },
            exact_gate,
            3 * gate.nbytes,
        ),
    }


def distance(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


def measure(step: str, contest: tuple[Contestants, Tensor, int], timer: Timer, device: torch.device) -> dict[str, Any]:
    """One row. The first call of each contestant is the one that is checked: later ones turn what was turned."""
    contestants, exact, moved = contest
    errors = {name: distance(call(), exact) for name, call in contestants.items()}
    if not errors["pyprune"] <= 1.01 * errors["steps"]:
        raise SystemExit(f"{step}: the error is {errors['pyprune']:.3g}, that of plain steps {errors['steps']:.3g}")
    timings = {name: timer(call) for name, call in contestants.items()}
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timer(lambda: target.copy_(source))
    plain = min((name for name in timings if name != "pyprune"), key=lambda name: timings[name].median)
    own = timings["pyprune"].median
    return {
        "step": step,
        "bytes": moved,
        "errors": errors,
        "microseconds": {name: asdict(timing) for name, timing in timings.items()},
        "copy_microseconds": copy.median,
        "share_of_copy_rate": copy.median / own,
        "strongest_plain": plain,
        "against_strongest_plain": timings[plain].median / own,
        "against_steps": timings["steps"].median / own,
    }


def main() -> None:
    parser = contest_parser(__doc__, "30")
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch (default 16384)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-2-13b", "llama-3.3-70b"])
    arguments = parser.parse_args()
    device = prepare_device(arguments)
    repeat = arguments.repeat or 30
    report = start_report(device, repeat) | {"tokens": arguments.tokens, "rows": []}
    timer = Timer(device, repeat)
    for shape in arguments.shapes:
        for step, contest in contests(SHAPES[shape], arguments.tokens, device).items():
            row = {"shape": shape} | measure(step, contest, timer, device)
            report["rows"].append(row)
            own = row["microseconds"]["pyprune"]["median"]
            print(
                f"{shape} {step}: {own:.0f} µs, {row['share_of_copy_rate']:.1%} of a copy's rate, "
                f"{row['against_strongest_plain']:.2f} x {row['strongest_plain']}, "
                f"{row['against_steps']:.2f} x transformers' steps",
                flush=True,
            )
    write_report(report, arguments.output)
    print(json.dumps({"rows": len(report["rows"])}))


if __name__ == "__main__":
    main()
