"""Names in a record: of models, texts and options."""

import json
import re
from pathlib import Path
from typing import Any

from ..architectures import LayerShape
from ..calibration.source import SELF
from ..errors import InputError
from ..methods import make_method

_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/\w+/?$")


def model_name(model: str) -> str:
    """A model's name: the last part of a path or hub id; of a folder of the hub's cache, the repository's."""
    snapshot = _SNAPSHOT.search(model)
    if snapshot:
        return snapshot[2]
    found = hub_id(model)
    return Path(found or model).name or model


def hub_id(model: str) -> str | None:
    """The hub id of a model as it was named, `org/name` without a revision; None for a folder of this machine."""
    snapshot = _SNAPSHOT.search(model)
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}"
    named = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@.+)?", model)  # as checkpoint.hub reads it
    return named[1] if named and not Path(model).exists() else None


def chosen_options(plan: dict[str, Any]) -> dict[str, Any]:
    """The options that the others and the method's defaults do not give; all of them of a method that is not here."""
    method, options = plan["method"], plan["options"]
    sizes = ("hidden_size", "head_dim", "kv_groups", "heads_per_group", "intermediate_channels")
    shape = LayerShape(*(plan["dense"][name] for name in sizes))
    chosen = dict(options)
    try:
        asked = make_method(method, options).fitted([shape]).options
    except InputError:  # no such method here
        return options
    for name in options:
        others = {other: value for other, value in chosen.items() if other != name}
        try:
            if make_method(method, others).fitted([shape]).options == asked:
                chosen = others
        except InputError:  # the method does not do without this option
            continue
    return chosen


def is_self_judged(evaluation: dict[str, Any]) -> bool:
    """Whether the evaluation's text was sampled from the dense model."""
    return bool(evaluation.get("self_judged", evaluation["text"] == SELF))


def plain(value: Any) -> str:
    """An option's value in words."""
    return value if isinstance(value, str) else json.dumps(value)


def options_text(plan: dict[str, Any]) -> str:
    """The chosen options of a plan in one line."""
    return ", ".join(f"{name} {plain(value)}" for name, value in chosen_options(plan).items())
