"""Signals at random moments and commands started at once: nothing half, nothing different, nothing left.

    python tests/torture              # 200 signals, 20 pairs and 8 triples: some minutes
    python tests/torture --share 0.1

Exits with 1 if anything went wrong, and then keeps the folders of the trials in which it did.
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(TESTS), str(TESTS.parent / "benchmarks")]

from commands import Bench  # noqa: E402
from kills import SIGNALS, Trial, Verdict, kill, trials  # noqa: E402
from races import KINDS, Race, race, races  # noqa: E402
from support.fork_client import ForkServer  # noqa: E402

FAULTS = ("difference", "half", "corrupt", "left", "hang", "traceback", "status")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Torture pyprune with signals and with commands started at once.")
    parser.add_argument("--share", type=float, default=1.0, help="of the 200 signals, 20 pairs and 8 triples")
    parser.add_argument("--seed", type=int, default=0, help="of the commands and the moments")
    parser.add_argument("--alongside", type=int, default=2, help="trials at a time")
    return parser.parse_args()


def shown(rows: list[list[str]]) -> None:
    """A table with columns as wide as they need to be."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) if k == 0 else cell.rjust(width) for k, (cell, width) in enumerate(zip(row, widths))]  # noqa: B905
        print("  ".join(cells))


def kill_table(done: list[tuple[Trial, Verdict]]) -> None:
    rows = [["command", *(sent.name for sent in SIGNALS), "interrupted", *FAULTS]]
    for name in [*dict.fromkeys(trial.name for trial, _ in done), "all"]:
        own = [(trial, verdict) for trial, verdict in done if name in (trial.name, "all")]
        by_signal = Counter(trial.signal for trial, _ in own)
        faults = Counter(kind for _, verdict in own for kind, _ in verdict.faults)
        interrupted = sum(verdict.interrupted for _, verdict in own)
        counts = [*(by_signal[sent] for sent in SIGNALS), interrupted, *(faults[kind] for kind in FAULTS)]
        rows.append([name, *map(str, counts)])
    shown(rows)


def race_table(done: list[tuple[Race, list[tuple[str, str]]]]) -> None:
    rows = [["at once on", "pairs", "triples", *FAULTS]]
    for kind in (*KINDS, "all"):
        own = [(of, faults) for of, faults in done if kind in (of.kind, "all")]
        counts = Counter(of.starters for of, _ in own)
        faults = Counter(name for _, found in own for name, _ in found)
        rows.append([kind, str(counts[2]), str(counts[3]), *(str(faults[name]) for name in FAULTS)])
    shown(rows)


def torture(root: Path, share: float, seed: int, alongside: int) -> bool:
    """Whether all went well."""
    os.environ["OMP_NUM_THREADS"] = "1"
    all_trials = trials(math.ceil(200 * share), seed)
    all_races = races(math.ceil(20 * share), math.ceil(8 * share), seed)
    with ForkServer(root / "logs") as server, ThreadPoolExecutor(alongside) as threads:
        bench = Bench(root, server)
        killed = list(zip(all_trials, threads.map(lambda trial: kill(bench, trial), all_trials), strict=True))
        raced = list(zip(all_races, map(lambda of: race(bench, of), all_races), strict=True))  # noqa: C417
    for trial, verdict in killed:
        for kind, what in verdict.faults:
            print(f"{trial.name}, {trial.signal.name} at {trial.moment:.2f} (kill-{trial.number}): {kind}: {what}")
    for of, faults in raced:
        for kind, what in faults:
            print(f"{of.starters} on {of.kind} (race-{of.number}): {kind}: {what}")
    kill_table(killed)
    print()
    race_table(raced)
    return not any(verdict.faults for _, verdict in killed) and not any(faults for _, faults in raced)


def main() -> None:
    given = arguments()
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    if not torture(root, given.share, given.seed, given.alongside):
        sys.exit(f"what went wrong is in {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
