"""Environment that the last bits of a result depend on: processor, threads, versions."""

import importlib
import importlib.util
from typing import Any

import torch
import transformers

# Entries of a run's identity that say where it runs, and not what it was asked for.
NAMES = ("backends", "processor", "threads", "torch", "transformers", "pyprune")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the environment of this process, by the names in NAMES except `backends`."""
    from .. import __version__

    return {
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pyprune": __version__,
    }


def processor(device: torch.device) -> str:
    """The GPU's name, or the instruction sets that PyTorch and the compiled core choose on this CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    sets = [torch.backends.cpu.get_cpu_capability()]
    if importlib.util.find_spec("pyprune._core") is not None:
        sets.append(importlib.import_module("pyprune._core").build_info()["cpu_isa"])
    return ", ".join(sets)


def take_threads(recorded: Any) -> None:
    """Go on with the number of threads that a run began with: sums are cut by it, and round by how they are cut."""
    if isinstance(recorded, int) and recorded > 0:
        torch.set_num_threads(recorded)


def split(changed: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Differences of two identities: those of the request, and those of the environment."""
    asked = {name: text for name, text in changed.items() if name not in NAMES}
    return asked, {name: text for name, text in changed.items() if name in NAMES}
