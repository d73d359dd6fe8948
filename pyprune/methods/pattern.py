"""Sparsity patterns of single weights: N of every M kept, or unstructured."""

import re
from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from ..ops.sparsify import lowest_of_groups

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Pattern:
    """Pattern of zeros: `zeros` in every `group` consecutive weights; group 0: a share of a row's weights, anywhere."""

    name: str
    zeros: int = 0
    group: int = 0

    @property
    def ratio(self) -> float | None:
        """The share of zeros, where the pattern says it."""
        return self.zeros / self.group if self.group else None

    def lowest(self, scores: Tensor, ratio: float) -> Tensor:
        """Mask of the lowest scores, bool [rows, n] as `scores`: those of each group, or int(ratio·n) of each row.

        The first of equal ones goes. `ratio` matters to an unstructured pattern only.
        """
        if self.group:
            return lowest_of_groups(scores, self.zeros, self.group)
        return lowest_of_groups(scores, int(ratio * scores.shape[-1]), scores.shape[-1])

    def check_length(self, length: int, what: str) -> None:
        """InputError, naming `what`, if rows of that many weights cannot be cut into groups."""
        if self.group and length % self.group:
            raise InputError(f"--pattern {self.name} does not divide {what}: {length} is no multiple of {self.group}")


def parse_pattern(text: str) -> Pattern:
    """The pattern that is written N:M (N of every M weights are kept) or `unstructured`; InputError for another."""
    if text == UNSTRUCTURED:
        return Pattern(text)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise InputError(
            f"--pattern {text!r} is no pattern: N:M, of which N weights of every M stay (2:4, 4:8), or {UNSTRUCTURED}"
        )
    kept, group = int(match[1]), int(match[2])
    return Pattern(text, group - kept, group)
