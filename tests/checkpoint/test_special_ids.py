"""Ids of special tokens and generation settings that would break the model for its user are found at the start."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from pyprune import InputError
from pyprune.checkpoint.special_ids import check_generation_config, check_special_ids, generation_fields

FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [None, -1, 0, 63])
def test_ids_in_the_vocabulary_and_none_are_taken(field: str, value: int | None) -> None:
    check_special_ids(LlamaConfig(vocab_size=64, **{field: value}), {field: value}, Path("m"))
    check_special_ids(LlamaConfig(vocab_size=64), {"eos_token_id": [value, 5]}, Path("m"))
    check_special_ids(LlamaConfig(vocab_size=64), None, Path("m"))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [64, 128_009, -2])
def test_ids_outside_are_named(field: str, value: int) -> None:
    message = rf"config\.json: {field} is {value}, outside the vocabulary of 64"
    with pytest.raises(InputError, match=rf"^m/{message}"):
        check_special_ids(LlamaConfig(vocab_size=64, **{field: value}), None, Path("m"))
    for fields in ({field: value}, {field: [3, value]}):
        with pytest.raises(InputError, match=rf"^m/generation_{message}"):
            check_special_ids(LlamaConfig(vocab_size=64), fields, Path("m"))


@pytest.mark.parametrize("value", ["2", 1.5, True, [None, [1]], {"id": 1}])
def test_what_is_no_id_is_named(value: Any) -> None:
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is .*a token's id"):
        check_special_ids(LlamaConfig(vocab_size=64), {"eos_token_id": value}, Path("m"))


def test_a_default_of_another_vocabulary_is_found_too() -> None:
    with pytest.raises(InputError, match="bos_token_id is 50256"):
        check_special_ids(GPT2Config(vocab_size=64), None, Path("m"))


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "top_k": 20}, {"eos_token_id": [1, 2]},
        {"max_length": None}, {"unknown": 1}, {"pad_token_id": -1}, {"transformers_version": "4.1.0"},
    ],
)  # fmt: skip
def test_settings_that_transformers_loads_are_taken(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    check_generation_config(tmp_path)
    assert generation_fields(tmp_path) == settings


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1]", "5", "null", "[" * 100_000, '{"a":' * 100_000, b"\xff\xfe",
        '{"early_stopping": "x"}', '{"num_return_sequences": 2}', '{"max_new_tokens": "a"}', '{"max_new_tokens": 0}',
        '{"cache_implementation": "zz"}', '{"watermarking_config": 5}', '{"suppress_tokens": 5}',
        '{"suppress_tokens": [1], "forced_eos_token_id": 1}', '{"compile_config": {}}',
    ],
)  # fmt: skip
def test_settings_that_it_does_not_are_one_line(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"generation_config\.json: ") as error:
        check_generation_config(tmp_path)
    assert "\n" not in str(error.value)


def test_no_settings_are_fine(tmp_path: Path) -> None:
    check_generation_config(tmp_path)
    assert generation_fields(tmp_path) is None
