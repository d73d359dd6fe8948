"""A whole pruning of a model of a published size with random weights: seconds, memory, and what bounds them.

    python benchmarks/end_to_end.py llama-2-13b --method flap --ratio 0.2 --output benchmarks/results/end-to-end-X.json
    python benchmarks/end_to_end.py llama-3.3-70b --method obs --source generated --layers 8

--source disk       makes the checkpoint in --scratch if it is not there, has its pages dropped from the page cache,
                    and runs `pyprune.pipeline.run.prune` from folder to folder.
--source generated  makes each layer on the device when it is asked for, and drops what is written after its copy to
                    the host: for models that the disk cannot hold (benchmarks/generated.py).

The seconds are those of one run in a fresh process, kernels being loaded in it; the device is awake, since the
estimate of `pyprune plan`, kept under `predicted`, was made before. Afterwards two floors are measured: the forward of
one layer times the layers, and the bytes read and written over the disk's own rates, which add up (one disk).
--profile traces the layers 2 to 4 of the prune pass, which makes them slower. The calibration text is random tokens of
the built-in model's tokenizer.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import unrounded, write_report
from floors import disk_rates, drop_page_cache, forward_seconds
from generated import prune_counted, prune_generated
from layer_profile import LayerProfile
from transformers import AutoTokenizer

from pyprune.benchmark.machine import describe_machine
from pyprune.checkpoint import CheckpointReader
from pyprune.estimation.estimate import estimate
from pyprune.job.config import PruneConfig
from pyprune.methods import make_method
from pyprune.report.sparse import is_sparse
from pyprune.runtime.allocators import configure_allocators
from pyprune.runtime.device import resident_peak, select_device, select_dtype
from pyprune.testing.random_checkpoint import SHAPES, make_checkpoint

TOKENIZER = Path(__file__).resolve().parent.parent / "models" / "llama-6m-gqa"
SHARD_LAYERS = 8  # layers a file: published checkpoints have files of a few gigabytes
METHODS = ("flap", "obs", "slimgpt", "wanda-sp", "wanda", "sparsegpt", "dass")


@dataclass
class Watch:
    """The progress of a run: shown on stderr, and the moments to look at the peaks before a meter resets them."""

    device: torch.device
    profile: LayerProfile | None
    peaks: dict[str, int] = field(default_factory=dict)

    def progress(self, what: str, done: int, total: int) -> None:
        self.look()
        if self.profile is not None:
            self.profile.progress(what, done, total)
        print(f"\r{what} {done}/{total} ", end="" if done < total else "\n", file=sys.stderr, flush=True)

    def look(self) -> None:
        now = {"host_bytes": resident_peak()}
        if self.device.type == "cuda":
            now["device_allocated_bytes"] = torch.cuda.max_memory_allocated(self.device)
            now["device_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
        self.peaks |= {name: max(value, self.peaks.get(name, 0)) for name, value in now.items()}


def checkpoint_of(arguments: argparse.Namespace, sizes: dict[str, Any], device: torch.device, scratch: Path) -> Path:
    """The folder of the run's checkpoint, made if it is not there: whole, or headers alone."""
    generated = arguments.source == "generated"
    kind = "headers" if generated else device.type  # random weights depend on the kind of device that made them
    folder = scratch / f"{arguments.shape}-{sizes['layers']}-{kind}"
    if not folder.exists():
        making = folder.with_name(folder.name + ".making")
        shutil.rmtree(making, ignore_errors=True)
        start = time.perf_counter()
        make_checkpoint(
            making, shard_layers=SHARD_LAYERS, tokenizer=TOKENIZER, device=device, headers_only=generated, **sizes
        )
        making.rename(folder)
        print(f"checkpoint made in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return folder


def write_text(file: Path, tokens: int) -> None:
    """A text of about so many random tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    chosen = random.Random(0).choices(range(len(tokenizer)), k=tokens)
    decoded = tokenizer.decode(chosen, skip_special_tokens=True)
    file.write_text(decoded.replace("\0", " "), encoding="utf-8")  # a zero byte is taken for a binary file


def storage_bytes() -> dict[str, int] | None:
    """What this process has had the disk read and written so far; None where the system does not count it."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return {"bytes_read": int(fields["read_bytes"]), "bytes_written": int(fields["write_bytes"])}


def run(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One run, measured. The output is deleted, the checkpoint stays in `scratch`."""
    device = select_device(arguments.device)
    sizes = SHAPES[arguments.shape] | ({"layers": arguments.layers} if arguments.layers else {})
    model = checkpoint_of(arguments, sizes, device, scratch)
    samples, length = arguments.samples, arguments.sequence_length
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        text = Path(own) / "text.txt"
        write_text(text, samples * length)
        options = PruneConfig(
            str(model), Path(own) / "pruned", arguments.method, arguments.ratio, unrounded(arguments.method),
            calibration=str(text), samples=samples, sequence_length=length, device=arguments.device,
            cache=Path(own) / "cache",
            device_memory=int(arguments.device_memory * 1e9) if arguments.device_memory else None,
        )  # fmt: skip
        predicted = predict(options, device)
        watch = Watch(device, LayerProfile(device) if arguments.profile else None)
        drop_page_cache(model)
        reset_peaks(device)
        before = storage_bytes()
        start = time.perf_counter()
        pruned = prune_counted if arguments.source == "disk" else prune_generated
        record, moved = pruned(options, watch.progress)
        seconds = time.perf_counter() - start
        after = storage_bytes()
        watch.look()
    bound = floor(arguments, sizes, device, model, scratch, record.bytes)
    report = {
        "machine": describe_machine(device),
        "shape": arguments.shape,
        "sizes": sizes,
        "method": arguments.method,
        "ratio": arguments.ratio,
        "ratio_met": record.ratio_met,
        "samples": samples,
        "sequence_length": length,
        "source": arguments.source,
        "device_memory_gb": arguments.device_memory,
        "profiled": arguments.profile,
        "dtype": record.dtype,
        "backends": record.backends,
        "seconds": seconds,
        "compute_seconds": sum(own["seconds"] for own in record.passes.values()),
        "passes": record.passes,
        "peak_memory": watch.peaks,
        "model_bytes": record.bytes,
        "moved": moved,
        "storage": None if before is None or after is None else {name: after[name] - before[name] for name in after},
        "floor": bound,
        "times_floor": seconds / bound["seconds"],
        "predicted": predicted,
        "kept": kept_counts(record.to_json()),
        "warnings": record.warnings,
    }
    return report | ({"profile": watch.profile.document} if watch.profile else {})


def reset_peaks(device: torch.device) -> None:
    """Forget the memory that making the checkpoint and the estimate took."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    clear = Path("/proc/self/clear_refs")
    if os.access(clear, os.W_OK):
        clear.write_text("5")  # this process's high-water mark


def predict(options: PruneConfig, device: torch.device) -> dict[str, Any]:
    """What `pyprune plan` says of the run."""
    reader = CheckpointReader(Path(options.model))
    dtype = select_dtype(options.dtype, reader.dtype, device)
    method = make_method(options.method, options.method_options).fitted(reader.shapes)
    sizes = (options.ratio, options.samples, options.sequence_length)
    return estimate(reader, method, *sizes, device, dtype, options.device_memory).to_json()


def floor(
    arguments: argparse.Namespace,
    sizes: dict[str, Any],
    device: torch.device,
    model: Path,
    scratch: Path,
    model_bytes: list[int],
) -> dict[str, Any]:
    """What the run cannot beat; `seconds` is the higher of the forward's and the disk's."""
    layer = forward_seconds(sizes, arguments.samples, arguments.sequence_length, device, scratch)
    result: dict[str, Any] = {"layer_forward_seconds": layer, "forward_seconds": layer * sizes["layers"]}
    if arguments.source == "disk":
        rates = disk_rates(model, scratch, int(arguments.disk_sample * 1e9))
        read, written = model_bytes
        result |= rates | {
            "disk_seconds": read / rates["read_bytes_per_second"] + written / rates["write_bytes_per_second"]
        }
    return result | {"seconds": max(result["forward_seconds"], result.get("disk_seconds", 0.0))}


def kept_counts(plan: dict[str, Any]) -> list[list[int]]:
    """KV groups and FFN channels that each layer keeps; nothing of a model whose shapes stay."""
    if is_sparse(plan):
        return []
    return [[len(layer["kv_groups"]), len(layer["intermediate_channels"])] for layer in plan["layers"]]


def show(report: dict[str, Any]) -> None:
    for name, own in report["passes"].items():
        print(
            f"{name:8} {own['seconds']:8.2f} s, {own['seconds'] / max(1, len(own['layers'])):.3f} s a layer, "
            f"peak {own['peak_memory_bytes'] / 1e9:.2f} GB"
        )
    bound = report["floor"]
    print(
        f"{'in all':8} {report['seconds']:8.2f} s = {report['times_floor']:.2f} x the floor "
        f"(forward {bound['forward_seconds']:.2f} s, disk {bound.get('disk_seconds', 0.0):.2f} s)"
    )


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--method", choices=METHODS, default="flap")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="layers, instead of the shape's")
    parser.add_argument("--source", choices=("disk", "generated"), default="disk")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-memory", type=float, metavar="GB", help="stay below so much of the GPU's memory")
    parser.add_argument(
        "--scratch", type=Path, help="folder for the checkpoints, which stay; a temporary one unless given"
    )
    parser.add_argument("--disk-sample", type=float, default=4.0, metavar="GB", help="read and written for the floor")
    parser.add_argument("--profile", action="store_true", help="trace the layers 2 to 4 of the prune pass")
    parser.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    return parser


def main() -> None:
    arguments = argument_parser().parse_args()
    configure_allocators()  # as the program does
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        report = run(arguments, scratch)
    show(report)
    print(json.dumps({"peak_memory": report["peak_memory"]}))
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
