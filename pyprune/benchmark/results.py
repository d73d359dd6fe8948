"""The document of a run: a JSON file that grows by one row at a time and is whole at any moment.

format          2; what this version reads
kind            "pyprune benchmark"
machine         describe_machine's facts: date, commit, versions, cpu, gpu, driver, ...
device          "cpu" or "cuda"
tuned           path and fingerprint of the table of tuned Triton configurations in use, or null
rates           copy: bytes a second, read and written; bfloat16, float32, tf32: FLOP/s of large products
rows            one for each case:
    id              operator/where/size/dtype, what `--row` takes
    operator, where, size, dtype, date
    bytes, flops, products      the least work of any implementation (rates.Work)
    floor_microseconds, bound   no call is shorter, by the rates above; memory or arithmetic
    allowed         the largest errors of a correct result, by name
    reason          why nobody competed; else ""
    faults          of our operator: wrong results and failures, a line each
    candidates     ours first:
        name            a backend, or `pyprune` where there is one implementation; else the way in PyTorch
        kind            pyprune, pytorch, or other: another tool's formulation, named in `source`
        status          timed, wrong, out of memory, failed, unjudged, or unsupported (not in this
                            PyTorch on this device); `reason` says why, if not timed
        errors          against float64, by name; null where it computes another quantity or nothing
        peak_bytes      allocated beside the inputs; null on a CPU
        microseconds    median, low and high (first and last decile), host, repeat; null if not timed
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runtime.files import stem_of
from .case import OTHER, OURS

FORMAT, KIND = 2, "pyprune benchmark"
# Facts that do not make another machine or version.
CHANGING = ("date",)

Document = dict[str, Any]
Row = dict[str, Any]


def new_document(
    machine: dict[str, Any], device: str, rates: dict[str, float | None], tuned: dict[str, str] | None
) -> Document:
    return {
        "format": FORMAT,
        "kind": KIND,
        "machine": machine,
        "device": device,
        "tuned": tuned,
        "rates": rates,
        "rows": [],
    }


def read_document(path: Path) -> Document:
    """InputError for what is no document of this format."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except ValueError as error:  # no JSON, or no text
        raise InputError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise InputError(f"{path}: not a result of `{KIND}`")
    if document.get("format") != FORMAT:
        raise InputError(f"{path}: its format is {document.get('format')!r}; this version reads {FORMAT}")
    missing = {"machine", "device", "rates", "rows"} - document.keys()
    if missing:
        raise InputError(f"{path}: it lacks {', '.join(sorted(missing))}")
    return document


def read_documents(paths: Iterable[Path]) -> list[Document]:
    """Read files, and all *.json of folders; oldest first."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    return sorted(map(read_document, files), key=lambda document: document["machine"]["date"])


def of_one_origin(document: Document, machine: dict[str, Any], tuned: dict[str, str] | None) -> list[str]:
    """Differences between a document and this machine, its versions and tuned table; empty: none."""
    stored = document["machine"]
    names = [name for name in stored.keys() | machine.keys() if name not in CHANGING]
    differing = [
        f"{name} {stored.get(name)} there, {machine.get(name)} here"
        for name in sorted(names)
        if stored.get(name) != machine.get(name)
    ]
    if document.get("tuned") != tuned:
        differing.append("another table of tuned configurations")
    return differing


def file_name(machine: dict[str, Any]) -> str:
    """Name the file of a run in a folder: the device and the time."""
    return f"{stem_of(str(machine.get('gpu') or machine['cpu']))}-{re.sub(r'[^0-9T]', '', machine['date'][:19])}.json"


def device_name(document: Document) -> str:
    machine = document["machine"]
    threads = machine["cpu_threads"]
    return machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}"


def candidates(row: Row, *kinds: str) -> list[dict[str, Any]]:
    """List the timed candidates of these kinds."""
    return [one for one in row["candidates"] if one["kind"] in kinds and one["microseconds"]]


def median(candidate: dict[str, Any]) -> float:
    return candidate["microseconds"]["median"]


def fastest(row: Row, *kinds: str) -> dict[str, Any] | None:
    return min(candidates(row, *kinds), key=median, default=None)


def headline(row: Row) -> dict[str, Any] | None:
    """Ours that is preferred: the first backend that was timed."""
    return next(iter(candidates(row, OURS)), None)


def times_faster(row: Row, *kinds: str) -> float | None:
    """The fastest baseline's time over ours. Baselines are plain PyTorch, also those in another tool's formulation."""
    own, baseline = headline(row), fastest(row, *kinds)
    return None if own is None or baseline is None else median(baseline) / median(own)


def share_of_floor(row: Row) -> float | None:
    own = headline(row)
    return None if own is None else row["floor_microseconds"] / median(own)


def row_line(row: Row) -> str:
    """A row in one line of text."""
    if row["reason"]:
        return f"{row['id']}  {row['reason']}"
    if row["faults"]:
        return f"{row['id']}  NOT CORRECT, not timed: {'; '.join(row['faults'])}"
    own = candidates(row, OURS)
    if not own:
        reasons = [
            f"{one['name']}: {one['status']}: {one['reason']}" for one in row["candidates"] if one["kind"] == OURS
        ]
        return f"{row['id']}  not timed: {'; '.join(reasons)}"
    parts = [", ".join(f"{one['name']} {duration(median(one))}" for one in own)]
    parts.append(f"{share_of_floor(row):.0%} of the floor ({row['bound']})")
    for words, kinds in (("PyTorch", ("pytorch", OTHER)), ("the other tool's way", (OTHER,))):
        times = times_faster(row, *kinds)
        if times is not None:
            parts.append(f"{times:.2f} x {words}")
    parts += [
        f"error of {what} {own[0]['errors'][what]:.1e} (allowed {most:.1e})" for what, most in row["allowed"].items()
    ]
    return f"{row['id']}  {' | '.join(parts)}"


def duration(microseconds: float) -> str:
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"
