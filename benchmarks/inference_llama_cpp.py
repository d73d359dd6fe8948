"""How fast pruned models run under llama.cpp on a CPU: dense, and pruned by half with layers alike or not.

    python benchmarks/inference_llama_cpp.py ../shared/models/llama-24m-mha \\
        --calibration ../shared/data/wikitext2-valid.txt --output benchmarks/results/inference-llama-cpp-cpu.json

Each model is pruned by flap without biases, written as GGUF and run through llama-cpp-python: `--prompt` tokens at
once, then `--steps` one at a time. The models take turns in every round, so that another load on the machine meets
them alike; figures are medians over the rounds, and ratios are medians of the rounds' own ratios.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import run_table

from pyprune.benchmark.machine import describe_machine, installed_version
from pyprune.checkpoint import CheckpointReader
from pyprune.exporters.gguf import DTYPES, write_gguf
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune
from pyprune.runtime.optional import import_extra

DENSE = "dense"
LAYOUTS: dict[str, dict[str, Any]] = {
    "uniform": {"uniform": True},
    "uniform-rounded": {"uniform": True, "round_to": 32},  # q8_0's blocks, and whole vectors of every CPU
    "nonuniform": {},
    "nonuniform-rounded": {"round_to": 32},
}


class Candidate:
    """A GGUF file in llama.cpp, with a context for one sequence of `tokens` tokens."""

    def __init__(self, llama: Any, model: Any, tokens: int, threads: int) -> None:
        self.llama = llama
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = tokens
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama.llama_init_from_model(model, parameters)
        if not self.context:
            raise RuntimeError(f"llama_init_from_model makes no context of {tokens} tokens")

    def run(self, ids: list[int], prompt: int) -> tuple[float, float]:
        """Seconds of the first `prompt` ids at once, and of the others one by one."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self._decode(ids[:prompt])
        between = time.perf_counter()
        for token in ids[prompt:]:
            self._decode([token])
        return between - start, time.perf_counter() - between

    def _decode(self, ids: list[int]) -> None:
        tokens = (self.llama.llama_token * len(ids))(*ids)
        # Positions follow those in the memory, and the last token's logits are computed.
        status = self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self.llama.llama_synchronize(self.context)


@contextmanager
def loaded(llama: Any, file: Path, tokens: int, threads: int) -> Iterator[Candidate]:
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    # AMX buffers crash on some virtual machines without AMX (llama-cpp-python 0.3.36).
    parameters.use_extra_bufts = False
    model = llama.llama_model_load_from_file(str(file).encode(), parameters)
    if not model:
        raise RuntimeError(f"{file}: llama.cpp cannot load it")
    candidate = Candidate(llama, model, tokens, threads)
    try:
        yield candidate
    finally:
        llama.llama_free(candidate.context)
        llama.llama_model_free(model)


def checkpoints(arguments: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """The dense model, and it pruned in each layout."""
    folders = {DENSE: arguments.model}
    for name in arguments.layouts:
        options = {"compensation": "none", "round_to": 1} | LAYOUTS[name]
        folders[name] = scratch / name
        run = PruneConfig(
            str(arguments.model), folders[name], "flap", arguments.ratio, options, str(arguments.calibration),
            samples=arguments.samples, sequence_length=256, device="cpu", cache=scratch / "cache",
        )  # fmt: skip
        prune(run)
    return folders


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, measured. InputError: as `prune` and `write_gguf`; llama-cpp-python is not installed."""
    llama = import_extra("llama_cpp")
    llama.llama_backend_init()
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folders = checkpoints(arguments, scratch)
        for name, folder in folders.items():
            written = write_gguf(folder, scratch / f"{name}.gguf", arguments.dtype)
            shapes = CheckpointReader(folder).shapes
            rows.append(
                {
                    "layout": name,
                    "architecture": written["architecture"],
                    "bytes": written["bytes"],
                    "decoder_parameters": sum(shape.parameters for shape in shapes),
                    "sizes": sorted({(shape.kv_groups, shape.intermediate_channels) for shape in shapes}),
                }
            )
        times = timed(llama, [scratch / f"{name}.gguf" for name in folders], arguments)
    llama.llama_log_set(llama.llama_log_callback(), None)
    for row, own in zip(rows, times, strict=True):
        for phase, tokens in (("prefill", arguments.prompt), ("decode", arguments.steps)):
            seconds, dense = own[phase], times[0][phase]
            row[f"{phase}_seconds"] = seconds
            row[f"{phase}_tokens_per_second"] = tokens / statistics.median(seconds)
            row[f"{phase}_against_dense"] = statistics.median(d / s for d, s in zip(dense, seconds, strict=True))
    return {
        "machine": describe_machine(torch.device("cpu")) | {"llama_cpp_python": installed_version("llama_cpp_python")},
        "model": arguments.model.name,
        **{
            name: getattr(arguments, name)
            for name in ("ratio", "dtype", "prompt", "steps", "rounds", "threads", "samples")
        },
        "method": "flap, no compensation",
        "rows": rows,
    }


def timed(llama: Any, files: list[Path], arguments: argparse.Namespace) -> list[dict[str, list[float]]]:
    """Seconds of prefill and of decoding of each file, a round each; the first round warms up and does not count."""
    tokens = arguments.prompt + arguments.steps
    vocabulary = CheckpointReader(arguments.model).config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens).tolist()
    times: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in files]
    for turn in range(arguments.rounds + 1):
        for file, own in zip(files, times, strict=True):
            with loaded(llama, file, tokens, arguments.threads) as candidate:
                candidate.run(ids, arguments.prompt)  # pages of the file, and the buffers
                prefill, decode = candidate.run(ids, arguments.prompt)
            if turn:
                own["prefill"].append(prefill)
                own["decode"].append(decode)
        print(f"round {turn} of {arguments.rounds}", file=sys.stderr)
    return times


def line(row: dict[str, Any]) -> str:
    cells = [f"{row['layout']:18} {row['architecture']:6} {row['decoder_parameters'] / 1e6:8.2f}"]
    for phase in ("prefill", "decode"):
        cells.append(f"{row[f'{phase}_tokens_per_second']:9.1f} {row[f'{phase}_against_dense']:6.2f}")
    return " ".join(cells)


HEAD = "layout             arch    M param   prefill /dense    decode /dense"


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--calibration", required=True, help="text for flap, or self")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="beside the dense model")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=32, help="windows of 256 tokens for flap")
    parser.add_argument("--dtype", choices=DTYPES, default="f16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    return parser


def main() -> None:
    parser = argument_parser()
    arguments = parser.parse_args()
    run_table(parser, arguments, run, HEAD, line)


if __name__ == "__main__":
    main()
