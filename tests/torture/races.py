"""Commands started at once on one output, one cache, one exported file, or one unfinished run."""

import random
import shutil
import signal
import time
from dataclasses import dataclass

from commands import FILE, LONGEST, OUTPUT, Bench, gguf, left, prune, sums
from support.fork_client import Ended

KINDS = ("one output", "one cache", "one file", "one unfinished run")


@dataclass(frozen=True)
class Race:
    number: int
    kind: str
    starters: int
    seed: int


def races(pairs: int, triples: int, seed: int) -> list[Race]:
    starters = [2] * pairs + [3] * triples
    return [Race(k, KINDS[(k + n) % len(KINDS)], n, seed + k) for k, n in enumerate(starters)]


def race(bench: Bench, of: Race) -> list[tuple[str, str]]:
    """What went wrong: kind and what happened."""
    drawn = random.Random(of.seed)
    folder = bench.folder(f"race-{of.number}")
    commands = _commands(of, drawn)
    if of.kind == "one unfinished run":
        bench.server.run(commands[0][:-1], folder, stops={"parts": drawn.randint(1, 5)})
    runs = []
    for command in commands:
        runs.append(bench.server.start(command, folder, environment=bench.environment(folder)))
        time.sleep(drawn.random() * 0.3 * bench.undisturbed(_alone(command)).seconds * drawn.choice((0, 1)))
    ended = [run.wait(LONGEST) for run in runs]
    faults = [fault for each in ended for fault in _ending(each)]
    faults += [("left", f"runs on: {name}") for run in runs for name in run.left_alive()]
    winners = [command for command, each in zip(commands, ended, strict=True) if each.status == 0]
    if not winners:
        faults.append(("corrupt", f"none ends well: {[str(each)[-300:] for each in ended]}"))
    for output in {command[2] for command in winners}:
        right = [bench.undisturbed(_alone(command)).sums for command in winners if command[2] == output]
        if sums(folder / output) not in right:
            faults.append(("corrupt", f"{output} is the output of none that ended well"))
    strays = [name for name in left(folder) if not name.startswith("out-")]
    faults += [("left", name) for name in strays]
    if not faults:
        shutil.rmtree(folder)
    return faults


def _commands(of: Race, drawn: random.Random) -> list[tuple[str, ...]]:
    """Those of a race, in the order of their start."""
    if of.kind == "one file":
        return [gguf(dtype) for dtype in drawn.sample(("f32", "q8_0", "bf16", "f16"), of.starters)]
    if of.kind == "one output":
        return [prune(drawn.choice(("magnitude", "flap", "obs")), "--no-verify") for _ in range(of.starters)]
    method = drawn.choice(("flap", "obs"))
    command = prune(method, "--no-verify")
    if of.kind == "one unfinished run":
        return [(*command, "--resume")] * of.starters
    return [(*command[:2], f"{OUTPUT}-{number}", *command[3:]) for number in range(of.starters)]


def _alone(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command whose undisturbed run makes the same."""
    output = FILE if command[0] == "export" else OUTPUT
    return tuple(word for word in (*command[:2], output, *command[3:]) if word != "--resume")


def _ending(ended: Ended) -> list[tuple[str, str]]:
    """Well, or refused in a line."""
    if ended.status == 0:
        return []
    if ended.status is None:
        return [("hang", "one of them hangs")]
    lines = [line for line in ended.err.splitlines() if line.startswith("pyprune: ")]
    if ended.status == 2 and len(lines) == 1 and "Traceback" not in ended.err:
        return []
    name = signal.Signals(-ended.status).name if ended.status < 0 else f"status {ended.status}"
    return [("status", f"{name}: {ended.err[-300:]}")]
