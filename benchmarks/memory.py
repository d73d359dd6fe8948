"""Peak memory of pruning a model of 1.5 billion parameters on a CPU: one decoder layer at a time.

    python benchmarks/memory.py --output benchmarks/results/memory-cpu.json

Makes a random checkpoint of the named shape (bfloat16), prunes it in a process of its own (float32 compute) and
reads that process's high-water mark of resident memory from the kernel. The interpreter and its libraries count. The
process may have half the model's bytes of memory of its own (RLIMIT_DATA), and fails beyond. safetensors maps a file so
that all of it counts, looked at or not: hence files of two layers each.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import unrounded

from pyprune.benchmark.machine import describe_machine
from pyprune.checkpoint import CheckpointReader
from pyprune.methods.options import flag_of
from pyprune.testing.random_checkpoint import SHAPES, make_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-1.5b", choices=SHAPES)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["flap", "wanda-sp"])
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints; a temporary one unless given")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    tokenizer = Path(__file__).resolve().parent.parent / "models" / "llama-6m-gqa"
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        model = make_checkpoint(Path(scratch) / "dense", tokenizer=tokenizer, shard_layers=2, **SHAPES[arguments.shape])
        reader = CheckpointReader(model)
        text = Path(scratch) / "text.txt"
        text.write_text("".join(f"In the year {n} the harvest was {n % 7} times as good. " for n in range(4000)))
        hidden = arguments.samples * arguments.sequence_length * reader.config.hidden_size * 4
        rows = [
            row(model, text, Path(scratch), method, reader.bytes, hidden, arguments) for method in arguments.methods
        ]
    document = {
        "shape": arguments.shape,
        "parameters": reader.bytes // 2,
        "dense_bytes": reader.bytes,
        "hidden_state_bytes": hidden,
        "data_limit_bytes": reader.bytes // 2,
        "windows": [arguments.samples, arguments.sequence_length],
        "machine": describe_machine(torch.device("cpu")),
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def row(
    model: Path,
    text: Path,
    scratch: Path,
    method: str,
    dense: int,
    hidden: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Prune in a child process and account for its peak."""
    command = [
        sys.executable, "-m", "pyprune", "prune", str(model), str(scratch / method), "--no-verify", "--method", method,
        "--ratio", "0.3", "--calibration", str(text), "--samples", str(arguments.samples),
        "--sequence-length", str(arguments.sequence_length), "--device", "cpu", "--dtype", "float32", "--json",
        *(str(word) for name, value in unrounded(method).items() for word in (flag_of(name), value)),
    ]  # fmt: skip
    limited = partial(resource.setrlimit, resource.RLIMIT_DATA, (dense // 2, dense // 2))
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=limited)
    assert child.stdout is not None
    result = json.loads(child.stdout.read())
    # wait4 gives the high-water mark of this child alone, as the kernel kept it.
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{method} failed with status {status}")
    peak = usage.ru_maxrss * 1024
    share = (peak - hidden) / dense
    print(
        f"{method:10} peak {peak / 1e6:8.1f} MB = {share:.1%} of the dense model's {dense / 1e6:.0f} MB "
        f"+ hidden states {hidden / 1e6:.1f} MB; {result['seconds']:.0f} s"
    )
    return {
        "method": method,
        "peak_bytes": peak,
        "reported_peak_bytes": result["peak_memory_bytes"],
        "share_of_dense": share,
        "seconds": result["seconds"],
    }


if __name__ == "__main__":
    main()
