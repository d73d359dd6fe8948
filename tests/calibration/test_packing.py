"""Packing of documents, and conversations against transformers' own chat template."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pyprune import InputError
from pyprune.calibration.packing import Encoder, concatenated, separated
from pyprune.calibration.source import TokenSource
from pyprune.calibration.windows import spread_over, spread_windows
from pyprune.checkpoint import CheckpointReader

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + message.role) }}"
    "{% endif %}[{{ message.role }}]\n{{ message.content }}\n{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": f"What is {n} times {n}?"}, {"role": "assistant", "content": f"It is {n * n}."}]
    for n in range(40)
]
DOCUMENTS = ["short", "A document that has a few more words than the first one.", " ", "The third of them."] * 8


@pytest.fixture
def model(demo_model: Path, tmp_path: Path) -> Path:
    """The built-in model's configuration and tokenizer, with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


def rows(chats: list[list[dict[str, str]]], file: Path) -> str:
    import json

    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return str(file)


def source(text: Any, model: Path, demo_model: Path, packing: str) -> TokenSource:
    config = CheckpointReader(demo_model).config
    return TokenSource(text, model, config, torch.device("cpu"), torch.float32, packing=packing)


def test_windows_of_conversations_are_those_of_the_template(
    model: Path, demo_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = rows(CHATS, tmp_path / "chats.jsonl")
    by_chat = [tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"] for chat in CHATS]
    tokens = torch.tensor([token for ids in by_chat for token in ids])
    windows = source(text, model, demo_model, "concatenate").calibration(5, 32, 3)
    assert torch.equal(windows, spread_windows(tokens, 5, 32, 3))

    # The template's text, tokenized apart: no BOS twice, no EOS that the template does not write.
    said = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert by_chat == [tokenizer(each, add_special_tokens=False).input_ids for each in said]

    starts = {ids[0] for ids in by_chat}
    separate = source(text, model, demo_model, "separate").calibration(5, 32, 3)
    assert set(separate[:, 0].tolist()) == starts == {tokenizer.bos_token_id}


def expected_windows(by_document: list[list[int]], length: int) -> Iterator[list[int]]:
    """By hand: a window is full after as many documents as it takes; what is cut off is dropped."""
    first = 0
    while first < len(by_document):
        last, flat = first, list[int]()
        while last < len(by_document) and len(flat) < length:
            flat, last = flat + by_document[last], last + 1
        if len(flat) < length:
            return
        yield flat[:length]
        first = last


@pytest.mark.parametrize("length", [4, 7, 23, 60])
def test_separate_windows_begin_with_documents(
    length: int, model: Path, demo_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    by_document = [tokenizer(document).input_ids for document in DOCUMENTS if document.strip()]
    expected = torch.tensor(list(expected_windows(by_document, length)))
    encoder = Encoder(tokenizer, model)
    assert torch.equal(separated(DOCUMENTS, encoder, length, None), expected)
    assert torch.equal(separated(DOCUMENTS, encoder, length, 2), expected[:2])
    made = source(DOCUMENTS, model, demo_model, "separate")
    assert torch.equal(made.evaluation(length, None, 0), expected)
    assert torch.equal(made.calibration(2, length, 1), spread_over(expected, 2, 1))


def test_concatenated_stops_when_there_are_enough(model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    taken = []

    def documents() -> Iterator[str]:
        for number in range(1000):
            taken.append(number)
            yield f"Document {number} has some words in it."

    ids = concatenated(documents(), Encoder(tokenizer, model), 100)
    assert len(ids) == 100
    assert len(taken) < 20
    whole = concatenated([f"Document {n} has some words in it." for n in range(30)], Encoder(tokenizer, model), None)
    assert torch.equal(ids, whole[:100])


def test_what_is_said(model: Path, demo_model: Path, tmp_path: Path) -> None:
    text = rows(CHATS, tmp_path / "chats.jsonl")
    with pytest.raises(InputError, match="has no chat template for conversations: name a column with text by --text"):
        source(text, demo_model, demo_model, "concatenate").calibration(2, 16, 0)
    odd = rows([[{"role": "critic", "content": "no"}]], tmp_path / "odd.jsonl")
    with pytest.raises(
        InputError, match=r"its chat template refuses the conversation that begins .*\(no role critic\)"
    ):
        source(odd, model, demo_model, "concatenate").calibration(2, 16, 0)
    with pytest.raises(InputError, match="1 windows of 16 tokens that begin with a document, but 2 are asked"):
        source(["word " * 100], model, demo_model, "separate").calibration(2, 16, 0)
    with pytest.raises(InputError, match="its documents do not fill one window of 999 tokens"):
        source(["word"], model, demo_model, "separate").calibration(2, 999, 0)
    with pytest.raises(InputError, match="packing 'tight': one of concatenate, separate"):
        source(["word"], model, demo_model, "tight").calibration(2, 999, 0)
