"""How fast DISP models run under transformers, beside their dense model: prefill and decode of a published shape.

    python benchmarks/inference_selected.py llama-2-13b --output benchmarks/results/inference-selected-X.json

As benchmarks/inference.py, whose modes and measurements these are. Selections are random indices, the same share of
each selection in every layer, in multiples of --multiple: at half the parameters 60 % of the residual stream and of the
FFN's channels. In mode graph the norms and additions of a DISP layer run in pyprune's kernels (so does the dense
model's RMSNorm), as everywhere the class is used on a GPU.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import prepare_device, run_table
from inference import DTYPES, MODES, build, release, timed

from pyprune.architectures import LayerShape, family_of
from pyprune.architectures.channel_selection import FFN_MIDDLE, SELECTIONS, width
from pyprune.benchmark.machine import describe_machine, installed_version
from pyprune.errors import InputError
from pyprune.mask_training.budget import kept_share, rounded, shift_to_budget
from pyprune.modeling import selected_config
from pyprune.testing.random_checkpoint import SHAPES, checkpoint_config

RATIO = 0.5


def equal_counts(shape: LayerShape, ratio: float, multiple: int) -> dict[str, int]:
    """The same share of every selection, as near to the ratio as multiples allow."""

    def counts(share: float) -> dict[str, int]:
        share = min(max(share, 0.0), 1.0)
        return {name: rounded(round(share * width(shape, name)), width(shape, name), multiple) for name in SELECTIONS}

    share = shift_to_budget(lambda value: kept_share([shape], [counts(value)]), 1 - ratio, bound=1.0)
    return counts(share)


def draw_selections(model: Any, shapes: list[LayerShape], seed: int) -> None:
    """Random sorted indices in place of the first ones that a new model has."""
    generator = torch.Generator().manual_seed(seed)
    for block, shape in zip(model.model.layers, shapes, strict=True):
        for name in SELECTIONS:
            if name != FFN_MIDDLE:
                index = block.get_buffer(name)
                drawn = torch.randperm(width(shape, name), generator=generator)[: len(index)].sort().values
                index.copy_(drawn)


def measure(
    layout: str, config: Any, shapes: list[LayerShape], arguments: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """The rows of one model: every mode and batch."""
    model = build(config, device, DTYPES[arguments.dtype])
    if layout != "dense":
        draw_selections(model, shapes, arguments.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for figures in timed(model, family_of("llama"), arguments, device):
        row = {"layout": layout, "parameters": parameters} | figures
        print(line(row), file=sys.stderr)
        rows.append(row)
    return rows


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, measured. InputError: a shape of another family than Llama, a mode that the device has not."""
    device = prepare_device(arguments)
    if "graph" in arguments.modes and device.type != "cuda":
        raise InputError("--modes graph needs a GPU: a CPU has eager and compile")
    sizes = SHAPES[arguments.shape]
    config = checkpoint_config(**sizes)
    family = family_of(config.model_type)
    shapes = family.shapes(config)
    counts = equal_counts(shapes[0], RATIO, arguments.multiple)
    rows = measure("dense", config, shapes, arguments, device)
    release(device)
    selected = selected_config(family, config, [counts] * len(shapes), False, False)
    rows += measure("selected", selected, shapes, arguments, device)
    dense = {(row["mode"], row["batch"]): row for row in rows if row["layout"] == "dense"}
    for row in rows:
        for phase in ("prefill", "decode"):
            figure = f"{phase}_tokens_per_second"
            row[f"{phase}_against_dense"] = row[figure] / dense[row["mode"], row["batch"]][figure]
    return {
        "machine": describe_machine(device) | {"transformers": installed_version("transformers")},
        "shape": arguments.shape,
        "ratio": 1 - kept_share([shapes[0]], [counts]),
        "counts": counts,
        **{name: getattr(arguments, name) for name in ("dtype", "prompt", "context", "steps", "repeat", "multiple")},
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    cells = [f"{row['layout']:9} {row['mode']:8} {row['batch']:5} {row['parameters'] / 1e9:7.3f}"]
    for phase in ("prefill", "decode"):
        ratio = row.get(f"{phase}_against_dense")
        cells.append(f"{row[f'{phase}_tokens_per_second']:9.1f} {'–' if ratio is None else f'{ratio:.2f}':>6}")
    return " ".join(cells)


HEAD = "layout    mode     batch G param   prefill /dense    decode /dense"


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[n for n, s in SHAPES.items() if s["family"] == "llama"], metavar="SHAPE")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: graph on a GPU, else eager")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prefill")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache when decoding begins")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--multiple", type=int, default=128, help="of channels in every selection")
    parser.add_argument("--seed", type=int, default=0, help="of the indices")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    return parser


def main() -> None:
    parser = argument_parser()
    arguments = parser.parse_args()
    arguments.modes = arguments.modes or (["graph"] if arguments.device.startswith("cuda") else ["eager"])
    run_table(parser, arguments, run, HEAD, line)


if __name__ == "__main__":
    main()
