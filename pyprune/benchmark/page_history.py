"""History of a row's time over the results of one device."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .results import Document, duration, headline


def history(documents: Sequence[Document]) -> str:
    """A table of the rows that more than one of the documents timed, oldest first; "" where there is none."""
    runs = [{row["id"]: row for row in document["rows"]} for document in documents]
    ids = dict.fromkeys(id for run in runs for id in run)
    lines = [line for id in ids if (line := history_line(id, [run.get(id) for run in runs]))]
    if not lines:
        return ""
    head = "".join(f'<th class="n">{run_name(document)}</th>' for document in documents)
    return (
        '<div class="block"><h3>History</h3><p>The preferred backend’s median. A change counts where the ranges from '
        "the first to the last decile do not meet.</p>"
        f'<table class="sortable"><thead><tr><th>row</th>{head}<th class="n">first to last</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def run_name(document: Document) -> str:
    machine = document["machine"]
    version = machine.get("commit") or machine.get("pyprune") or ""
    return f"{escape(machine['date'][:10])}<small>{escape(str(version))}</small>"


def history_line(id: str, rows: Sequence[dict[str, Any] | None]) -> str:
    own = [None if row is None else headline(row) for row in rows]
    timed = [one["microseconds"] for one in own if one is not None]
    if len(timed) < 2:
        return ""
    cells = "".join(
        '<td class="n" data-value=""></td>'
        if one is None
        else f'<td class="n" data-value="{one["microseconds"]["median"]}">{duration(one["microseconds"]["median"])}'
        f"<small>{escape(one['name'])}</small></td>"
        for one in own
    )
    text, kind, change = changed(timed[0], timed[-1])
    operator = escape(id.partition("/")[0])
    return (
        f'<tr data-operator="{operator}" data-id="{escape(id)}"><td class="id" data-value="{escape(id)}">'
        f'{escape(id)}</td>{cells}<td class="n {kind}" data-value="{change}">{text}</td></tr>'
    )


def changed(first: dict[str, float], last: dict[str, float]) -> tuple[str, str, float]:
    """(text, class, last over first): faster and slower only where the ranges do not meet."""
    ratio = last["median"] / first["median"]
    if last["low"] <= first["high"] and first["low"] <= last["high"]:
        return f"{ratio - 1:+.1%}, within noise", "", ratio
    return f"{ratio - 1:+.1%}", "bad" if ratio > 1 else "good", ratio
