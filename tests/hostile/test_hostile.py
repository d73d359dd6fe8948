"""Hostile files, models and systems: each ends with a whole output, or with one line and status 2 and nothing left.

A third of the cases is run, every one with PYPRUNE_HOSTILE=all. A third of those, and the ones that found a fault, are
a must for every change; the rest is marked slow.
"""

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import config_cases
import environment_cases
import pytest
import run_cases
import tensor_cases
import tokenizer_cases
from cases import Case, called
from support.fork_client import ForkServer
from verdict import Judge

EVERY = {
    "configurations": list(config_cases.cases()),
    "weights": list(tensor_cases.cases()),
    "tokenizers and texts": list(tokenizer_cases.cases()),
    "runs": list(run_cases.cases()),
    "environments": list(environment_cases.cases()),
}
# Of the cases that are products of a place and a damage one in so many, of the others a drawn share, unless all.
ALL = os.environ.get("PYPRUNE_HOSTILE") == "all"
ONE_IN = 1 if ALL else 16
SHARE = 1.0 if ALL else 0.35
# Of those the ones that found a fault: always tested.
FOUND = {
    *("config-dtype-2-to-63", "journal-record-dropped", "fifo-as-model/model.safetensors"),
    *("7-open-files-prune-flap", "7-open-files-prune-obs"),
}
ALONGSIDE = 2
# One in this many of the tested cases of a kind is in the fast tier.
FAST_ONE_IN = 3


def part(cases: list[Case]) -> list[Case]:
    generated, single = ([case for case in cases if case.generated == kind] for kind in (True, False))
    # Drawn, not every second one: commands come in turn, and each should be among them.
    drawn = random.Random(len(cases)).sample(single, round(SHARE * len(single)))
    chosen = FOUND | {case.name for case in (*generated[::ONE_IN], *drawn)}
    return [case for case in cases if case.name in chosen]


KINDS = {kind: part(cases) for kind, cases in EVERY.items()}
assert {case.name for cases in KINDS.values() for case in cases} >= FOUND


class WhenAsked(dict[str, "Future[list[str]]"]):
    """The faults of a case by its name; it is run at the first question."""

    def __init__(self, judge: Judge, threads: ThreadPoolExecutor, cases: list[Case]) -> None:
        self.judge, self.threads = judge, threads
        self.cases = {case.name: case for case in cases}

    def __missing__(self, name: str) -> "Future[list[str]]":
        self[name] = self.threads.submit(self.judge.faults, self.cases[name])
        return self[name]


@pytest.fixture(scope="session")
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[list[str]]]]:
    """The faults of every case that is to be tested, two being run at a time, in the order of the tests.

    A worker of pytest-xdist does not know which tests will be its own, so there a case is run when it is asked for.
    """
    chosen = [item.callspec.params["case"] for item in request.session.items if Path(item.path).samefile(__file__)
              and hasattr(item, "callspec")]  # fmt: skip
    root = tmp_path_factory.mktemp("hostile")
    with ForkServer(root / "logs") as server, ThreadPoolExecutor(ALONGSIDE) as threads:
        judge = Judge(root, server)
        if "PYTEST_XDIST_WORKER" in os.environ:
            yield WhenAsked(judge, threads, chosen)
        else:
            yield {case.name: threads.submit(judge.faults, case) for case in chosen}
        threads.shutdown(cancel_futures=True)
    shutil.rmtree(root)


def of_kind(kind: str) -> pytest.MarkDecorator:
    cases = [
        pytest.param(
            case, id=str(case), marks=() if number % FAST_ONE_IN == 0 or case.name in FOUND else pytest.mark.slow
        )
        for number, case in enumerate(KINDS[kind])
    ]
    return pytest.mark.parametrize("case", cases)


@of_kind("configurations")
def test_configuration(case: Case, verdicts: dict[str, Future[list[str]]]) -> None:
    assert verdicts[case.name].result() == []


@of_kind("weights")
def test_weights(case: Case, verdicts: dict[str, Future[list[str]]]) -> None:
    assert verdicts[case.name].result() == []


@of_kind("tokenizers and texts")
def test_tokenizer_and_text(case: Case, verdicts: dict[str, Future[list[str]]]) -> None:
    assert verdicts[case.name].result() == []


@of_kind("runs")
def test_what_a_run_left(case: Case, verdicts: dict[str, Future[list[str]]]) -> None:
    assert verdicts[case.name].result() == []


@of_kind("environments")
def test_environment(case: Case, verdicts: dict[str, Future[list[str]]]) -> None:
    assert verdicts[case.name].result() == []


def test_the_cases() -> None:
    """They are many, of every command, and each has a name of its own, which may be a folder's."""
    names = [case.name for cases in EVERY.values() for case in cases]
    assert len(names) >= 600
    assert {called(case.command) for cases in KINDS.values() for case in cases} == {
        called(case.command) for cases in EVERY.values() for case in cases
    }
    assert [
        name for name, count in Counter(re.sub(r"[^\w.-]", "_", name)[:100] for name in names).items() if count > 1
    ] == []
