"""Benchmarks small enough for a test: tiny matrices, and caches that are hardly flushed."""

from typing import Any

import pytest

from pyprune.benchmark import rates, timing
from support.command_line import Outcome, run


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed then means nothing; what is checked does."""
    monkeypatch.setitem(timing.FLUSHED_BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(rates.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(rates.PRODUCT_SIZE, "cpu", 64)
    monkeypatch.setattr(rates, "CPU_BFLOAT16_SIZE", 64)


def benchmark(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    return run(capsys, "benchmark", "--device", "cpu", "--repeat", 2, *arguments)


def timed(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [one for one in row["candidates"] if one["kind"] == kind and one["status"] == "timed"]
