"""Print results: tables or one JSON document on stdout, progress bars on stderr."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..methods.options import flag_of
from ..ops.dispatch import BackendRow
from ..runtime import distributed, streams
from ..runtime.progress import Progress as Advance
from ..runtime.units import bytes_text, seconds_text
from .figures import evaluation_rows, perplexity_rows


class Console:
    """Prints the results of one command, as JSON if `as_json`."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        # Into a file or a pipe lines are as long as they are.
        self.out = RichConsole(width=None if sys.stdout.isatty() else 400)
        self.err = RichConsole(stderr=True)

    @contextmanager
    def progress(self) -> Iterator[Advance]:
        """A callback (what, done, total) that draws a bar for each thing under way; the first of several processes."""
        columns = (
            TextColumn("{task.description:>16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, disable=not distributed.is_main_process()) as bars:
            tasks: dict[str, Any] = {}

            def advance(what: str, done: int, total: int) -> None:
                name = what.split(":")[0]  # figures may follow, which change as it goes
                if name not in tasks:
                    tasks[name] = bars.add_task(what, total=total)
                bars.update(tasks[name], completed=done, total=total, description=what)

            yield advance

    def note(self, message: str) -> None:
        """Print a remark beside the result on stderr."""
        self.err.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)

    def _json(self, document: Any) -> None:
        print(json.dumps(document, indent=1))

    def _rows(self, rows: list[tuple[str, str]]) -> None:
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in rows:
            # Text: a path may hold what looks like markup; folded, never cut.
            table.add_row(name, Text(value, overflow="fold"))
        self.out.print(table)

    def _summary(self, rows: list[tuple[str, str]]) -> None:
        """Print a summary of work whose result is on the disk."""
        streams.forgive()
        self._rows(rows)

    def pruned(self, plan: dict[str, Any], output: Path) -> None:
        ratio = plan["ratio"]
        if self.as_json:
            summary = {
                "output": str(output),
                "method": plan["method"],
                "ratio": ratio["met"],
                "ratio_asked": ratio["asked"],
                "ratio_of_model": ratio["of_model"],
                "parameters": plan["parameters"],
                "bytes": plan["bytes"],
                "seconds": plan["seconds"],
                "peak_memory_bytes": plan["peak_memory_bytes"],
                "nonfinite": plan["nonfinite"],
                "warnings": plan["warnings"],
                "verification": plan["verification"],
                "calibration_cached": plan["passes"].get("calibration", {}).get("cached", False),
            }
            self._json(summary | ({"evaluation": plan["evaluation"]} if "evaluation" in plan else {}))
            return
        rows = [
            ("output", str(output)),
            ("ratio met", f"{ratio['met']:.4f} of the decoder linears (asked {ratio['asked']:g})"),
            ("", f"{ratio['of_model']:.4f} of the whole model"),
            ("size", " → ".join(bytes_text(n) for n in plan["bytes"])),
            ("time", seconds_text(plan["seconds"])),
            ("peak memory", bytes_text(plan["peak_memory_bytes"])),
            _proof(plan["verification"]),
            ("report", str(output / "report.html")),
        ]
        if "evaluation" in plan:
            rows += evaluation_rows(plan["evaluation"])
        rows += [("warning", warning) for warning in plan["warnings"]]
        for output_proj, count in plan["nonfinite"].items():
            rows.append(("counted as zero", f"{count} NaN or Inf activations in {output_proj}"))
        if "note" in ratio:
            rows.insert(2, ("", ratio["note"]))
        self._summary(rows)

    def evaluated(self, result: dict[str, Any]) -> None:
        if self.as_json:
            self._json(result)
            return
        if "perplexity" in result:
            self._rows(perplexity_rows(result))
        for text, own in result.get("texts", {}).items():
            self._rows([("text", text), *perplexity_rows(own)])
        if "task_evaluation" in result:
            self._tasks(result["task_evaluation"], result.get("reference_task_evaluation"))

    def _figures(self, figures: dict[str, Any]) -> None:
        self._rows([(name.replace("_", " "), f"{value:.6g}") for name, value in figures.items()])

    def _tasks(self, model: dict[str, Any], reference: dict[str, Any] | None) -> None:
        table = Table(box=None, pad_edge=False)
        for heading in ("task", "metric", "examples", "value", *(["reference"] if reference else [])):
            table.add_column(heading, overflow="fold")
        for kind in ("tasks", "groups"):
            for name, entry in model[kind].items():
                for metric, figure in entry["metrics"].items():
                    cells = [_with_error(figure)]
                    if reference:
                        cells.append(_with_error(reference[kind][name]["metrics"][metric]))
                    table.add_row(name, metric, str(entry["examples"]), *cells)
        self.out.print(table)

    def estimated(self, result: dict[str, Any]) -> None:
        if self.as_json:
            self._json(result)
            return
        before, after = result["parameters"]["decoder_linears"]
        rows = [
            ("method", result["method"]),
            ("decoder linears", f"{before / 1e6:,.2f} M → {after / 1e6:,.2f} M parameters"),
            ("size", " → ".join(bytes_text(n) for n in result["bytes"])),
            ("peak memory", f"about {bytes_text(result['peak_memory_bytes'])} on {result['device']}"),
            ("disk", f"{result['bytes_read'] / 1e6:,.1f} MB read, {result['bytes_written'] / 1e6:,.1f} MB written"),
        ]
        if "hidden_states" in result:
            host = f"about {result['host_memory_bytes'] / 1e6:,.0f} MB; hidden states: {result['hidden_states']}"
            rows.append(("host memory", host))
        for step in result["passes"]:
            rows.append((f"{step['pass']} pass", f"{step['flops'] / 1e12:,.2f} TFLOP, about {step['seconds']:,.1f} s"))
        if result["zeros"]:
            rows.append(("layers", "every shape stays; the weights removed are zeros"))
        elif result["layers"] is None:
            rows.append(("layers", "each layer's size follows from the text"))
        else:
            sizes = [
                f"{own['kv_groups']} KV groups, {own['intermediate_channels']} FFN channels" for own in result["layers"]
            ]
            if len(set(sizes)) == 1:
                rows.append(("each layer", sizes[0]))
            else:
                rows += [(f"layer {layer}", size) for layer, size in enumerate(sizes)]
        self._rows(rows)

    def exported(self, result: dict[str, Any]) -> None:
        if self.as_json:
            self._json(result)
            return
        before, after = result["bytes"]
        rows = [
            ("output", result["output"]),
            ("format", f"{result['format']}: {result['class']}"),
            ("size", f"{bytes_text(before)} → {bytes_text(after)}"),
        ]
        rows += [("note", note) for note in result["notes"]]
        self._summary([*rows, _proof(result["verification"])])

    def pushed(self, result: dict[str, Any]) -> None:
        if self.as_json:
            self._json(result)
            return
        rows = [("output", result["output"]), ("repository", result["url"]), ("commit", result["commit"])]
        self._summary([*rows, *(("note", note) for note in result["notes"])])

    def compared(self, document: dict[str, Any], rows: list[list[str]], page: Path) -> None:
        """rows: a heading for each column, then a row for each output."""
        for note in document["notes"]:
            self.note(note)
        if self.as_json:
            self._json(document)
            return
        table = Table(box=None, pad_edge=False)
        for heading in rows[0]:
            table.add_column(heading, overflow="fold")
        for row in rows[1:]:
            table.add_row(*(Text(cell, overflow="fold") for cell in row))
        self.out.print(table)
        self._summary([("page", str(page))])

    def backends(self, rows: list[BackendRow], installation: dict[str, str]) -> None:
        if self.as_json:
            self._json({"installation": installation, "operators": [dataclasses.asdict(row) for row in rows]})
            return
        self._rows(list(installation.items()))
        table = Table(box=None, pad_edge=False)
        for heading in ("operator", "device", "dtype", "runs on", "why not the others"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            reasons = "\n".join(f"{backend}: {reason}" for backend, reason in row.reasons.items())
            table.add_row(row.operator, row.device, row.dtype, row.backend, reasons)
        self.out.print(table)

    def methods(self, described: dict[str, dict[str, Any]]) -> None:
        """All methods with their options' defaults, or one method with all that its options say."""
        if self.as_json:
            self._json({name: _method_document(own) for name, own in described.items()})
            return
        if len(described) == 1:
            self._method(*described.values())
            return
        table = Table(box=None, pad_edge=False)
        for heading in ("method", "what it does", "options and defaults"):
            table.add_column(heading, overflow="fold")
        for name, entry in described.items():
            options = "\n".join(f"{flag_of(option)} {own['default']}" for option, own in entry["options"].items())
            table.add_row(name, entry["summary"], options)
        self.out.print(table)

    def _method(self, described: dict[str, Any]) -> None:
        self._rows([("method", described["name"]), ("", described["summary"])])
        table = Table(box=None, pad_edge=False)
        for heading in ("option", "type", "default", "choices", "what it does"):
            table.add_column(heading, overflow="fold")
        for name, own in described["options"].items():
            cells = (flag_of(name), own["type"], str(own["default"]), ", ".join(own["choices"] or ()), own["help"])
            table.add_row(*(Text(cell) for cell in cells))
        self.out.print(table)


def _method_document(described: dict[str, Any]) -> dict[str, Any]:
    """JSON of one method: its options' defaults by name, and in `option_details` all that the options say."""
    defaults = {name: own["default"] for name, own in described["options"].items()}
    return described | {"options": defaults, "option_details": described["options"]}


def _proof(verification: dict[str, Any]) -> tuple[str, str]:
    """A row: what the round trip showed, or why there was none."""
    if not verification["verified"]:
        return "not verified", verification["reason"]
    found = f"max |Δ| {verification['max_difference']:.3g} of logits up to {verification['max_logit']:.3g}"
    limit = f"at most {verification['tolerance']:.3g} allowed"
    return "verified", f"{found}, {limit} ({verification['tokens']} tokens, loaded by {verification['loader']})"


def _with_error(figure: dict[str, Any]) -> str:
    """A metric's value, and its standard error where it is known."""
    error = figure["standard_error"]
    return f"{figure['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")
