"""The commands that are tortured, and what each makes when nothing disturbs it."""

import hashlib
import json
import random
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from support.fork_client import Ended, ForkServer
from support.paths import DEMO

from pyprune.testing.random_checkpoint import make_checkpoint

LONGEST = 120.0  # seconds: a command that takes longer hangs
OUTPUT, FILE, MODELFILE = "out", "out.gguf", "out.Modelfile"
WORDS = ("the", "a", "of", "in", "year", "harvest", "was", "as", "good", "bad", "than", "before", "town")
Sums = dict[str, str]


def prune(method: str, *more: str) -> tuple[str, ...]:
    share = ("--pattern", "2:4") if method in ("wanda", "sparsegpt", "dass") else ("--ratio", "0.3")
    text = ("--calibration", "../text.txt", "--samples", "4", "--sequence-length", "32")
    steps = ("--steps", "4") if method in ("disp", "policy") else ()
    given = () if method == "magnitude" else text
    return ("prune", "../model", OUTPUT, "--method", method, *share, *given, *steps, "--device", "cpu", *more)


def gguf(dtype: str) -> tuple[str, ...]:
    return ("export", "../model", FILE, "--format", "gguf", "--dtype", dtype, "--no-verify")


STOCK = ("export", "../model", OUTPUT, "--format", "stock", "--no-verify")
EVALUATE = ("evaluate", "../model", "--text", "../text.txt", "--sequence-length", "32", "--max-windows", "8", "--json")
METHODS = ("magnitude", "wanda-sp", "flap", "slimgpt", "obs", "wanda", "sparsegpt", "dass", "disp", "policy")
COMMANDS: dict[str, tuple[str, ...]] = {
    **{method: prune(method, "--no-verify") for method in METHODS},
    "gguf f32": gguf("f32"),
    "stock": STOCK,
    "evaluate": EVALUATE,
}
# Those of COMMANDS that also load what they wrote in a process of their own, which takes seconds.
PROVED: dict[str, tuple[str, ...]] = {"flap": prune("flap", "--verify"), "stock": STOCK[:-1]}
# What a command that was let finish may leave beside its output.
_EXPECTED = re.compile(r"(out|out\.gguf|out\.Modelfile|tmp|\.pyprune-cache)(/.*)?")
_STRAY = re.compile(r"(tmp/.*|.*\.tmp|.*\.layers(/.*)?|out/journal\.jsonl|out/training\.safetensors)")


@dataclass(frozen=True)
class Undisturbed:
    sums: Sums
    seconds: float


class Bench:
    """The model, the text, a folder for each trial, and the undisturbed runs, each made when it is first asked for."""

    def __init__(self, root: Path, server: ForkServer) -> None:
        self.root, self.server = root, server
        make_checkpoint(
            root / "model", tokenizer=DEMO, hidden_size=64, layers=4, heads=4, kv_heads=2, intermediate_size=160
        )
        drawn = random.Random(0)
        (root / "text.txt").write_text(" ".join(drawn.choice(WORDS) for _ in range(2000)))
        self._known: dict[tuple[str, ...], Future[Undisturbed]] = {}
        self._lock = threading.Lock()

    def folder(self, name: str) -> Path:
        folder = self.root / name
        (folder / "tmp").mkdir(parents=True)
        return folder

    @staticmethod
    def environment(folder: Path) -> Mapping[str, str]:
        return {"TMPDIR": str(folder / "tmp")}

    def run(self, command: tuple[str, ...], folder: Path) -> Ended:
        return self.server.start(command, folder, environment=self.environment(folder)).wait(LONGEST)

    def undisturbed(self, command: tuple[str, ...]) -> Undisturbed:
        """By the first that asks for it, while the others wait."""
        with self._lock:
            first = command not in self._known
            result = self._known.setdefault(command, Future())
            name = f"undisturbed-{len(self._known)}"
        if first:
            try:
                result.set_result(self._measured(command, self.folder(name)))
            except BaseException as error:
                result.set_exception(error)
        return result.result()

    def _measured(self, command: tuple[str, ...], folder: Path) -> Undisturbed:
        start = monotonic()
        ended = self.run(command, folder)
        if ended.status != 0:
            raise RuntimeError(f"{' '.join(command)}: {ended}")
        return Undisturbed(made(command, folder, ended), monotonic() - start)


def output_of(command: tuple[str, ...]) -> str | None:
    return None if command[0] == "evaluate" else command[2]


def made(command: tuple[str, ...], folder: Path, ended: Ended) -> Sums:
    """Checksums of what it made: of an output's tensors and configuration, of a file, of the figures on stdout."""
    if command[0] == "evaluate":
        try:
            figures = json.loads(ended.out)
        except ValueError:
            return {"stdout": ended.out}
        return {name: str(value) for name, value in figures.items() if name not in ("seconds", "tokens_per_second")}
    return sums(folder / command[2])


def sums(output: Path) -> Sums:
    files = [output] if output.is_file() else sorted([*output.glob("*.safetensors"), *output.glob("config.json")])
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def left(folder: Path) -> list[str]:
    """What should not be there after a command that was let finish."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [name for name in names if not _EXPECTED.fullmatch(name) or _STRAY.fullmatch(name)]
