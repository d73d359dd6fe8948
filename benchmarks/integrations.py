"""Other tools on our kernels: llm-compressor's perplexities, and a 7B layer's Hessians and factors, as tools do them.

    PYTHONPATH=. python benchmarks/integrations.py quality MODEL --calibration wikitext2-valid.txt \
        --text wikitext2-test.txt --output benchmarks/results/integrations-cpu.json

compresses MODEL in float32 by llm-compressor, which this Python has to have, with and without pyprune.integrations, and
evaluates what it wrote with plain transformers. Each layer is calibrated on what the dense model gives it, and it fails
where ours and theirs differ by more than 0.2 %, or where a Hessian or a factor was not computed here. With --propagated
layers are calibrated a second time, as is their default, on what the layers before give them compressed: a weight that
lies between two values then changes the inputs of all that follows. With --reversed a third run, without ours, takes
the samples in reverse: the same Hessians but for the order of their sums.

    python benchmarks/integrations.py speed --device cuda --output FILE.json

times the Hessians of a decoder layer's seven linears from bfloat16 activations, a sample at a time, and the upper
factors of the inverses, both as the tools write them and here. It fails where ours are less exact than they should be.
"""

import argparse
import gc
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.benchmark.machine import describe_machine, installed_version
from pyprune.integrations import CalibrationStatistics, accelerate
from pyprune.ops import inverse_factor

# What rounding may do to a perplexity where it does not spread from layer to layer.
AGREEMENT = 0.002
DAMPING = 0.01
# Drift that the Hessian kernels may have: tensor cores truncate as they sum, and flush every few thousand rows.
KERNEL_TARGET = 1e-5

# name: (SparseGPT's sparsity and pattern, or None for GPTQ's W4A16 with groups of 128)
METHODS: dict[str, tuple[float, str] | None] = {
    "gptq, W4A16": None,
    "sparsegpt, 2:4": (0.5, "2:4"),
    "sparsegpt, 50 %": (0.5, "0:0"),
}

# Linears of a decoder layer by what they read. Each value: the linears, and the size of what they read.
READERS = {
    "attention": (("q_proj", "k_proj", "v_proj"), "hidden"),
    "values": (("o_proj",), "hidden"),
    "mlp": (("gate_proj", "up_proj"), "hidden"),
    "activations": (("down_proj",), "intermediate"),
}

Hessians = dict[str, Tensor]
Inputs = dict[str, list[Tensor]]


def windows_of(text: Path, model: Path, count: int, length: int) -> Tensor:
    """The first `count` windows of so many tokens, int64 [count, length]."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    count = min(count, len(tokens) // length)
    return tokens[: count * length].view(count, length)


@torch.no_grad()
def perplexity(folder: Path, windows: Tensor) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    return torch.stack(losses).mean().exp().item()


def compress(
    source: Path, output: Path, method: str, calibration: Tensor, propagated: bool, ours: bool
) -> dict[str, int]:
    """llm-compressor's own recipe for the method, written to output; how often our functions were called.

    propagated: whether layers are calibrated on the outputs of those before them once these are compressed.
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from transformers import AutoModelForCausalLM

    # Weights that are rounded to bfloat16 layer by layer let differences of 1e-7 in H grow to other masks altogether.
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    pattern = METHODS[method]
    if pattern is None:
        recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    else:
        recipe = SparseGPTModifier(sparsity=pattern[0], mask_structure=pattern[1], ignore=["re:.*lm_head"])
    with accelerate("llm-compressor") if ours else nullcontext() as calls:
        oneshot(
            model=model,
            dataset=Dataset.from_dict(tokens),
            recipe=recipe,
            num_calibration_samples=len(calibration),
            max_seq_length=calibration.shape[1],
            pipeline="sequential",
            propagate_error=propagated,
        )
    model.save_pretrained(output, save_compressed=pattern is None)
    return vars(calls) if calls else {"hessian_updates": 0, "inverse_factors": 0}


def expected_calls(source: Path, calibration: Tensor) -> dict[str, int]:
    """One update for each linear of the decoder and sample, and one factor for each linear."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    linears = sum(isinstance(m, nn.Linear) for name, m in model.named_modules() if name != "lm_head")
    return {"hessian_updates": linears * len(calibration), "inverse_factors": linears}


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    calibration = windows_of(arguments.calibration, arguments.model, arguments.samples, arguments.sequence_length)
    text = windows_of(arguments.text, arguments.model, arguments.windows, arguments.window_length)
    expected = expected_calls(arguments.model, calibration)
    rows: list[dict[str, Any]] = []
    failures = []
    report = {
        "machine": describe_machine(torch.device("cpu")),
        "versions": {name: installed_version(name) for name in ("llmcompressor", "compressed-tensors", "transformers")},
        "protocol": {
            "model": arguments.model.name,
            "calibration": f"the first {len(calibration)} x {calibration.shape[1]} tokens of "
            f"{arguments.calibration.name}",
            "evaluation": f"the first {len(text)} x {text.shape[1]} tokens of {arguments.text.name}, float32",
        },
        "dense": perplexity(arguments.model, text),
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for propagated, method in itertools.product((False, True)[: 1 + arguments.propagated], arguments.methods):
            found, calls = {}, {}
            runs = {"theirs": calibration, "ours": calibration}
            if arguments.reversed:
                runs["reversed"] = calibration.flip(0)
            for name, samples in runs.items():
                output = Path(scratch) / "model"
                calls[name] = compress(arguments.model, output, method, samples, propagated, name == "ours")
                found[name] = perplexity(output, text)
                shutil.rmtree(output)
                gc.collect()
            describe_changes = {name: found[name] / found["theirs"] - 1 for name in runs if name != "theirs"}
            rows.append(
                {
                    "method": method,
                    "propagated": propagated,
                    "perplexity": found,
                    "differences": describe_changes,
                    "calls": calls["ours"],
                }
            )
            label = f"{method}, propagated" if propagated else method
            others = "".join(f"  {name} {found[name]:9.4f} ({by:+.4%})" for name, by in describe_changes.items())
            print(f"{label:28} theirs {found['theirs']:9.4f}{others}", flush=True)
            if calls["ours"] != expected:
                failures.append(f"{label}: {calls['ours']} calls of ours, not {expected}")
            if not propagated and abs(describe_changes["ours"]) > AGREEMENT:
                failures.append(f"{label}: the perplexities differ by {describe_changes['ours']:+.2%}")
    return report | {"failures": failures}


class Reader(nn.Linear):
    """A linear that only reads: hooks see its input, and no product with its weight is taken."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return x


def layer_inputs(arguments: argparse.Namespace, device: torch.device) -> Inputs:
    """A few bfloat16 [tokens, channels] for each kind of input, with scales within a decade, to be used in turn."""
    generator = torch.Generator(device).manual_seed(0)
    made: Inputs = {}
    for name, (_, size) in READERS.items():
        channels = getattr(arguments, size)
        scales = 10 ** torch.rand(channels, device=device, generator=generator)
        shape = (arguments.distinct, arguments.tokens, channels)
        normal = torch.randn(shape, device=device, generator=generator)
        made[name] = list((normal * scales).to(torch.bfloat16))
    return made


def samples_of(inputs: Inputs, count: int) -> Iterator[dict[str, Tensor]]:
    for sample in range(count):
        yield {name: batches[sample % len(batches)] for name, batches in inputs.items()}


def linears_of(inputs: Inputs) -> dict[str, str]:
    """What each linear reads."""
    return {linear: name for name in inputs for linear in READERS[name][0]}


def different(hessians: Hessians) -> list[Tensor]:
    """Each tensor once, where linears share them."""
    return list({id(hessian): hessian for hessian in hessians.values()}.values())


def zeros(inputs: Inputs) -> Hessians:
    def square(x: Tensor) -> Tensor:
        return torch.zeros(x.shape[1], x.shape[1], device=x.device)

    return {linear: square(inputs[name][0]) for linear, name in linears_of(inputs).items()}


def running_mean(inputs: Inputs, count: int) -> Hessians:
    """The tools' formulation: for every sample n, H ← n/(n + 1)·H, then xᵀx of √(2/(n + 1))·x in float32 is added."""
    hessians, reads = zeros(inputs), linears_of(inputs)
    for n, sample in enumerate(samples_of(inputs, count)):
        for linear, hessian in hessians.items():
            hessian *= n / (n + 1)
            x = (2 / (n + 1)) ** 0.5 * sample[reads[linear]].float()
            hessian += x.T @ x
    return hessians


def plain_sums(inputs: Inputs, count: int) -> Hessians:
    """The strongest plain PyTorch: bfloat16 products into float32 where the device has them, scaled at the end."""
    hessians, reads = zeros(inputs), linears_of(inputs)
    for sample in samples_of(inputs, count):
        for linear, hessian in hessians.items():
            x = sample[reads[linear]]
            if x.is_cuda:
                hessian += torch.mm(x.T, x, out_dtype=torch.float32)
            else:
                hessian.addmm_(x.float().T, x.float())
    for hessian in hessians.values():
        hessian *= 2 / count
    return hessians


def hooked(share_inputs: bool) -> Callable[[Inputs, int], Hessians]:
    """CalibrationStatistics, by its hooks on a layer whose linears only read. A shared H is one tensor."""

    def accumulate(inputs: Inputs, count: int) -> Hessians:
        reads = linears_of(inputs)
        layer = nn.ModuleDict({linear: Reader(inputs[name][0].shape[1]) for linear, name in reads.items()})
        with CalibrationStatistics(layer, share_inputs=share_inputs) as collected:
            for sample in samples_of(inputs, count):
                for linear, name in reads.items():
                    layer[linear](sample[name])
        hessians = {linear: own.hessian() for linear, own in collected.items()}
        for hessian in different(hessians):
            hessian *= 2 / count
        return hessians

    return accumulate


def three_factorisations(h: Tensor) -> Tensor:
    """The tools' formulation, in the memory of h."""
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    torch.linalg.cholesky(h, out=h)
    torch.cholesky_inverse(h, out=h)
    return torch.linalg.cholesky(h, upper=True, out=h)


def reversed_factorisation(h: Tensor) -> Tensor:
    """The strongest plain PyTorch: one Cholesky of H with rows and columns reversed, and a triangular solve."""
    h = h.flip(0, 1)
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(h), identity, upper=False).flip(0, 1)


def our_factor(h: Tensor) -> Tensor:
    return inverse_factor(h, DAMPING).factor


# How each makes the Hessians and the factor of an inverse.
CANDIDATES: dict[str, tuple[Callable[[Inputs, int], Hessians], Callable[[Tensor], Tensor]]] = {
    "tools": (running_mean, three_factorisations),
    "plain PyTorch": (plain_sums, reversed_factorisation),
    "ours": (hooked(False), our_factor),
    "ours, shared inputs": (hooked(True), our_factor),
}


def wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(name: str, inputs: Inputs, count: int, device: torch.device) -> dict[str, float]:
    """Seconds of each stage, and the most memory beyond the inputs, MiB. Factors are dropped one by one."""
    accumulate, factorise = CANDIDATES[name]
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = wait(device)
    hessians = accumulate(inputs, count)
    middle = wait(device)
    for h in different(hessians):
        factorise(h)
    end = wait(device)
    found = {"hessians_s": middle - start, "factors_s": end - middle, "total_s": end - start}
    if device.type == "cuda":
        found["memory_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return found


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def exact_hessian(batches: list[Tensor], count: int) -> Tensor:
    """2/N·Σ xᵀx over `count` samples in float64, each batch as often as it is used."""
    channels = batches[0].shape[1]
    exact = torch.zeros(channels, channels, dtype=torch.float64, device=batches[0].device)
    for first, batch in enumerate(batches):
        uses = len(range(first, count, len(batches)))
        exact.addmm_(batch.double().T, batch.double(), alpha=2 / count * uses)
    return exact


def errors_of(inputs: Inputs, count: int, linear: str) -> dict[str, dict[str, float]]:
    """Relative errors (Frobenius) of a linear's H, of U from the rounded exact H, and of U from its own H."""
    name = linears_of(inputs)[linear]
    exact = exact_hessian(inputs[name], count)
    rounded = exact.float()
    factor_of_rounded = three_factorisations(rounded.double())
    factor = three_factorisations(exact.clone())
    found = {}
    for candidate, (accumulate, factorise) in CANDIDATES.items():
        hessian = accumulate({name: inputs[name]}, count)[linear]
        found[candidate] = {
            "hessian": relative_error(hessian, exact),
            "factor": relative_error(factorise(rounded.clone()), factor_of_rounded),
            "both": relative_error(factorise(hessian), factor),
        }
    return found


def inexact(errors: dict[str, dict[str, float]], linear: str) -> list[str]:
    """What is less exact of ours than it should be: twice the tools' error, or the Hessian kernel's own target."""
    failures = []
    for candidate in ("ours", "ours, shared inputs"):
        bounds = {
            "hessian": max(2 * errors["tools"]["hessian"], KERNEL_TARGET),
            "factor": 2 * errors["tools"]["factor"] + torch.finfo(torch.float32).eps,
        }
        for what, bound in bounds.items():
            if errors[candidate][what] > bound:
                failures.append(f"{linear}, {candidate}: the {what} is {errors[candidate][what]:.1e} off")
    return failures


@torch.no_grad()
def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    inputs = layer_inputs(arguments, device)
    errors = {linear: errors_of(inputs, arguments.samples, linear) for linear in ("q_proj", "down_proj")}
    failures = [failure for linear, found in errors.items() for failure in inexact(found, linear)]
    report: dict[str, Any] = {
        "machine": describe_machine(device),
        "shape": {name: getattr(arguments, name) for name in ("hidden", "intermediate", "samples", "tokens")},
        "repeat": arguments.repeat,
        "errors": errors,
        "rows": [],
        "failures": failures,
    }
    if failures:  # no speed of what computes something else
        return report
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    for repetition in range(-1, arguments.repeat):
        for name, found in runs.items():
            # The first round is for what is loaded, chosen and allocated at first use.
            run = timed(name, inputs, min(arguments.samples, 2) if repetition < 0 else arguments.samples, device)
            if repetition >= 0:
                found.append(run)
    print(f"{'':20} {'Hessians':>10} {'factors':>10} {'total':>10} {'x tools':>8} {'MiB':>7}")
    for name, found in runs.items():
        row = {key: statistics.median(run[key] for run in found) for key in found[0]}
        row["ratio"] = statistics.median(run["total_s"] for run in runs["tools"]) / row["total_s"]
        report["rows"].append({"candidate": name} | row)
        times = " ".join(f"{1e3 * row[f'{stage}_s']:7.1f} ms" for stage in ("hessians", "factors", "total"))
        print(f"{name:20} {times} {row['ratio']:7.1f}x {row.get('memory_mib', float('nan')):7.0f}")
    return report


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_quality = commands.add_parser("quality", help="perplexities of llm-compressor's models")
    of_quality.set_defaults(run=quality)
    of_quality.add_argument("model", type=Path)
    of_quality.add_argument("--calibration", type=Path, required=True)
    of_quality.add_argument("--text", type=Path, required=True)
    of_quality.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    of_quality.add_argument("--samples", type=int, default=64)
    of_quality.add_argument("--sequence-length", type=int, default=512)
    of_quality.add_argument("--windows", type=int, default=16)
    of_quality.add_argument("--propagated", action="store_true", help="also as is their default")
    of_quality.add_argument("--reversed", action="store_true", help="also with the samples in reverse")
    of_quality.add_argument("--window-length", type=int, default=1024)
    of_speed = commands.add_parser("speed", help="Hessians and factors of a decoder layer")
    of_speed.set_defaults(run=speed)
    of_speed.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    of_speed.add_argument("--hidden", type=int, default=4096)
    of_speed.add_argument("--intermediate", type=int, default=11008)
    of_speed.add_argument("--samples", type=int, default=128)
    of_speed.add_argument("--tokens", type=int, default=2048, help="of a sample")
    # Eight times 2048 tokens are more than 11008 channels: H has full rank.
    of_speed.add_argument("--distinct", type=int, default=8, help="different samples, used in turn")
    of_speed.add_argument("--repeat", type=int, default=3)
    for command in (of_quality, of_speed):
        command.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    return parser


def main() -> None:
    arguments = argument_parser().parse_args()
    report = arguments.run(arguments)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if report["failures"]:
        raise SystemExit("\n".join(report["failures"]))


if __name__ == "__main__":
    main()
