"""Selections of the residual stream: scatter-add, RMSNorm and gather in one pass, against the three passes of PyTorch.

    python benchmarks/selection.py [--device cuda] [--hidden 4096 5120 8192] [--tokens 16384 1] [--output FILE.json]

Half of the channels are selected, at random or in runs of eight on average. Contestants: the operator of pyprune.ops
(`pyprune`); torch.nn.functional.rms_norm, index_select and index_add_ (`torch`), which is what the headline compares
with; the same under torch.compile (`compiled`); `steps`, the reference with the rounding of transformers' norm; and for
the whole sequence `inverse`, compiled too, which gathers the update by an inverse index made beforehand, where
index_add_ needs atomic additions. bfloat16. Correctness comes first, as in fused.py.

`bytes`: what has to be read and written, held against a copy's rate; `sector_bytes`: the same with the channels that
are written in place counted by the sectors of 32 bytes that memory moves.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from contest import contest_parser, prepare_device, start_report, write_report
from fused import EPS, Contestants, measure
from torch import Tensor

from pyprune.benchmark.timing import Timer
from pyprune.ops import rms_norm_gather, scatter_add_, scatter_add_rms_norm_gather_
from pyprune.ops.gather_scatter import (
    rms_norm_gather_reference,
    scatter_add_reference,
    scatter_add_rms_norm_gather_reference,
)

MEAN_RUN = 8
SECTOR = 32  # bytes
HEADLINE = "scatter_add_rms_norm_gather"


def random_selection(channels: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(channels, generator=generator)[:count].sort().values


def selection_in_runs(channels: int, count: int, generator: torch.Generator) -> Tensor:
    """Kept and dropped runs in turn, their lengths geometric; a stretch of them that has `count` channels."""
    runs = torch.empty(8 * channels, dtype=torch.float64).geometric_(1 / MEAN_RUN, generator=generator).long()
    kept = (torch.arange(len(runs)) % 2).repeat_interleave(runs)
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    start = (before[channels:] - before[:-channels] == count).nonzero()[0, 0]
    return kept[start : start + channels].nonzero()[:, 0]


SELECTIONS = {"random": random_selection, "runs": selection_in_runs}


def norm_then_select(x: Tensor, weight: Tensor, eps: float, index: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps).index_select(-1, index)


def separate_passes(
    residual: Tensor, update: Tensor, update_index: Tensor, weight: Tensor, eps: float, index: Tensor
) -> Tensor:
    residual.index_add_(-1, update_index, update)
    return norm_then_select(residual, weight, eps, index)


def by_inverse(residual: Tensor, update: Tensor, inverse: Tensor, weight: Tensor, eps: float, index: Tensor) -> Tensor:
    """inverse: [channels], a channel's place in the update, or -1."""
    residual += torch.where(inverse >= 0, update.index_select(-1, inverse.clamp(min=0)), 0)
    return norm_then_select(residual, weight, eps, index)


def in_place(operator: Callable[..., Any], residual: Tensor, *others: Any) -> Callable[[], Tensor]:
    """Calls on a copy of the residual stream; what the operator returns, or else the copy."""
    own = residual.clone()

    def call() -> Tensor:
        returned = operator(own, *others)
        return own if returned is None else returned

    return call


def contests(
    hidden: int, tokens: int, pattern: str, index_dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Contestants, Tensor, int, int]]:
    """By step: contestants, the exact result, and both counts of bytes."""
    on_device, on_cpu = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=on_device, device=device, dtype=torch.float32).to(torch.bfloat16)

    count = hidden // 2
    added, read = (SELECTIONS[pattern](hidden, count, on_cpu).to(device, index_dtype) for _ in range(2))
    inverse = torch.full((hidden,), -1, dtype=index_dtype, device=device)
    inverse[added.long()] = torch.arange(count, dtype=index_dtype, device=device)
    residual, update, weight = draw(tokens, hidden), draw(tokens, count), draw(hidden)
    row, half = residual.nbytes, update.nbytes
    sectors = tokens * SECTOR * len((added * residual.element_size() // SECTOR).unique())  # that the update touches
    # Every shape is compiled for itself: none of them pays for the others.
    compiled = [
        torch.compile(step, dynamic=False)
        for step in (norm_then_select, scatter_add_reference, separate_passes, by_inverse)
    ]
    exact = residual.double()
    scatter_add_reference(exact, update.double(), added)
    norm = (residual, weight, EPS, read)
    whole = (residual, update, added, weight, EPS, read)
    return {
        "rms_norm_gather": (
            {
                "pyprune": lambda: rms_norm_gather(*norm),
                "steps": lambda: rms_norm_gather_reference(*norm),
                "torch": lambda: norm_then_select(*norm),
                "compiled": lambda: compiled[0](*norm),
            },
            rms_norm_gather_reference(residual.double(), weight.double(), EPS, read),
            row + half,
            row + half,
        ),
        "scatter_add": (
            {
                "pyprune": in_place(scatter_add_, residual, update, added),
                "steps": in_place(scatter_add_reference, residual, update, added),
                "torch": in_place(scatter_add_reference, residual, update, added),
                "compiled": in_place(compiled[1], residual, update, added),
            },
            exact,
            3 * half,
            half + 2 * sectors,
        ),
        HEADLINE: (
            {
                "pyprune": in_place(scatter_add_rms_norm_gather_, *whole),
                "steps": in_place(scatter_add_rms_norm_gather_reference, *whole),
                "torch": in_place(separate_passes, *whole),
                "compiled": in_place(compiled[2], *whole),
                "inverse": in_place(compiled[3], residual, update, inverse, weight, EPS, read),
            },
            rms_norm_gather_reference(exact, weight.double(), EPS, read),
            row + 3 * half,
            row + 2 * half + sectors,
        ),
    }


def main() -> None:
    parser = contest_parser(__doc__, "30")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 1], help="of a call (default 16384 and 1)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 5120, 8192], help="default 4096 5120 8192")
    parser.add_argument("--index", choices=("int32", "int64"), default="int64", help="type of the indices")
    arguments = parser.parse_args()
    device = prepare_device(arguments)
    repeat = arguments.repeat or 30
    report = start_report(device, repeat) | {"index": arguments.index, "rows": []}
    timer = Timer(device, repeat)
    cases = [
        {"hidden": hidden, "tokens": tokens, "pattern": pattern}
        for tokens in arguments.tokens
        for hidden in arguments.hidden
        for pattern in SELECTIONS
    ]
    for case in cases:
        of_case = contests(**case, index_dtype=getattr(torch, arguments.index), device=device)
        for step, (contestants, exact, moved, sector_bytes) in of_case.items():
            row = case | measure(step, (contestants, exact, moved), timer, device) | {"sector_bytes": sector_bytes}
            own = row["microseconds"]["pyprune"]["median"]
            in_sectors = sector_bytes / moved
            row["against_separate_passes"] = row["microseconds"]["torch"]["median"] / own
            report["rows"].append(row)
            print(
                f"{case['tokens']} x {case['hidden']} {case['pattern']} {step}: {own:.1f} µs, "
                f"{row['share_of_copy_rate']:.1%} of a copy's rate ({in_sectors:.2f} x the bytes in sectors), "
                f"{row['against_separate_passes']:.2f} x separate passes, "
                f"{row['against_strongest_plain']:.2f} x {row['strongest_plain']}",
                flush=True,
            )
    least = {
        tokens: min(
            row["against_separate_passes"]
            for row in report["rows"]
            if row["step"] == HEADLINE and row["tokens"] == tokens
        )
        for tokens in arguments.tokens
    }
    report["least_by_tokens"] = least
    write_report(report, arguments.output)
    print(json.dumps({"rows": len(report["rows"]), "least_by_tokens": least}))


if __name__ == "__main__":
    main()
