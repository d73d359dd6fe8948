"""Refuse links that lead out of a checkpoint folder: one may name any file of the reader's."""

from pathlib import Path


def stays_inside(folder: Path, file: Path) -> bool:
    """Return whether `file` (`folder / name`) lies in `folder`, links followed, or in the hub cache's blobs beside it.

    The hub's cache holds links: models--org--name/snapshots/REVISION/FILE leads to models--org--name/blobs/HASH. False
    also for a name that is absolute or has `..`, for a loop of links, and for a name that no file can have.
    """
    try:
        if ".." in file.relative_to(folder).parts:
            return False
        home, target = folder.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop is a RuntimeError up to Python 3.12, then an OSError
        return False
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append((home.parent.parent / "blobs").resolve())
    return any(target.is_relative_to(each) for each in homes)
