"""What a hostile case is: a scene, what is damaged in it, a command, and what may come of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path

Damage = Callable[[Path], None]  # of the folder of a scene

# What may come of a case. A refusal is status 2 and one line; whole: what was written loads and evaluates.
EITHER = "whole or refused"
REFUSED = "refused"
SAME = "the weights of an undisturbed run"
SAME_OR_REFUSED = "the weights of an undisturbed run, or refused"

SMALL = ("--calibration", "text.txt", "--samples", "4", "--sequence-length", "16")
METHODS = ("magnitude", "flap", "obs", "slimgpt", "wanda-sp", "sparsegpt")


def prune(method: str = "flap", *more: str) -> tuple[str, ...]:
    share = ("--pattern", "2:4") if method == "sparsegpt" else ("--ratio", "0.3")
    text = () if method == "magnitude" else SMALL
    return ("prune", "model", "out", "--method", method, *share, *text, "--no-verify", "--device", "cpu", *more)


def plan(method: str = "flap") -> tuple[str, ...]:
    return ("plan", "model", "--method", method, "--ratio", "0.3", *SMALL[2:])


def evaluate(model: str = "model") -> tuple[str, ...]:
    return ("evaluate", model, "--text", "text.txt", "--sequence-length", "16", "--max-windows", "2", "--json")


def export(layout: str, model: str = "model") -> tuple[str, ...]:
    if layout == "gguf":
        return ("export", model, "out.gguf", "--format", "gguf", "--dtype", "f32", "--no-verify")
    return ("export", model, "out", "--format", layout, "--no-verify")


def called(command: tuple[str, ...]) -> str:
    """A command's name in that of a case."""
    kind = next((after for word, after in pairwise(command) if word in ("--method", "--format")), "")
    return f"{command[0]}-{kind}".rstrip("-")


def every_command() -> Iterator[tuple[str, ...]]:
    """One after the other, for ever: the methods and what else reads a model."""
    return cycle(
        [
            prune("magnitude"), evaluate(), prune("flap"), export("padded"), prune("obs"), plan("flap"),
            prune("slimgpt"), export("gguf"), prune("wanda-sp"), prune("sparsegpt"), export("stock"), plan("obs"),
        ]
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`limits`: of setrlimit, as forked.py has them. `seconds`: after which it counts as hanging."""

    name: str
    damage: Damage
    command: tuple[str, ...]
    scene: str = "model"
    expected: str = EITHER
    limits: Mapping[str, int] = field(default_factory=dict)
    generated: bool = False  # one of a product of places and damages, of which a test run takes a part
    resumable: bool = False  # a refusal may keep OUTPUT.partial if it says so, and --resume then finishes it
    seconds: float = 60

    def __str__(self) -> str:
        return self.name
