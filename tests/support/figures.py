"""Reports whose figures are not drawn: drawing the six of a report takes longer than pruning a tiny model."""

from typing import IO, Any

from matplotlib.figure import Figure

BLANK = '<svg xmlns="http://www.w3.org/2000/svg"/>'


def _blank(self: Figure, file: IO[str], **_: Any) -> None:
    file.write(BLANK)


def leave_blank() -> None:
    """In this process and those forked from it, from now on."""
    Figure.savefig = _blank  # type: ignore[method-assign]
