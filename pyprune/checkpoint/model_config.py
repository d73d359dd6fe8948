"""Checks of a model's configuration, wherever it comes from."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..architectures import Family, family_of
from ..architectures.declaration import NO_ROTARY
from ..architectures.family import whole_value
from ..errors import InputError
from ..runtime.files import reason_of
from .wrapping import text_family, wrapper_of


def refused(place: str, error: Exception) -> InputError:
    return InputError(f"{place}: transformers refuses this configuration: {reason_of(error)}")


def named_family(place: str, model_type: str | None, tensors: Callable[[], Iterable[str]]) -> Family:
    """The family of a model type. InputError: there is none; place: of the configuration, for the message."""
    try:
        return family_of(model_type, tensors)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def prunable_family(place: str, fields: dict[str, Any], tensors: Callable[[], Iterable[str]]) -> Family:
    """The family that a configuration's fields name; of a vision-language model that of its text model.

    tensors: gives the names of the model's tensors, for the message.

    InputError: there is none, or the model is quantised.
    """
    wrapper = wrapper_of(place, fields)
    if wrapper is None:
        family = named_family(place, fields.get("model_type"), tensors)
    else:
        family = text_family(place, wrapper, fields)
    if fields.get("quantization_config"):
        raise InputError(f"{place}: a quantised checkpoint cannot be pruned; prune first, quantise afterwards")
    return family


def checked_config(place: str, family: Family, make: Callable[[], Any]) -> Any:
    """The configuration that `make` returns. InputError: transformers refuses it, or no model computes with it."""
    try:
        config = make()
        if config.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}")
        family.layer_state_shapes(config, 0)
        family.check(config)
        _check_numbers(config)
    except InputError:
        raise
    except Exception as error:
        raise refused(place, error) from error
    heads, groups = (whole_value(config, name) if name else 1 for name in family.sizes[:2])
    if heads % groups:
        raise InputError(f"{place}: {family.sizes[0]} {heads} is not a multiple of {family.sizes[1]} {groups}")
    return config


# What the classes call the number that a norm adds to the mean square.
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


def _check_numbers(config: Any) -> None:
    """ValueError: a number that transformers takes and with which no model computes anything."""
    for name in _EPSILONS:
        if not 0 < float(getattr(config, name, 1)) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}")
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype}")
    if not 0 < int(config.max_position_embeddings) < 2**31:
        raise ValueError(f"max_position_embeddings is {config.max_position_embeddings}")


def check_rotary(place: str, family: Family, config: Any) -> None:
    """Make the rotary embedding: what it refuses of the configuration it refuses now. InputError."""
    if family.rotary == NO_ROTARY:
        return
    try:
        for name, frequencies in family.rotary_class(config).named_buffers():
            if name.endswith("inv_freq") and not bool((torch.isfinite(frequencies) & (frequencies >= 0)).all()):
                raise ValueError("the rotary embedding has frequencies that are not finite and positive")
    except Exception as error:
        raise refused(place, error) from error
