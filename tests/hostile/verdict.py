"""Runs a case and says what is wrong with what came of it."""

import hashlib
import json
import math
import re
import shutil
import threading
from pathlib import Path

import torch
from cases import EITHER, REFUSED, SAME, Case, evaluate
from safetensors.torch import load_file
from scenes import Scenes
from support.fork_client import Ended, ForkServer

_CACHED = re.compile(r"\.pyprune-cache(/(calibration|curves|text)[^/.]*\.safetensors)?")
_LAYERS = re.compile(r"\.pyprune-cache/[^/.]*\.layers(/layer-\d*\.safetensors)?")
# What a hostile size may take: the machine is not its to use up.
_LIMITS = {"AS": 6 << 30, "CPU": 40}


class Judge:
    """Runs cases in folders of their own; several threads may."""

    def __init__(self, root: Path, server: ForkServer) -> None:
        self.root, self.server = root, server
        self.scenes = Scenes(root / "scenes", server)
        self._undisturbed: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
        self._lock = threading.Lock()

    def faults(self, case: Case) -> list[str]:
        """Empty: as it should be."""
        folder = self.root / re.sub(r"[^\w.-]", "_", case.name)[:100]
        self.scenes.copy(case.scene, folder)
        case.damage(folder)
        before = _names(folder)
        running = self.server.start(
            case.command, folder, environment={"TMPDIR": str(folder / "tmp")}, limits=_LIMITS | dict(case.limits)
        )
        ended = running.wait(case.seconds)
        faults = [f"left running: {name}" for name in running.left_alive()]
        faults += self._faults(case, ended, folder, before)
        if not faults:
            shutil.rmtree(folder)
        return [f"{fault}; {ended}" for fault in faults]

    def _faults(self, case: Case, ended: Ended, folder: Path, before: set[str]) -> list[str]:
        if ended.status is None or ended.status == -24:  # SIGXCPU
            return ["hangs"]
        written = _names(folder) - before
        if ended.status == 2:
            return _refusal(case, ended) + self._left(case, ended, folder, written)
        if ended.status != 0:
            return [f"status {ended.status}"]
        if case.expected == REFUSED:
            return ["is not refused"]
        output = _output(case)
        # Beside a GGUF file stands the Modelfile that Ollama reads.
        made = {str(Path(output).with_suffix(".Modelfile"))} if "gguf" in case.command else set()
        stray = [n for n in written if not _CACHED.fullmatch(n) and not _within(n, output) and n not in made]
        stray += [name for name in _names(folder) if name.endswith(".tmp") or _within(name, "out.partial")]
        return [f"leaves {sorted(stray)[:5]}"] * bool(stray) + self._result(case, ended, folder)

    def _left(self, case: Case, ended: Ended, folder: Path, written: set[str]) -> list[str]:
        stray = [name for name in written if not _CACHED.fullmatch(name)]
        kept = case.resumable and "--resume" in ended.err
        if kept:
            stray = [n for n in stray if n.endswith(".tmp") or not (_within(n, "out.partial") or _LAYERS.fullmatch(n))]
        if "repeat" in ended.err:  # what is known of the dense model's layers need not be computed again
            stray = [name for name in stray if not _LAYERS.fullmatch(name)]
        if stray:
            return [f"refused, leaves {sorted(stray)[:5]}"]
        if kept and case.limits and (folder / "out.partial").exists():  # and those are gone now
            resumed = self.server.run([*case.command, "--resume"], folder)
            if resumed.status != 0:
                return [f"cannot be resumed: {resumed}"]
            return self._differences(case, folder)
        return []

    def _result(self, case: Case, ended: Ended, folder: Path) -> list[str]:
        """Of a command that ended well."""
        output = _output(case)
        if case.command[0] == "evaluate":
            try:
                perplexity = json.loads(ended.out)["perplexity"]
            except (ValueError, KeyError) as error:
                return [f"stdout is no result ({error!r})"]
            return [] if math.isfinite(perplexity) else [f"perplexity {perplexity}"]
        if output is None:
            return [] if ended.out.strip() else ["says nothing"]
        if output.endswith(".gguf"):
            return _gguf_faults(folder / output)
        if case.command[0] == "prune" and case.expected != EITHER:
            return self._differences(case, folder)  # from what is known to load
        return self._loading(folder, output)

    def _loading(self, folder: Path, output: str) -> list[str]:
        for file in (folder / output).glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                if not bool(torch.isfinite(tensor).all()):
                    return [f"{name} is not finite in the output"]
        # The scene's text may be what was damaged.
        self.scenes.copy("model", folder / "plain")
        shutil.copy(folder / "plain" / "text.txt", folder / output / "plain.txt")
        ended = self.server.run([*(f"{output}/plain.txt" if w == "text.txt" else w for w in evaluate(output))], folder)
        return [] if ended.status == 0 else [f"what was written does not evaluate: {ended}"]

    def _differences(self, case: Case, folder: Path) -> list[str]:
        expected, found = self._expected(case), checksums(folder / "out")
        if found != expected:
            return [f"differs from an undisturbed run in {sorted(k for k in expected if expected[k] != found.get(k))}"]
        return []

    def _expected(self, case: Case) -> dict[str, str]:
        """Of the same command in the plain scene, without --resume."""
        command = tuple(word for word in case.command if word != "--resume")
        scene = case.scene if case.scene in ("model", "sharded", "pruned") else "model"
        with self._lock:
            if (scene, command) not in self._undisturbed:
                folder = self.root / f"undisturbed-{len(self._undisturbed)}"
                self.scenes.copy(scene, folder)
                self.scenes.run(command, folder, {})
                self._undisturbed[scene, command] = checksums(folder / "out")
            return self._undisturbed[scene, command]


def checksums(output: Path) -> dict[str, str]:
    files = sorted(output.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _refusal(case: Case, ended: Ended) -> list[str]:
    lines = [line for line in ended.err.splitlines() if line.startswith("pyprune: ")]
    faults = [] if case.expected != SAME else ["is refused"]
    if "Traceback" in ended.err:
        faults.append("a traceback")
    if len(lines) != 1 or not ended.err.rstrip().endswith(lines[0].rstrip()):
        faults.append(f"{len(lines)} lines of ours, of which one has to be the last")
    if ended.out:
        faults.append(f"refused, yet stdout has {ended.out[:100]!r}")
    return faults


def _output(case: Case) -> str | None:
    return case.command[2] if case.command[0] in ("prune", "export") else None


def _within(name: str, folder: str | None) -> bool:
    return folder is not None and (name == folder or name.startswith(f"{folder}/"))


def _names(folder: Path) -> set[str]:
    """Of everything in it; links are not followed."""
    found, folders = set(), [folder]
    while folders:
        for path in folders.pop().iterdir():
            found.add(str(path.relative_to(folder)))
            if path.is_dir() and not path.is_symlink():
                folders.append(path)
    return found


def _gguf_faults(file: Path) -> list[str]:
    import gguf

    try:
        tensors = gguf.GGUFReader(file).tensors
    except (ValueError, KeyError, IndexError, OSError) as error:
        return [f"a GGUF file that cannot be read ({error!r})"]
    return [] if tensors else ["a GGUF file without tensors"]
