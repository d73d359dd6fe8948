"""obs on layers of several families' published sizes beside Llama's layers of the same sizes: seconds and memory.

    python benchmarks/families.py --output benchmarks/results/families-h100.json

Random weights. Each family and its Llama twin, of equal hidden size, heads, FFN channels and number of layers, are
pruned in turn, three times, after one run that loads the kernels; the least seconds of the passes count. A twin of a
family without a gate in its FFN has a third more work there, so that the ratio is also given for each FLOP.
"""

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write_report

from pyprune.architectures import FAMILIES
from pyprune.benchmark.machine import describe_machine
from pyprune.checkpoint import CheckpointReader
from pyprune.estimation.procedures.base import forward_flops
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune
from pyprune.testing.random_checkpoint import make_checkpoint

TOKENIZER = Path(__file__).resolve().parent.parent / "models" / "llama-6m-gqa"
UNITS = {"olmo-2-13b": "channels"}  # of the twin, too: OLMo 2's norms of queries and keys are over all heads
# Layers of published models; the vocabulary is the test tokenizer's, it has no part in a pass's time.
MODELS: dict[str, dict[str, Any]] = {
    "gemma-3-12b": {"family": "gemma3_text", "hidden_size": 3840, "heads": 16, "kv_heads": 8, "head_dim": 256,
                    "intermediate_size": 15360, "sliding_window": 1024},
    "phi-4": {"family": "phi3", "hidden_size": 5120, "heads": 40, "kv_heads": 10, "intermediate_size": 17920},
    "glm-4-9b-0414": {"family": "glm4", "hidden_size": 4096, "heads": 32, "kv_heads": 2, "intermediate_size": 13696},
    "olmo-2-13b": {"family": "olmo2", "hidden_size": 5120, "heads": 40, "kv_heads": 40, "intermediate_size": 13824},
}  # fmt: skip


def run(model: Path, units: str | None, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the passes and the device's peak of one pruning; its output is deleted."""
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        windows = torch.randint(
            3, 1000, (arguments.samples, arguments.sequence_length), generator=torch.Generator().manual_seed(0)
        )
        options = PruneConfig(
            str(model), Path(own) / "pruned", "obs", arguments.ratio, {"units": units} if units else {},
            calibration=windows, samples=arguments.samples, sequence_length=arguments.sequence_length,
            device=arguments.device, verify=False, cache=Path(own) / "cache",
        )  # fmt: skip
        record = prune(options)
    passes = {name: {k: own[k] for k in ("seconds", "peak_bytes") if k in own} for name, own in record.passes.items()}
    return {"passes": passes, "seconds": sum(own["seconds"] for own in passes.values()), "ratio": record.ratio}


def measure(name: str, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = {"layers": arguments.layers, "tokenizer": TOKENIZER, "seed": 0, "device": arguments.device, **MODELS[name]}
    twin = sizes | {"family": "llama"}
    twin.pop("sliding_window", None)
    result: dict[str, Any] = {"sizes": dict(MODELS[name]), "layers": arguments.layers}
    folders = {"family": sizes, "llama": twin}
    flops, runs = {}, {kind: [] for kind in folders}
    for kind, own in folders.items():
        make_checkpoint(scratch / f"{name}-{kind}", pad_token_id=None, **own)
        shapes = CheckpointReader(scratch / f"{name}-{kind}").shapes
        flops[kind] = sum(forward_flops(shape, 1, arguments.sequence_length) for shape in shapes)
    for _ in range(arguments.runs + 1):
        for kind in folders:
            runs[kind].append(run(scratch / f"{name}-{kind}", UNITS.get(name), scratch, arguments))
    for kind in folders:
        best = min(runs[kind][1:], key=lambda own: own["seconds"])
        result[kind] = best | {"all_seconds": [own["seconds"] for own in runs[kind]], "flops": flops[kind]}
    result["time_ratio"] = result["family"]["seconds"] / result["llama"]["seconds"]
    result["time_ratio_per_flop"] = result["time_ratio"] * flops["llama"] / flops["family"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    assert {sizes["family"] for sizes in MODELS.values()} <= FAMILIES.keys()
    report: dict[str, Any] = {
        "machine": describe_machine(torch.device(arguments.device)),
        "method": "obs", "ratio": arguments.ratio, "samples": arguments.samples,
        "sequence_length": arguments.sequence_length, "models": {},
    }  # fmt: skip
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            report["models"][name] = own = measure(name, Path(scratch), arguments)
        print(
            f"{name}: {own['family']['seconds']:.1f} s, Llama's layers {own['llama']['seconds']:.1f} s: "
            f"{own['time_ratio']:.2f} x, {own['time_ratio_per_flop']:.2f} x for each FLOP", flush=True,
        )  # fmt: skip
        if arguments.output:
            write_report(report, arguments.output)


if __name__ == "__main__":
    main()
