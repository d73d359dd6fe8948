"""Check that a folder can be made and will fit, before anything is computed."""

import os
import shutil
from pathlib import Path

from ..errors import InputError


def check_output_free(output: Path) -> None:
    """Refuse an output that exists and holds anything, or a place where none can be made by a rename."""
    if output.exists():
        if not output.is_dir() or any(output.iterdir()):
            raise InputError(f"{output}: exists and is not an empty folder; name another output")
        if output.is_mount() or output.samefile(Path.cwd()):
            raise InputError(f"{output}: cannot be replaced; name a new folder inside it")
    check_output_creatable(output)


def check_output_creatable(path: Path) -> None:
    """Refuse a path that cannot be made: nothing above it is a folder that can be written."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path}: cannot be made, {parent} is not a folder that can be written")
    if len(path.name.encode()) > 200:  # .partial is appended, and file systems end at 255 bytes
        raise InputError(f"{path.name[:40]}...: too long a name; file systems end at 255 bytes")


def check_cache(cache: Path, output: Path) -> None:
    """Refuse a cache within the output: the output is to be an empty folder when it is made."""
    for folder in (output.resolve(), output.resolve().with_name(output.resolve().name + ".partial")):
        if cache.resolve().is_relative_to(folder):
            raise InputError(f"{cache}: the cache cannot lie in the output; name a folder beside {output}")


def check_disk_space(output: Path, needed: int) -> None:
    """Refuse a run whose output will not fit: better before the first layer than in the last."""
    parent = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{parent}: {free / 1e6:.1f} MB free, the output needs {needed / 1e6:.1f} MB; free some space")
