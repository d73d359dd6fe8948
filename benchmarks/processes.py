"""One process against several on the GPUs of one host: seconds of each pass and stage, and whether the results agree.

    python benchmarks/processes.py llama-2-13b --layers 8 --processes 2 --output benchmarks/results/processes-h200.json

Each pruning is a program of its own: `python -m pyprune prune` and `torchrun --nproc-per-node=N -m pyprune prune`, on
the same random checkpoint (pyprune/testing/random_checkpoint.py) and text. The passes' seconds are those of plan.json,
the first process's; kernels are loaded in each run, once for all layers. Sums over blocks of windows round otherwise
than sums over all, so that a close call may keep another unit: the report counts them, and gives the distance of the
weights of the layers that keep the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import unrounded, write_report
from end_to_end import METHODS, checkpoint_of, write_text
from floors import drop_page_cache

from pyprune.benchmark.machine import describe_machine
from pyprune.checkpoint import CheckpointReader
from pyprune.methods.options import flag_of
from pyprune.runtime.device import select_device
from pyprune.testing.random_checkpoint import SHAPES


def pruned(model: Path, output: Path, text: Path, arguments: argparse.Namespace, processes: int) -> dict[str, Any]:
    """The plan of one pruning in so many processes."""
    program = [sys.executable, "-m"]
    if processes > 1:
        program += ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    options = [
        *("--method", arguments.method, "--ratio", arguments.ratio, "--device", arguments.device),
        *("--calibration", text, "--samples", arguments.samples, "--sequence-length", arguments.sequence_length),
        *(word for name, value in unrounded(arguments.method).items() for word in (flag_of(name), value)),
        *("--cache", output.with_name(output.name + "-cache")),
    ]  # fmt: skip
    drop_page_cache(model)
    command = [*program, "pyprune", "prune", model, output, *options]
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    return json.loads((output / "plan.json").read_text())


def comparison(one: Path, several: Path, plans: list[dict[str, Any]]) -> dict[str, Any]:
    """Units that only one of the two keeps, and the farthest weights among the layers that keep the same."""
    differing, units, same = 0, 0, []
    for layer, (a, b) in enumerate(zip(*(plan["layers"] for plan in plans), strict=True)):
        apart = sum(len(set(a[name]) ^ set(b[name])) for name in ("kv_groups", "intermediate_channels"))
        units += sum(len(a[name]) for name in ("kv_groups", "intermediate_channels"))
        differing += apart
        if not apart:
            same.append(layer)
    farthest = 0.0
    readers = [CheckpointReader(folder) for folder in (one, several)]
    for layer in same:
        first, second = (reader.read_layer(layer) for reader in readers)
        for name, tensor in first.items():
            norm = torch.linalg.vector_norm(tensor.float())
            distance = torch.linalg.vector_norm(tensor.float() - second[name].float()) / norm
            farthest = max(farthest, float(distance))
    return {
        "units_kept": units,
        "units_kept_by_one_only": differing,
        "layers_that_keep_the_same": len(same),
        "largest_relative_distance_of_a_tensor": farthest,
    }


def run(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    device = select_device(arguments.device)
    sizes = SHAPES[arguments.shape] | ({"layers": arguments.layers} if arguments.layers else {})
    arguments.source = "disk"
    model = checkpoint_of(arguments, sizes, device, scratch)
    counts = [1, arguments.processes]
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        text = Path(own) / "text.txt"
        write_text(text, arguments.samples * arguments.sequence_length)
        outputs = [Path(own) / f"in-{count}" for count in counts]
        plans = [pruned(model, output, text, arguments, n) for output, n in zip(outputs, counts, strict=True)]
        result = comparison(*outputs, plans)
    alone, together = (plan["passes"] for plan in plans)
    return {
        "machine": describe_machine(device),
        "shape": arguments.shape,
        "layers": sizes["layers"],
        "method": arguments.method,
        "ratio": arguments.ratio,
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
        "processes": arguments.processes,
        "passes": {
            name: {
                "seconds": [alone[name]["seconds"], together[name]["seconds"]],
                "times_faster": alone[name]["seconds"] / together[name]["seconds"],
                "stages": {stage: [s, together[name]["stages"][stage]] for stage, s in alone[name]["stages"].items()},
                "layers": [[layer["seconds"] for layer in own[name]["layers"]] for own in (alone, together)],
            }
            for name in alone
        },
        "result": result,
    }


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", choices=METHODS, default="obs")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="layers, instead of the shape's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoint, which stays; temporary unless given")
    parser.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    return parser


def main() -> None:
    arguments = argument_parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        report = run(arguments, scratch)
    for name, own in report["passes"].items():
        one, several = own["seconds"]
        print(
            f"{name:8} {one:7.2f} s, in {arguments.processes} processes {several:7.2f} s: {own['times_faster']:.2f} x"
        )
        for stage, (before, after) in own["stages"].items():
            print(f"    {stage:22} {before:8.3f} {after:8.3f}")
    print(json.dumps(report["result"]))
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
