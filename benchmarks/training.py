"""What training masks takes on a model of a published shape: seconds a step, peak memory, and what was predicted.

    python benchmarks/training.py llama-2-7b --output benchmarks/results/training-llama-2-7b-X.json

Weights are random and made on the device; `disp` goes forward and back, `policy` forward with two masks. Seconds are
medians of single steps between synchronisations. `hours_of_10000_steps` is what the authors' number of steps takes;
for the 7B shape they report 2.41 h on two A100 (arXiv 2410.11988). Memory is PyTorch's peak of allocations.
"""

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from common import benchmark_parser, prepare_device, run_table
from inference import build, release

from pyprune.architectures import SUBLAYERS, family_of
from pyprune.benchmark.machine import describe_machine, installed_version
from pyprune.estimation.training_memory import training_memory
from pyprune.mask_training.disp_learner import SelectionLearner
from pyprune.mask_training.gates import GATES
from pyprune.mask_training.masked_model import MaskedModel
from pyprune.mask_training.policy_learner import UnitLearner
from pyprune.mask_training.training import Learner
from pyprune.methods import make_method
from pyprune.testing.random_checkpoint import SHAPES, checkpoint_config

RATIO = 0.5
WARM_UP = 3
WINDOWS = 4


def measure(name: str, checkpointing: bool, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row."""
    config = checkpoint_config(**SHAPES[arguments.shape])
    family = family_of(config.model_type)
    shapes = family.shapes(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = build(config, device, dtype).requires_grad_(False)
    masked = MaskedModel(model, family, checkpointing)
    windows = torch.randint(config.vocab_size, (WINDOWS, arguments.sequence_length), device=device)
    learner: Learner
    if name == "disp":
        learner = SelectionLearner(masked, shapes, windows, RATIO, None, GATES["reinmax"], 1e-3, 6.0, 0)
    else:
        start = [{module: torch.zeros(shape.units(module)) for module in SUBLAYERS} for shape in shapes]
        learner = UnitLearner(masked, shapes, windows, RATIO, start, 0.02, 0)
    seconds = []
    for number in range(WARM_UP + arguments.repeat):
        synchronize(device)
        begin = time.perf_counter()
        learner.step(torch.tensor([number % WINDOWS]), number)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds[WARM_UP:])
    stored = {name: SimpleNamespace(bytes=p.nbytes, dtype=p.dtype) for name, p in model.named_parameters()}
    reader: Any = SimpleNamespace(shapes=shapes, tensors=stored, config=config)
    predicted = training_memory(reader, make_method(name, {}), arguments.sequence_length, dtype)  # type: ignore[arg-type]
    return {
        "method": name,
        "recomputed_activations": checkpointing,
        "seconds_a_step": step,
        "steps_a_second": 1 / step,
        "hours_of_10000_steps": step * 10000 / 3600,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "predicted_memory_bytes": predicted.peak(checkpointing),
        "parameters_trained": sum(p.numel() for group in learner.optimizer.param_groups for p in group["params"]),  # type: ignore[attr-defined]
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = prepare_device(arguments)
    arguments.repeat = arguments.repeat or 10
    cases = [("disp", False), ("disp", True), ("policy", False)]
    return {
        "machine": describe_machine(device) | {"transformers": installed_version("transformers")},
        "shape": arguments.shape,
        "sequence_length": arguments.sequence_length,
        "ratio": RATIO,
        "repeat": arguments.repeat,
        "rows": [measure(name, checkpointing, arguments, device) for name, checkpointing in cases],
    }


def line(row: dict[str, Any]) -> str:
    peak = row["peak_memory_bytes"]
    return (
        f"{row['method']:8} {'twice' if row['recomputed_activations'] else 'once':12} {row['seconds_a_step']:8.3f} "
        f"{row['hours_of_10000_steps']:8.2f} {'–' if peak is None else f'{peak / 1e9:.2f}':>9} "
        f"{row['predicted_memory_bytes'] / 1e9:9.2f}"
    )


HEAD = "method   activations  s a step  h/10000  peak, GB predicted"


def argument_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__, "10")
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--sequence-length", type=int, default=2048)
    return parser


def main() -> None:
    parser = argument_parser()
    run_table(parser, parser.parse_args(), run, HEAD, line)


if __name__ == "__main__":
    main()
