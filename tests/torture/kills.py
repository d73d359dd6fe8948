"""Commands that a signal ends at a random moment, and what the next one makes of what they left."""

import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from commands import COMMANDS, FILE, LONGEST, MODELFILE, PROVED, Bench, Sums, left, made, output_of, sums
from support.fork_client import Ended

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PROVED_EACH = 20  # trials, of which one is of a command that proves its output


@dataclass(frozen=True)
class Trial:
    number: int
    name: str
    command: tuple[str, ...]
    signal: signal.Signals
    moment: float  # of the command's usual duration
    proved: bool = False  # the signal comes while the output is proved; `moment` is then of a second


@dataclass
class Verdict:
    """`faults`: kind and what happened. `interrupted`: it did not end well before the signal came."""

    interrupted: bool = False
    faults: list[tuple[str, str]] = field(default_factory=list)


def trials(count: int, seed: int) -> list[Trial]:
    """Every command about as often as every other, with the signals in turn."""
    drawn = random.Random(seed)
    names = list(COMMANDS)
    drawn.shuffle(names)
    result = []
    for number in range(count):
        name = names[number % len(names)]
        sent = SIGNALS[(number + number // len(names)) % len(SIGNALS)]
        proved = number % _PROVED_EACH == _PROVED_EACH // 2
        if proved:
            name = list(PROVED)[number // _PROVED_EACH % len(PROVED)]
            sent = SIGNALS[1 + number // _PROVED_EACH % 3]  # what SIGKILL leaves of a worker nobody can tidy
        result.append(Trial(number, name, COMMANDS[name], sent, drawn.random() * 1.05, proved))
    return result


def kill(bench: Bench, trial: Trial) -> Verdict:
    usual = bench.undisturbed(trial.command)
    folder = bench.folder(f"kill-{trial.number}")
    verdict = Verdict()
    command = PROVED[trial.name] if trial.proved else trial.command
    running = bench.server.start(command, folder, environment=bench.environment(folder))
    if trial.proved:
        _wait_for_the_proof(folder)
    time.sleep(trial.moment * (1 if trial.proved else usual.seconds))
    running.send(trial.signal)
    ended = running.wait(LONGEST)
    verdict.interrupted = ended.status != 0
    if ended.status is None:
        verdict.faults.append(("hang", "goes on after the signal"))
    verdict.faults += [("left", f"runs on: {name}") for name in running.left_alive()]
    _half(trial, ended, folder, usual.sums, verdict)
    if verdict.interrupted:
        ended = _again(bench, trial, folder, verdict)
    if ended.status != 0:
        verdict.faults.append(("difference", f"not to be finished: {ended}"))
    elif made(trial.command, folder, ended) != usual.sums:
        verdict.faults.append(("difference", "not what an undisturbed run makes"))
    verdict.faults += [("left", f"{name}, in the end") for name in left(folder)]
    if not verdict.faults:
        shutil.rmtree(folder)
    return verdict


def _wait_for_the_proof(folder: Path) -> None:
    """Until the worker has its scratch folder."""
    end = time.monotonic() + LONGEST
    while not any((folder / "tmp").iterdir()) and time.monotonic() < end:
        time.sleep(0.01)


def _half(trial: Trial, ended: Ended, folder: Path, expected: Sums, verdict: Verdict) -> None:
    """What is there right after the signal: an output has to be whole, and only SIGKILL leaves scratch files."""
    output = output_of(trial.command)
    if output is not None and (folder / output).exists() and sums(folder / output) != expected:
        verdict.faults.append(("half", f"{output} is no whole output"))
    if trial.signal != signal.SIGKILL:
        scratch = [path.name for path in (folder / "tmp").iterdir()]
        if trial.command[0] == "export":
            whole = {output, MODELFILE} if output == FILE and (folder / FILE).exists() else {output}
            scratch += [path.name for path in folder.glob("out*.*") if path.name not in whole]
        verdict.faults += [("left", f"{name}, after the signal") for name in scratch]
    if "Traceback" in ended.err:
        verdict.faults.append(("traceback", ended.err[-300:]))


def _again(bench: Bench, trial: Trial, folder: Path, verdict: Verdict) -> Ended:
    """The run that finishes it: with --resume a pruning that left something, else the command anew."""
    output = output_of(trial.command)
    whole = output is not None and (folder / output).exists()
    partial = folder / f"{output}.partial"
    if trial.command[0] == "prune" and (whole or partial.exists()):
        return bench.run((*trial.command, "--resume"), folder)
    if whole:
        return Ended(0, "", "")  # ended as the signal came, its output in place
    ended = bench.run(trial.command, folder)
    if ended.status == 2 and f"{partial.name}: what a killed run left" in " ".join(ended.err.split()):
        if trial.signal != signal.SIGKILL:
            verdict.faults.append(("left", partial.name))
        shutil.rmtree(partial)  # as the message says
        ended = bench.run(trial.command, folder)
    return ended
