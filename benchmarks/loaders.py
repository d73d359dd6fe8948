"""Does every loader compute the same? Perplexity of pruned models under each program that can load them.

    python benchmarks/loaders.py MODEL... --calibration TEXT --text TEXT --output benchmarks/results/loaders.json

Each model is pruned by flap and obs, with layers that differ and with --uniform, with biases and without, and loaded by

    pyprune   transformers with pyprune's classes registered
    stock     transformers alone, what `pyprune export --format stock` wrote (uniform layers only)
    padded    transformers alone, `--format padded` (layers that differ)
    gguf      llama.cpp through llama-cpp-python, `--format gguf --dtype f16`

each in a process of its own, in float32 (gguf: weights in float16). Rows that OUTPUT already holds are not made again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write_report
from safetensors.torch import save_file

from pyprune.benchmark.machine import describe_machine, installed_version
from pyprune.calibration.source import TokenSource
from pyprune.checkpoint import CheckpointReader
from pyprune.evaluation.llama_cpp import perplexity_gguf
from pyprune.exporters import export
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune

WORKER = Path(__file__).with_name("stock_perplexity.py")
METHODS = {"flap": ("bias", "none"), "obs": ("bias", "weights")}
LAYOUTS = ("differing", "uniform")


def perplexity(model: Path, windows: Path, *options: str) -> dict[str, Any]:
    """By transformers in a fresh process: class and perplexity."""
    command = [sys.executable, "-P", str(WORKER), str(model), str(windows), *options]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=model.parent)
    return json.loads(run.stdout.splitlines()[-1])


def measure(
    model: Path, method: str, compensation: str, layout: str, arguments: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """One row: a pruning, its exports, and the perplexity that each loader finds."""
    pruned = folder / "pruned"
    options: dict[str, Any] = {"compensation": compensation, "round_to": 1, "uniform": layout == "uniform"}
    record = prune(
        PruneConfig(
            str(model), pruned, method, arguments.ratio, options, calibration=str(arguments.calibration),
            samples=arguments.samples, sequence_length=arguments.calibration_length, device="cpu",
            cache=arguments.output.parent / ".loaders-cache",
        )
    )  # fmt: skip
    reader = CheckpointReader(pruned)
    text = str(arguments.text)
    windows = TokenSource(text, pruned, reader.config, torch.device("cpu"), torch.float32).evaluation(
        arguments.length, arguments.windows, 0
    )
    file = folder / "windows.safetensors"
    save_file({"ids": windows}, file)
    loaders: dict[str, Any] = {"pyprune": perplexity(pruned, file, "--import", "pyprune")}
    other = "stock" if layout == "uniform" else "padded"
    export(pruned, folder / other, other)
    loaders[other] = perplexity(folder / other, file)
    written = export(pruned, folder / "model.gguf", "gguf", "f16")
    loaders["gguf"] = {"class": written["class"], "perplexity": perplexity_gguf(folder / "model.gguf", windows)}
    first = loaders["pyprune"]["perplexity"]
    return {
        "model": model.name,
        "method": method,
        "compensation": compensation,
        "layout": layout,
        "ratio": arguments.ratio,
        "ratio_met": record.ratio_met,
        "loaders": loaders,
        "largest_deviation": max(abs(own["perplexity"] / first - 1) for own in loaders.values()),
    }


def show(row: dict[str, Any]) -> None:
    cells = ", ".join(f"{name} ({own['class']}) {own['perplexity']:.4f}" for name, own in row["loaders"].items())
    name = f"{row['model']} {row['method']} {row['compensation']} {row['layout']}"
    print(f"{name}: {cells}; within {row['largest_deviation']:.4%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--calibration", type=Path, required=True, metavar="TEXT")
    parser.add_argument("--text", type=Path, required=True, help="evaluated")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path("loaders.json"))
    arguments = parser.parse_args()
    settings = ("ratio", "samples", "calibration_length", "windows", "length")
    report: dict[str, Any] = {
        "machine": describe_machine(torch.device("cpu")),
        "transformers": installed_version("transformers"),
        "llama_cpp": installed_version("llama-cpp-python"),
        "calibration": arguments.calibration.name,
        "text": arguments.text.name,
        **{name: getattr(arguments, name) for name in settings},
        "rows": [],
    }
    if arguments.output.is_file():
        before = json.loads(arguments.output.read_text())
        if all(before[name] == report[name] for name in settings):
            report["rows"] = before["rows"]
    known = {(row["model"], row["method"], row["compensation"], row["layout"]) for row in report["rows"]}
    for model in arguments.models:
        for method, compensations in METHODS.items():
            for compensation in compensations:
                for layout in LAYOUTS:
                    if (model.name, method, compensation, layout) in known:
                        continue
                    with tempfile.TemporaryDirectory() as folder:
                        row = measure(model, method, compensation, layout, arguments, Path(folder))
                    show(row)
                    report["rows"].append(row)
                    write_report(report, arguments.output)
    shutil.rmtree(arguments.output.parent / ".loaders-cache", ignore_errors=True)


if __name__ == "__main__":
    main()
