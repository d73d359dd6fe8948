"""The machine that a figure was measured on."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__

ROOT = Path(__file__).resolve().parents[2]


def describe_machine(device: torch.device) -> dict[str, str | int | None]:
    """Processor, GPU and driver, versions of what the figure depends on, commit and date."""
    facts: dict[str, str | int | None] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pyprune": __version__,
        "commit": commit(),
        "cpu": processor_name(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "torch_cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_mib": properties.total_memory // 2**20,
            "l2_mib": properties.L2_cache_size // 2**20,
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def commit() -> str | None:
    """Return the commit of the repository that this file belongs to; None where it was installed without one.

    Where the sources were copied without their repository, PYPRUNE_COMMIT can say which commit they are.
    """
    if named := os.environ.get("PYPRUNE_COMMIT"):
        return named
    # An installed package may lie within some other project's repository.
    top = output_of("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    return output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty") if top == str(ROOT) else None


def processor_name() -> str:
    """The model's name from /proc/cpuinfo, or what platform knows where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    """The first line that a command prints, None where it is not installed or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return run.stdout.splitlines()[0].strip() if run.stdout else None
