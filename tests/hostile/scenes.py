"""The folders that cases start from, each made once: `model` and `text.txt`, and what runs of them left."""

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import SMALL, prune
from support.fork_client import ForkServer
from support.paths import DEMO

from pyprune.testing.random_checkpoint import make_checkpoint

SIZES: dict[str, Any] = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 64}

WORDS = ("the", "a", "of", "in", "year", "harvest", "was", "as", "good", "bad", "than", "before", "town")
SELF = tuple("self" if word == "text.txt" else word for word in prune("flap"))
SHARDS = ("--shard-size", "545KB")  # embeddings of 524 kB, the first layer, some of the second; the rest
# The command of a scene's run, and where it was killed, if it was.
RUNS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "finished": (prune("flap"), {}),
    "killed": (prune("flap", *SHARDS), {"parts": 2}),
    "killed-obs": (prune("obs", *SHARDS), {"parts": 3}),
    "trained": (("prune", "model", "out", "--method", "disp", "--ratio", "0.3", "--steps", "2", *SMALL, "--no-verify",
                 "--device", "cpu"), {"parts": 1}),
    "surveyed": (prune("flap"), {"layers": 1}),
    "curved": (prune("obs"), {"layers": 1}),
    "cached": (prune("flap"), {}),
    "cached-obs": (prune("obs"), {}),
    "cached-text": (SELF, {}),
}  # fmt: skip


def text(words: int = 700) -> str:
    """English enough, the same on every machine."""
    drawn = random.Random(0)
    return " ".join(drawn.choice(WORDS) for _ in range(words)) + ".\n"


class Scenes:
    """Makes each scene when the first case asks for it; several threads may."""

    def __init__(self, root: Path, server: ForkServer) -> None:
        self.root, self.server = root, server
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def copy(self, name: str, target: Path) -> None:
        shutil.copytree(self._made(name), target, symlinks=True)
        (target / "tmp").mkdir()

    def _made(self, name: str) -> Path:
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        folder = self.root / name
        with lock:
            if not (self.root / f"{name}.made").exists():
                _makers.get(name, _of_a_run)(self, name, folder)
                (self.root / f"{name}.made").touch()
        return folder

    def run(self, command: tuple[str, ...], folder: Path, stops: dict[str, int]) -> None:
        ended = self.server.run(command, folder, stops=stops)
        assert ended.status == (-9 if stops else 0), f"{command}: {ended}"


def _plain(_: Scenes, __: str, folder: Path) -> None:
    make_checkpoint(folder / "model", tokenizer=DEMO, tie=True, **SIZES)
    shutil.copy(DEMO / "generation_config.json", folder / "model")
    (folder / "text.txt").write_text(text())


def _sharded(scenes: Scenes, _: str, folder: Path) -> None:
    shutil.copytree(scenes._made("model"), folder)
    (folder / "model" / "model.safetensors").unlink()
    make_checkpoint(
        folder / "model", shard_layers=1, tie=True, **SIZES, vocab_size=8192, bos_token_id=0, eos_token_id=1
    )


def _pruned(scenes: Scenes, _: str, folder: Path) -> None:
    """The model is itself a pruned one, of layers that differ."""
    shutil.copytree(scenes._made("model"), folder)
    scenes.run(prune("obs"), folder, {})
    for left in ("model", ".pyprune-cache"):
        shutil.rmtree(folder / left)
    (folder / "out").rename(folder / "model")
    assert "per_layer_config" in (folder / "model" / "config.json").read_text()


def _of_a_run(scenes: Scenes, name: str, folder: Path) -> None:
    shutil.copytree(scenes._made("model"), folder)
    command, stops = RUNS[name]
    scenes.run(command, folder, stops)
    if name.startswith("cached"):
        shutil.rmtree(folder / "out")


def _bare(_: Scenes, __: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "text.txt").write_text(text())


_makers: dict[str, Callable[[Scenes, str, Path], None]] = {
    "bare": _bare,
    "model": _plain,
    "sharded": _sharded,
    "pruned": _pruned,
}
