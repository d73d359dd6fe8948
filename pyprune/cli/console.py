"""Print results: tables or one JSON document on stdout, progress bars on stderr."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
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
        bars = Progress(*columns, console=self.err, disable=not distributed.is_main_process())
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            name = what.split(":")[0]  # figures may follow, which change as it goes
            if name not in tasks:
                bars.start()
                tasks[name] = bars.add_task(what, total=total)
            bars.update(tasks[name], completed=done, total=total, description=what)

        try:
            yield advance
        finally:
            if tasks:  # without a bar it would print an empty line
                bars.stop()

    def note(self, message: str) -> None:
        """Print a remark beside the result on stderr."""
        self.err.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)

    def _json(self, document: Any) -> None:
        print(json.dumps(document, indent=1))

    def rows(self, rows: list[tuple[str, str]]) -> None:
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in rows:
            # Text: a path may hold what looks like markup; folded, never cut.
            table.add_row(name, Text(value, overflow="fold"))
        self.out.print(table)

    def _summary(self, rows: list[tuple[str, str]]) -> None:
        """Print a summary of work whose result is on the disk."""
        streams.forgive()
        self.rows(rows)

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
            self._json(summary | {name: plan[name] for name in ("evaluation", "target") if name in plan})
            return
        rows = [
            ("output", str(output)),
            ("ratio met", f"{ratio['met']:.4f} of the decoder linears (asked {ratio['asked']:g})"),
            ("", f"{ratio['of_model']:.4f} of the whole model"),
            ("size", " → ".join(bytes_text(n) for n in plan["bytes"])),
            *_target_row(plan),
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
            self.rows(perplexity_rows(result))
        for text, own in result.get("texts", {}).items():
            self.rows([("text", text), *perplexity_rows(own)])
        if "task_evaluation" in result:
            self._tasks(result["task_evaluation"], result.get("reference_task_evaluation"))

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
            ("disk", _disk(result)),
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
        self.rows(rows)

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
        self.table(rows[0], rows[1:])
        self._summary([("page", str(page))])

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(box=None, pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, overflow="fold") for cell in row))
        self.out.print(table)


def _target_row(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The size that was asked for in place of a ratio, and the one met."""
    target = plan.get("target")
    if target is None:
        return []
    unit = "bytes" if target["kind"] == "size" else "parameters"
    return [("target", f"{target['met']:,} {unit} (asked {target['asked']:,})")]


def _disk(result: dict[str, Any]) -> str:
    """Bytes read, the seconds that takes, and bytes written."""
    reading = result["reading"]
    time = f"about {seconds_text(reading['seconds'])} at {bytes_text(reading['bytes_per_second'])}/s"
    written = bytes_text(result["bytes_written"])
    return f"{bytes_text(reading['bytes'])} read ({time}, beside the computing), {written} written"


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
