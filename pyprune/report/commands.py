"""Command lines of a report: the run again, and what to do next."""

import re
import shlex
from pathlib import Path
from typing import Any

from ..calibration import CONCATENATE
from ..checkpoint import SHARD_SIZE
from ..checkpoint.model_in_memory import IN_MEMORY
from ..job.run_file import FILE as RUN_FILE
from ..methods.options import flag_of
from .naming import chosen_options, model_name

# `calibration.source.described` of texts that were given in Python, which no command line can name.
_GIVEN = re.compile(r"token ids \[.*\]|\d+ documents|(Iterable)?Dataset")


def prune_command(plan: dict[str, Any], output: str) -> str | None:
    """The command that repeats the run on a machine like its own; None: the model or a text was given in Python."""
    calibration, evaluation = plan["calibration"], plan.get("evaluation")
    texts = [*_calibration_texts(calibration), *([evaluation["text"]] if evaluation else [])]
    if plan["model"].endswith(IN_MEMORY) or any(_GIVEN.fullmatch(text) for text in texts):
        return None
    words = ["prune", plan["model"], output, "--method", plan["method"], *_amount_words(plan)]
    words += _option_words(chosen_options(plan))
    if calibration:
        words += _calibration_words(calibration)
    if plan["seed"]:
        words += ["--seed", str(plan["seed"])]
    words += ["--dtype", plan["dtype"]]
    shard_size = plan.get("identity", {}).get("shard_size", SHARD_SIZE)
    if shard_size != SHARD_SIZE:
        words += ["--shard-size", str(shard_size)]
    if evaluation:
        pruned = evaluation["pruned"]
        words += ["--evaluate", evaluation["text"], "--evaluation-length", str(pruned["sequence_length"])]
        words += ["--max-windows", str(pruned["windows"])]
    processes = plan.get("identity", {}).get("processes", 1)
    start = ["pyprune"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}", "-m", "pyprune"]
    return shlex.join([*start, *words])


def _amount_words(plan: dict[str, Any]) -> list[str]:
    """How much to remove, as it was asked."""
    target = plan.get("target")
    if target is None:
        return ["--ratio", f"{plan['ratio']['asked']:g}"]
    return ["--target-size" if target["kind"] == "size" else "--parameters", str(target["asked"])]


def run_file_command(plan: dict[str, Any], output: str) -> str:
    """The command that takes the settings from the run file in the output's folder."""
    return shlex.join(["pyprune", "prune", plan["model"], "OUTPUT", "--config", f"{output.rstrip('/')}/{RUN_FILE}"])


def next_steps(plan: dict[str, Any], output: str, exports: bool) -> list[tuple[str, str]]:
    """What to do with the result: (in words, a command). exports: whether llama.cpp has an architecture for it."""
    name = Path(output).name or model_name(plan["model"])
    quoted, model = shlex.quote(output), shlex.quote(plan["model"].removesuffix(IN_MEMORY))
    steps = [("Measure it on your text:", f"pyprune evaluate {quoted} --text TEXT.txt --reference {model}")]
    if exports:
        file = shlex.quote(f"{output.rstrip('/')}.gguf")
        steps.append(("Make a file for llama.cpp and Ollama:", f"pyprune export {quoted} {file} --format gguf"))
    steps.append(("See it beside another run:", f"pyprune compare {quoted} OTHER"))
    steps.append((f"Publish it; {name}/README.md is its model card:", f"pyprune push {quoted} ORG/NAME"))
    return steps


def _calibration_texts(calibration: dict[str, Any] | None) -> list[str]:
    """Names of the calibration texts; a record of one text only may have no entry for each."""
    if calibration is None:
        return []
    return [own["text"] for own in calibration.get("sources", ())] or [calibration["text"]]


def _calibration_words(calibration: dict[str, Any]) -> list[str]:
    texts = _calibration_texts(calibration)
    if len(texts) > 1:
        texts = [f"{own['text']}={own['share']:.6g}" for own in calibration["sources"]]
    words = [word for text in texts for word in ("--calibration", text)]
    if "text_column" in calibration:
        words += ["--text-column", calibration["text_column"]]
    if calibration.get("packing", CONCATENATE) != CONCATENATE:
        words += ["--packing", calibration["packing"]]
    words += ["--samples", str(calibration["samples"])]
    return [*words, "--sequence-length", str(calibration["sequence_length"])]


def _option_words(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        flag = flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            words += [flag, str(value)]
    return words
