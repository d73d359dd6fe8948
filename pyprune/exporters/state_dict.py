"""Check the written tensors against the state dict of the class that their config.json names."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..architectures.wrappers import CLASS_SPELLING
from ..checkpoint.headers import StoredTensor
from ..checkpoint.wrapping import Wrapping
from ..errors import VerificationError


def check_state_dict(folder: Path, written: Mapping[str, StoredTensor], wrapping: Wrapping | None = None) -> None:
    """Compare names and shapes with those of the model's own state dict, which allocates nothing.

    folder: with a config.json that transformers and pyprune's registered classes know. wrapping: the vision-language
    model that it is of; its text model is compared.

    Raises:
        VerificationError: a tensor is missing, has another shape, or is not the class's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if wrapping is None else AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrapping is not None:
        shapes = {name: shape for name, shape in shapes.items() if CLASS_SPELLING.inner(name) is not None}
        inner = {wrapping.spelling.inner(name): tensor for name, tensor in written.items()}
        written = {CLASS_SPELLING.stored(name): tensor for name, tensor in inner.items() if name is not None}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    tied = {name for name, parameter in every if first[id(parameter)] != name}
    for name in sorted((shapes.keys() - tied) | written.keys()):
        asked, found = shapes.get(name), written[name].shape if name in written else None
        if asked != found:
            raise VerificationError(
                f"{folder}: tensor {name}: {_described(found)} was written, but {type(model).__name__} has "
                f"{_described(asked)}; please report it"
            )


def _described(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else f"shape {list(shape)}"
