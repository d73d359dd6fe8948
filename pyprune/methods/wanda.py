from dataclasses import dataclass

from .registry import register
from .weight_sparsity import InputNormMethod


@register
@dataclass(frozen=True)
class Wanda(InputNormMethod):
    """Wanda: weight times input norm, compared within a row; zeroes single weights (arXiv 2306.11695)."""

    name = "wanda"
    source = "arXiv 2306.11695 (Wanda, Sun et al.)"
