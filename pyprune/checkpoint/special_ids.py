"""The small things of a checkpoint that break only its user: ids of special tokens, and generation settings."""

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runtime.files import read_json, reason_of

_GENERATION = "generation_config.json"
_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_special_ids(config: Any, generation_config_fields: dict[str, Any] | None, folder: Path) -> None:
    """Ids of BOS, EOS (one or several) and padding lie in the vocabulary.

    None is no such token, and so is -1, which old checkpoints have for padding; transformers takes both.
    InputError: with the file, the field, the id and the vocabulary's size.
    """
    check_ids(config, generation_config_fields or {}, str(folder / "config.json"), str(folder / _GENERATION))


def check_ids(config: Any, generation_config_fields: dict[str, Any], config_place: str, generation_place: str) -> None:
    """As `check_special_ids`, of a configuration and of generation settings that are called so in messages."""
    text = config.get_text_config()
    own = {field: getattr(text, field, None) for field in _FIELDS}
    for place, fields in ((config_place, own), (generation_place, generation_config_fields)):
        for field in _FIELDS:
            value = fields.get(field)
            for each in value if isinstance(value, list | tuple) else [value]:
                _check_id(each, int(text.vocab_size), f"{place}: {field}")


def _check_id(value: Any, vocab_size: int, place: str) -> None:
    if value is None or (type(value) is int and -1 <= value < vocab_size):
        return
    if type(value) is not int:
        raise InputError(f"{place} is {value!r}: a token's id, a list of them or null is needed")
    raise InputError(f"{place} is {value}, outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})")


def generation_fields(folder: Path) -> dict[str, Any] | None:
    """generation_config.json as it is written, None where there is none. InputError: it is no JSON object."""
    file = folder / _GENERATION
    if not file.is_file():
        return None
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise InputError(f"{file}: not generation settings: a JSON object is needed")
    return fields


def check_generation_config(folder: Path) -> None:
    """Check that transformers loads the generation settings: if not, it refuses the whole model.

    InputError: it does not. Settings that it only warns of (a temperature where nothing is sampled) are taken: many
    published models have them.
    """
    fields = generation_fields(folder)
    if fields is None:
        return
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(dict(fields)).validate()
    except Exception as error:  # wrong types raise whatever the comparison with them raises
        raise InputError(
            f"{folder / _GENERATION}: transformers refuses these settings: {reason_of(error)}; "
            f"correct them or delete the file"
        ) from error
