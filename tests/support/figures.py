"""Reports whose figures are not drawn: drawing the six of a report takes longer than pruning a tiny model."""

from collections.abc import Callable
from typing import IO, Any

from matplotlib.figure import Figure

from pyprune.report import plots

BLANK = '<svg xmlns="http://www.w3.org/2000/svg"/>'
PLOTS = ("kept_units", "scores", "error_curves", "per_pass", "lines", "training")


def _blank(*_: Any, **__: Any) -> str:
    return BLANK


def _saved_blank(self: Figure, file: IO[str], **_: Any) -> None:
    file.write(BLANK)


def leave_blank(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """In this process and those forked from it, from now on."""
    replace(Figure, "savefig", _saved_blank)
    for name in PLOTS:
        replace(plots, name, _blank)
