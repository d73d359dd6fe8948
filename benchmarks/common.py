"""Arguments, device and report of the benchmarks of whole models.

The clock and the machine's facts are pyprune.benchmark's, which also times the single operators.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyprune.errors import InputError
from pyprune.methods import METHODS
from pyprune.methods.options import options_of


def benchmark_parser(description: str | None, repeat: str) -> argparse.ArgumentParser:
    """--device, --repeat, --threads and --output; `repeat` says what the default is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, help=f"repetitions (default {repeat})")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU (default 2)")
    parser.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    return parser


def prepare_device(arguments: argparse.Namespace) -> torch.device:
    """The device of --device, made current; on a CPU PyTorch gets --threads threads."""
    device = torch.device(arguments.device)
    if device.type != "cuda":
        torch.set_num_threads(arguments.threads)
        return device
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    return device


def unrounded(method: str) -> dict[str, Any]:
    """Options with which a method keeps any number of FFN channels: measurements compare methods at equal ratios."""
    return {"round_to": 1} if "round_to" in options_of(METHODS[method]) else {}


def write_report(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def run_table(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    head: str,
    line: Callable[[dict[str, Any]], str],
) -> None:
    """Run, print a line for each of the report's `rows` and write it to --output; what is wrong ends the program."""
    try:
        report = run(arguments)
    except InputError as error:
        parser.error(str(error))
    print(head)
    for row in report["rows"]:
        print(line(row))
    write_report(report, arguments.output)
