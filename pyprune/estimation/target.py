"""Ratio that makes the output as large as asked: in bytes of its weights as stored, or in parameters."""

from dataclasses import dataclass

from ..architectures import LayerShape
from ..checkpoint import ModelSource
from ..errors import InputError
from ..methods import Method

SIZE, PARAMETERS = "size", "parameters"
FLAGS = {SIZE: "--target-size", PARAMETERS: "--parameters"}


@dataclass(frozen=True)
class Target:
    """Size of the output in place of a ratio. kind: SIZE (bytes of the weights as stored) or PARAMETERS."""

    kind: str
    amount: int

    @property
    def flag(self) -> str:
        return FLAGS[self.kind]

    def said(self, amount: float) -> str:
        """An amount in words, three digits more than it takes to tell two of them apart."""
        if self.kind == SIZE:
            return f"{amount / 1e9:.4g} GB" if amount >= 1e9 else f"{amount / 1e6:.4g} MB"
        return f"{amount / 1e9:.4g} B parameters" if amount >= 1e9 else f"{amount / 1e6:.4g} M parameters"


def target_of(ratio: float | None, target_size: int | None, parameters: int | None) -> Target | None:
    """The target that is given, or None. InputError: more than one of the three is given."""
    given = {"--ratio": ratio, FLAGS[SIZE]: target_size, FLAGS[PARAMETERS]: parameters}
    flags = [flag for flag, value in given.items() if value is not None]
    if len(flags) > 1:
        raise InputError(f"{' and '.join(flags)} both say how much to remove: give one of them")
    if target_size is not None:
        return Target(SIZE, target_size)
    return None if parameters is None else Target(PARAMETERS, parameters)


def ratio_of(target: Target, source: ModelSource, method: Method) -> float:
    """The share of the decoder linears whose removal leaves the target.

    Compensation biases count as bytes and, as in the record, not as parameters.

    Raises:
        InputError: the method leaves every size as it is, or the target is above the dense model or below the least
            that the method can leave.
    """
    if not method.shrinks:
        raise InputError(f"{target.flag} needs a method that removes units: {method.name} sets single weights to zero")
    linears = sum(shape.prunable_parameters for shape in method.prunable(source.shapes))
    if target.kind == SIZE:
        each = source.dtype.itemsize
        dense = source.bytes
        biases = bias_parameters(source.shapes, source, method) * each
    else:
        each, biases = 1, 0
        dense = source.parameters
    ratio = (dense + biases - target.amount) / (each * linears)
    asked = target.said(target.amount)
    if target.amount >= dense or ratio <= 0:
        raise InputError(f"{target.flag} {asked}: the dense model has {target.said(dense)} already; ask for less")
    most = method.most_removable(source.shapes)
    if ratio > most:
        least = target.said(dense + biases - most * each * linears)
        raise InputError(
            f"{target.flag} {asked} is out of reach: {method.name} leaves at least {least} of this model's "
            f"{target.said(dense)}"
        )
    return ratio


def bias_parameters(shapes: list[LayerShape], source: ModelSource, method: Method) -> int:
    """Parameters of the biases that the method adds to output projections."""
    if not method.adds_bias:
        return 0
    return source.missing_biases * shapes[0].hidden_size
