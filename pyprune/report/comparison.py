"""Several outputs side by side: what a run of each cost, and what it left."""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..exporters.exclusive import exclusive_file
from ..job.record import FILE, FORMAT, read_plan
from ..runtime.units import bytes_text, count_text, seconds_text
from . import plots
from .naming import is_self_judged, model_name, options_text
from .quantities import kinds
from .sections import Plot, plot
from .sparse import is_sparse
from .tables import difference_text, with_error
from .templating import render

COLUMNS = ("output", "method", "ratio", "size", "perplexity", "KL", "time", "memory")
LABEL = 28  # letters of a name that a plot's legend has room for


@dataclass(frozen=True)
class Run:
    """An output and its plan. text: a letter for the evaluation's windows, the same for the same ones; "" without."""

    name: str
    plan: dict[str, Any]
    text: str

    @property
    def evaluation(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.plan.get("evaluation")
        return found


def read_runs(outputs: list[Path]) -> list[Run]:
    """Read the plans of outputs. InputError: one is no output, or is named twice."""
    plans: dict[str, dict[str, Any]] = {}
    seen: set[Path] = set()
    for output in outputs:
        if output.resolve() in seen:
            raise InputError(f"{output}: named twice")
        seen.add(output.resolve())
        plans[str(output)] = _plan_of(output)
    keys = {name: _text_key(name, plan) for name, plan in plans.items()}
    known = [key for key in dict.fromkeys(keys.values()) if key]
    letters = {key: f"{string.ascii_uppercase[n % 26]}{n // 26 or ''}" for n, key in enumerate(known)} | {"": ""}
    return [Run(name, plan, letters[keys[name]]) for name, plan in plans.items()]


def _plan_of(output: Path) -> dict[str, Any]:
    if not (output / FILE).is_file():
        unfinished = "; it is an unfinished run" if output.name.endswith(".partial") else ""
        raise InputError(f"{output}: no output of `pyprune prune` (it has no {FILE}){unfinished}")
    plan = read_plan(output)
    if plan.get("format") != FORMAT:
        raise InputError(f"{output}: its plan has format {plan.get('format')!r}: this version reads {FORMAT!r}")
    return plan


def _text_key(name: str, plan: dict[str, Any]) -> str:
    """Text that is the same for the same evaluation windows; "" without an evaluation.

    Plans of earlier versions do not tell their windows: theirs are like no others.
    """
    evaluation = plan.get("evaluation")
    return str(evaluation["pruned"].get("text_fingerprint", f"of {name}")) if evaluation else ""


def notes_of(runs: list[Run]) -> list[str]:
    """What must be known before figures of these runs are compared."""
    notes = []
    bases = dict.fromkeys(json.dumps(run.plan["source"]["digests"], sort_keys=True) for run in runs)
    if len(bases) > 1:
        names = ", ".join(dict.fromkeys(run.plan["model"] for run in runs))
        notes.append(f"{len(bases)} different base models ({names}): sizes and perplexities start from different ones")
    texts = {run.text: run for run in runs if run.text}
    if len(texts) > 1:
        said = "; ".join(f"{letter}: {_text_of(run)}" for letter, run in texts.items())
        notes.append(f"perplexities of different texts or windows, not to be compared across letters: {said}")
    devices = dict.fromkeys(run.plan["device"] for run in runs)
    if len(devices) > 1:
        notes.append(f"times and memory of different devices: {'; '.join(devices)}")
    return notes


def _text_of(run: Run) -> str:
    assert run.evaluation is not None
    pruned = run.evaluation["pruned"]
    judged = ", self-judged" if is_self_judged(run.evaluation) else ""
    unknown = "" if "text_fingerprint" in pruned else ", which windows is not recorded"
    return f"{pruned['windows']} × {pruned['sequence_length']} tokens of {run.evaluation['text']}{judged}{unknown}"


def document_of(runs: list[Run]) -> dict[str, Any]:
    """The comparison as JSON."""
    return {"notes": notes_of(runs), "outputs": [_entry(run) for run in runs]}


def _entry(run: Run) -> dict[str, Any]:
    plan = run.plan
    same = ("model", "method", "options", "ratio", "parameters", "bytes", "seconds", "peak_memory_bytes", "device")
    entry = {"output": run.name} | {name: plan[name] for name in same} | {"kept_by_layer": _kept_shares(plan)}
    evaluation = {name: value for name, value in (run.evaluation or {}).items() if name != "continuations"}
    return entry | ({"evaluation": evaluation | {"text_letter": run.text}} if evaluation else {})


def summary_rows(runs: list[Run]) -> list[list[str]]:
    """The table of a terminal: a heading for each column, then a row for each output."""
    several = len({run.text for run in runs if run.text}) > 1
    rows = []
    for run in runs:
        plan, evaluation = run.plan, run.evaluation
        row = [run.name, plan["method"], f"{plan['ratio']['met']:.4f}", bytes_text(plan["bytes"][1])]
        if evaluation:
            letter = f" ({run.text})" if several else ""
            divergence = evaluation["pruned"].get("kl_divergence")
            row += [with_error(evaluation["pruned"]) + letter, "" if divergence is None else f"{divergence:.4f}"]
        else:
            row += ["", ""]
        rows.append([*row, seconds_text(plan["seconds"]), bytes_text(plan["peak_memory_bytes"])])
    return [list(COLUMNS), *rows]


def write_comparison(runs: list[Run], path: Path) -> None:
    """Write the page, which needs nothing else. The same plans and names give the same bytes."""
    page = render(
        "comparison.html",
        title=", ".join(dict.fromkeys(model_name(run.plan["model"]) for run in runs)),
        notes=notes_of(runs),
        head=["", *(run.name for run in runs)],
        rows=_rows(runs),
        layers=_layer_plots(runs),
    )
    with exclusive_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _rows(runs: list[Run]) -> list[list[str]]:
    """The page's table: a row for each figure, a column for each output."""

    def row(name: str, value: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *(value(run.plan) for run in runs)]

    def evaluated(name: str, value: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *(value(run.evaluation) if run.evaluation else "" for run in runs)]

    rows = [
        row("Base model", lambda plan: model_name(plan["model"])),
        row("Method", lambda plan: plan["method"]),
        row("Options", options_text),
        row("Ratio met", lambda plan: f"{plan['ratio']['met']:.4f}"),
        row("Parameters", lambda plan: count_text(plan["parameters"]["model"][1])),
        row("Size of the weights", lambda plan: bytes_text(plan["bytes"][1])),
    ]
    if any(run.evaluation for run in runs):
        rows += [
            ["Evaluation text", *(f"{run.text}: {_text_of(run)}" if run.evaluation else "" for run in runs)],
            evaluated("Perplexity before", lambda own: with_error(own["dense"])),
            evaluated("Perplexity after", lambda own: with_error(own["pruned"])),
            evaluated("Paired difference", _difference),
            evaluated("KL divergence, nats a token", lambda own: f"{own['pruned']['kl_divergence']:.4f}"),
            evaluated("Same most likely token", lambda own: f"{own['pruned']['top1_agreement']:.2%}"),
        ]
    return [
        *(own for own in rows if any(own[1:])),  # all options may be the defaults
        row("Time", lambda plan: seconds_text(plan["seconds"])),
        row("Peak memory", lambda plan: bytes_text(plan["peak_memory_bytes"])),
        row("Device", lambda plan: plan["device"]),
    ]


def _difference(evaluation: dict[str, Any]) -> str:
    pruned = evaluation["pruned"]
    return difference_text(pruned) if pruned.get("perplexity_difference_standard_error") is not None else ""


def _kept_shares(plan: dict[str, Any]) -> dict[str, list[float]]:
    """By kind of unit the share that each layer keeps; of a model with zeros, the share of weights that are none."""
    if is_sparse(plan):
        shares = []
        for layer in plan["layers"]:
            linears = layer["linears"].values()
            shares.append(1 - sum(own["zeros"] for own in linears) / sum(own["weights"] for own in linears))
        return {"Weights that are not zero": shares}
    return {
        kind.title.split(" (")[0]: [len(layer[kind.key]) / kind.dense for layer in plan["layers"]]
        for kind in kinds(plan)
    }


def _layer_plots(runs: list[Run]) -> list[Plot]:
    """A plot for each kind of unit, with a line for each output that has it."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for title, shares in _kept_shares(run.plan).items():
            found.setdefault(title, {})[_label(run.name)] = shares
    return [plot(title, plots.lines(own, "share kept", title)) for title, own in found.items()]


def _label(name: str) -> str:
    """A legend's text, as matplotlib takes it: no mathematics, and no name that it hides."""
    text = name if len(name) <= LABEL else f"…{name[1 - LABEL :]}"
    return text.replace("$", r"\$").removeprefix("_")
