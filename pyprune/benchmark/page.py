"""The page of one or several results: one HTML file that needs no network. The same results give the same bytes."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from .case import OTHER, OURS, PYTORCH
from .page_assets import SCRIPT, STYLE
from .page_history import history
from .page_plots import roofline
from .rates import Rates
from .results import (
    Document,
    Row,
    device_name,
    duration,
    fastest,
    headline,
    median,
    share_of_floor,
    times_faster,
)

Cell = tuple[str, Any, str]  # HTML, what it is sorted by, class
HEAD = (
    ("row", ""),
    ("runs on", ""),
    ("time", "n"),
    ("of the floor", "n"),
    ("× PyTorch", "n"),
    ("× other tool's way", "n"),
    ("error", "n"),
    ("PyTorch's", "n"),
    ("allowed", "n"),
)
INTRODUCTION = (
    "Every result is compared with float64 first; one whose error is above the limit is not timed. Caches are cold: a "
    "large buffer is read before each repetition. Times are medians. The floor is the least possible work, at "
    "the rates at which this device copied and multiplied in the same run; products that are split over tensor cores "
    "count as float32. The baseline is the fastest of several ways in PyTorch, whatever its error; other tools' "
    "formulations are in our own words, sources beside them."
)


def write_page(documents: Sequence[Document], path: Path) -> None:
    """documents: oldest first. Of every device the newest row of each id is shown, earlier ones as its history."""
    by_device: dict[str, list[Document]] = {}
    for document in documents:
        by_device.setdefault(device_name(document), []).append(document)
    operators = dict.fromkeys(row["operator"] for document in documents for row in document["rows"])
    options = "".join(f"<option>{escape(name)}</option>" for name in operators)
    sections = "".join(device_section(number, own) for number, own in enumerate(by_device.values()))
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pyprune benchmark</title>
<style>{STYLE}</style>
</head>
<body><main>
<h1>pyprune benchmark</h1>
<p>{escape(INTRODUCTION)}</p>
<div class="filters">
<select id="operator" aria-label="operator"><option value="">all operators</option>{options}</select>
<input id="text" type="search" placeholder="part of a row's name" aria-label="part of a row's name">
</div>
{sections}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def device_section(number: int, documents: Sequence[Document]) -> str:
    newest = documents[-1]
    # A row of the newest document that has it, with the rates that its floor rests on.
    latest: dict[str, tuple[Row, Document]] = {}
    for document in documents:
        latest |= {row["id"]: (row, document) for row in document["rows"]}
    rows = [row for row, _ in latest.values()]
    plots = "".join(
        operator_plot(number, name, list(latest.values())) for name in dict.fromkeys(r["operator"] for r in rows)
    )
    rooflines = f'<div class="block"><h3>Rooflines</h3><div class="plots">{plots}</div></div>' if plots else ""
    details = "".join(row_details(number, row, document) for row, document in latest.values())
    return f"""<h2>{escape(device_name(newest))}</h2>
{tiles(newest, rows)}
{machine_facts(newest)}
<div class="block">{main_table(number, rows)}</div>
{rooflines}
{history(documents)}
<div class="block"><h3>Every candidate, and the command that repeats a row</h3>{details}</div>
"""


def tiles(document: Document, rows: Sequence[Row]) -> str:
    rates = document["rates"]
    shown = [(rate(rates["copy"], "B/s"), "copy, read and written")]
    for name in ("bfloat16", "float32", "tf32"):
        if rates[name]:
            shown.append((rate(rates[name], "FLOP/s"), f"{name} products"))
    # A CPU gets small sizes and has kernels of few operators: their mean is no measure of a model's speed.
    judged = [] if document["device"] == "cpu" else rows
    faster = [times for row in judged if (times := times_faster(row, PYTORCH, OTHER)) is not None]
    if faster:
        shown.append(
            (f"{statistics.geometric_mean(faster):.2f} ×", f"the fastest PyTorch, geometric mean of {len(faster)}")
        )
    wrong = sum(bool(row["faults"]) for row in rows)
    shown.append((str(len(rows)), "rows, all correct" if not wrong else f"rows, {wrong} not correct"))
    cells = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in shown)
    return f'<div class="tiles">{cells}</div>'


def rate(value: float, unit: str) -> str:
    return f"{value * 1e-12:.3g} T{unit}" if value >= 1e12 else f"{value * 1e-9:.3g} G{unit}"


def machine_facts(document: Document) -> str:
    facts = dict(document["machine"])
    if document["tuned"]:
        facts["tuned configurations"] = f"{document['tuned']['file']} ({document['tuned']['fingerprint']})"
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    )
    return f'<details class="block"><summary>Machine and versions</summary><table>{rows}</table></details>'


def main_table(number: int, rows: Sequence[Row]) -> str:
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in HEAD)
    body = "".join(
        f'<tr data-operator="{escape(row["operator"])}" data-id="{escape(row["id"])}">'
        + "".join(
            f'<td class="{kind}" data-value="{escape(str(value))}">{html}</td>'
            for html, value, kind in cells(number, row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def cells(number: int, row: Row) -> list[Cell]:
    place = f"{row['where']}, {row['size']}, {row['dtype']}"
    link = f'<a href="#{anchor(number, row)}">{escape(row["operator"])}</a><small>{escape(place)}</small>'
    first: Cell = (link, row["id"], "id")
    own = headline(row)
    if own is None:
        why = "; ".join(row["faults"]) or row["reason"] or "see below"
        first = (f'{link}<small class="bad">{escape(why)}</small>', row["id"], "id")
        status = "not correct" if row["faults"] else "not timed"
        return [first, (f'<span class="bad">{status}</span>', "", ""), *[("", "", "n")] * (len(HEAD) - 2)]
    time, share = own["microseconds"], share_of_floor(row) or 0.0
    bar = f'<span class="share"><i style="width:{min(share, 1.0):.0%}"></i></span>'
    return [
        first,
        (escape(own["name"]), own["name"], ""),
        (
            f"{duration(time['median'])}<small>{duration(time['low'])} to {duration(time['high'])}</small>",
            time["median"],
            "n",
        ),
        (f"{bar}{share:.0%}<small>{row['bound']}</small>", share, "n"),
        baseline_cell(row, PYTORCH, OTHER),
        baseline_cell(row, OTHER),
        *error_cells(row, own),
    ]


def baseline_cell(row: Row, *kinds: str) -> Cell:
    times, baseline = times_faster(row, *kinds), fastest(row, *kinds)
    if times is None or baseline is None:
        return "", "", "n"
    kind = "good" if times > 1 else "bad"
    return f'<span class="{kind}">{times:.2f} ×</span><small>{escape(shortened(baseline["name"]))}</small>', times, "n"


def error_cells(row: Row, own: dict[str, Any]) -> list[Cell]:
    """The error nearest to its limit, beside that of the fastest PyTorch where it is of the same quantity."""
    if not row["allowed"]:
        return [("", "", "n")] * 3
    what = max(row["allowed"], key=lambda name: own["errors"][name] / (row["allowed"][name] or 1.0))
    baseline = fastest(row, PYTORCH, OTHER)
    theirs = (baseline or {}).get("errors") or {}
    mine, allowed = own["errors"][what], row["allowed"][what]
    found = f"{theirs[what]:.1e}" if what in theirs else "–"
    return [
        (f"{mine:.1e}<small>{escape(what)}</small>", mine, "n"),
        (found, theirs.get(what, ""), "n"),
        (f"{allowed:.1e}", allowed, "n"),
    ]


def shortened(name: str) -> str:
    return name if len(name) <= 30 else name[:29] + "…"


def operator_plot(number: int, operator: str, latest: Sequence[tuple[Row, Document]]) -> str:
    own = [(row, document) for row, document in latest if row["operator"] == operator]
    svg = roofline([row for row, _ in own], Rates(**own[-1][1]["rates"]), f"{number} {operator}")
    if not svg:
        return ""
    name = escape(operator)
    return f'<figure data-operator="{name}"><figcaption>{name}</figcaption>{svg}</figure>'


def row_details(number: int, row: Row, document: Document) -> str:
    lines = "".join(candidate_line(one) for one in row["candidates"])
    head = "".join(f"<th>{name}</th>" for name in ("", "time", "low to high", "host", "repeated", "memory", "errors"))
    words = (
        f"{row['bytes'] / 1e6:,.1f} MB, {row['flops'] / 1e9:,.1f} GFLOP: at least {duration(row['floor_microseconds'])}"
    )
    reason = f'<p class="bad">{escape(row["reason"])}</p>' if row["reason"] else ""
    return (
        f'<details id="{anchor(number, row)}" data-operator="{escape(row["operator"])}" data-id="{escape(row["id"])}">'
        f"<summary><code>{escape(row['id'])}</code></summary><pre>{escape(command(row, document))}</pre>"
        f"<p>{escape(words)}, {escape(row['bound'])}.</p>{reason}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></details>"
    )


def command(row: Row, document: Document) -> str:
    compiled = any(one["name"].endswith(", compiled") for one in row["candidates"])
    flags = ["--compile"] if compiled else []
    return shlex.join(["pyprune", "benchmark", "--device", document["device"], *flags, "--row", row["id"]])


def candidate_line(one: dict[str, Any]) -> str:
    name = f"pyprune, {one['name']}" if one["kind"] == OURS and one["name"] != OURS else one["name"]
    source = f"<small>{escape(one['source'])}</small>" if one["source"] else ""
    errors = ", ".join(f"{what} {error:.1e}" for what, error in (one["errors"] or {}).items()) or "–"
    memory = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e6:,.0f} MB"
    time = one["microseconds"]
    if time is None:
        figures = f'<td colspan="4"><span class="bad">{escape(one["status"])}</span>: {escape(one["reason"])}</td>'
    else:
        span = f"{duration(time['low'])} to {duration(time['high'])}"
        figures = "".join(
            f"<td>{text}</td>" for text in (duration(median(one)), span, duration(time["host"]), str(time["repeat"]))
        )
    return f"<tr><th>{escape(name)}{source}</th>{figures}<td>{memory}</td><td>{errors}</td></tr>"


def anchor(number: int, row: Row) -> str:
    return f"row-{number}-{row['id'].replace('/', '-')}"
