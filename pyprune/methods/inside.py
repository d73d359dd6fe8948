"""What a method may do to a text model inside of a vision-language model, which loads in transformers' class alone."""

from ..errors import InputError
from .base import Method, UnitMethod


def check_inside(method: Method, place: str, wrapper: str) -> None:
    """InputError: layers of several sizes, or biases that the class has not. place: the model in messages."""
    inside = f"{place}: the text model inside of {wrapper} stays in transformers' class"
    if method.shrinks and not isinstance(method, UnitMethod):
        raise InputError(
            f"{inside}, whose layers are alike: {method.name} cannot make them so; take obs, flap or slimgpt with "
            "--uniform"
        )
    if isinstance(method, UnitMethod) and not method.uniform:
        raise InputError(f"{inside}, whose layers are alike: add --uniform")
    if method.adds_bias:
        raise InputError(f"{inside}, which has no biases to compensate with: add --compensation none")
