"""The type of progress callbacks."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # step, units done, units in total


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""
