"""The vision-language checkpoint around a text model: names of tensors, configuration, and what is copied as it is."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..architectures import FAMILIES, Family, LayerShape
from ..architectures.wrappers import WRAPPERS, Spelling, Wrapper
from ..errors import InputError
from ..runtime.files import write_json
from .headers import StoredTensor
from .names import WRAPPERS as MODULE_WRAPPERS

TEXT = "text_config"


@dataclass(frozen=True)
class Wrapping:
    """A checkpoint with a text model in it. fields: of its config.json. spelling: of the text model's tensors."""

    wrapper: Wrapper
    spelling: Spelling
    fields: dict[str, Any]

    def write_config(self, family: Family, text_config: Any, folder: Path) -> None:
        """Write config.json as it was, with the sizes of the text model's layers in `text_config`."""
        fields = copy.deepcopy(self.fields)
        names = [name for name in (*family.sizes, "head_dim") if name is not None]
        fields[TEXT] |= {name: getattr(text_config, name) for name in names}
        write_json(fields, folder / "config.json")


def wrapper_of(place: str, fields: Mapping[str, Any]) -> Wrapper | None:
    """The vision-language model that a configuration is of; None for a text model's.

    InputError: one that is not known; place: of the configuration, for the message.
    """
    name, text = fields.get("model_type"), fields.get(TEXT)
    if not isinstance(text, dict) or name in FAMILIES:
        return None
    if name not in WRAPPERS:
        raise InputError(
            f"{place}: a model of model_type {name!r} around a text model of {text.get('model_type')!r}: it is not "
            f"known; known: {_known()}"
        )
    return WRAPPERS[name]


def text_family(place: str, wrapper: Wrapper, fields: Mapping[str, Any]) -> Family:
    """The family of the text model. InputError: it is none that this vision-language model is known with."""
    name = fields[TEXT].get("model_type", wrapper.texts[0].name)
    found = next((family for family in wrapper.texts if family.name == name), None)
    if found is None:
        raise InputError(
            f"{place}: {wrapper.name} around a text model of model_type {name!r}, which is not known there; "
            f"known: {_known()}"
        )
    return found


def _known() -> str:
    return ", ".join(
        f"{wrapper.name} ({', '.join(family.name for family in wrapper.texts)})" for wrapper in WRAPPERS.values()
    )


@dataclass(frozen=True)
class Parts:
    """Tensors of a vision-language checkpoint: of its text model, by the names that one has alone; those beside it; and
    the names of those that are left out."""

    wrapping: Wrapping
    text: dict[str, StoredTensor]
    beside: dict[str, StoredTensor]
    left_out: list[str]


def parts_of(place: str, wrapper: Wrapper, fields: dict[str, Any], stored: Mapping[str, StoredTensor]) -> Parts:
    """Tell the text model's tensors from the others. InputError: there is none of the text model."""
    plain = {MODULE_WRAPPERS.sub(r"\1", name): tensor for name, tensor in stored.items()}
    spelling = next((own for own in wrapper.spellings if any(name.startswith(own.body) for name in plain)), None)
    if spelling is None:
        bodies = " or ".join(own.body for own in wrapper.spellings)
        raise InputError(f"{place}: {wrapper.name}, but no tensor's name begins with {bodies}: no text model is there")
    parts = Parts(Wrapping(wrapper, spelling, fields), {}, {}, [])
    for name, tensor in plain.items():
        inner = spelling.inner(name)
        if inner is not None:
            parts.text[inner] = tensor
        elif name.startswith(wrapper.left_out):
            parts.left_out.append(name)
        else:
            parts.beside[name] = tensor
    return parts


def with_taken_counts(family: Family, config: Any, shapes: list[LayerShape]) -> list[LayerShape]:
    """The shapes, with the numbers of KV groups that the class of a text model's configuration takes.

    Some insist on a hidden size that the heads divide.
    """
    fields = config.to_dict()

    def taken(shape: LayerShape, groups: int) -> bool:
        try:
            type(config)(**fields | family.layer_sizes(shape.kept(groups, shape.intermediate_channels)))
        except StrictDataclassError:
            return False
        return True

    counts = {shape: tuple(n for n in range(1, shape.kv_groups + 1) if taken(shape, n)) for shape in set(shapes)}
    return [replace(shape, group_counts=counts[shape]) for shape in shapes]
