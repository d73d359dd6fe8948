"""Data sets of the hub, streamed from a stand-in for it; and what is said where there is none."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.dataset_hub import COMMIT, ask, dataset_hub
from transformers import AutoTokenizer

from pyprune import InputError
from pyprune.calibration.source import TokenSource
from pyprune.calibration.sources.hub import dataset_documents, hub_documents
from pyprune.calibration.text import tokenize
from pyprune.calibration.windows import spread_windows
from pyprune.checkpoint import CheckpointReader

datasets = pytest.importorskip("datasets")

CARD = b"""---
configs:
- config_name: plain
  data_files:
  - split: train
    path: data/train-*.jsonl
  - split: test
    path: data/test.jsonl
- config_name: chat
  data_files: data/chat.jsonl
---
"""


def lines(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


TRAIN = [f"Row {i} of the first part, which holds a sentence." for i in range(60)]
FILES = {
    "README.md": CARD,
    "data/train-0.jsonl": lines([{"text": text, "id": i} for i, text in enumerate(TRAIN)]),
    "data/train-1.jsonl": lines([{"text": "the second part"}]) * 4000,
    "data/test.jsonl": lines([{"text": "a row of the test split"}, {"text": "and another"}]),
    "data/chat.jsonl": lines([{"messages": [{"role": "user", "content": "hello"}]}]),
}


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(f"datasets.config.{name}", str(tmp_path / name), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with dataset_hub("org/set", FILES, monkeypatch) as sent:
        yield sent


def test_a_stream_is_read_until_there_are_enough_tokens(sent: list[str], demo_model: Path) -> None:
    config = CheckpointReader(demo_model).config
    source = TokenSource("org/set:plain", demo_model, config, torch.device("cpu"), torch.float32)
    read = source.read_calibration(4, 32, 0)
    # Rows in order, joined by blank lines, up to twice the tokens of the windows.
    tokens = tokenize("\n\n".join(TRAIN), AutoTokenizer.from_pretrained(demo_model))[: 2 * 4 * 32]
    assert torch.equal(read.ids, spread_windows(tokens, 4, 32, 0))
    assert read.revision == COMMIT
    assert read.fingerprint == source.read_calibration(4, 32, 0).fingerprint
    assert "data/train-0.jsonl" in sent
    assert "data/train-1.jsonl" not in sent


def test_splits_and_configurations(sent: list[str]) -> None:
    assert list(hub_documents("org/set:plain:test")) == ["a row of the test split", "and another"]
    assert list(hub_documents("org/set:chat")) == [[{"role": "user", "content": "hello"}]]
    for spelled, message in (
        ("org/set", "has several configurations: name one of plain, chat, as name:config:split"),
        ("org/set:no", "has no configuration `no`: it has plain, chat"),
        ("org/set:plain:no", "has no split `no`: it has train, test"),
        ("org/other", r"neither a file here nor a data set of the hub \(a private one needs a login\)"),
    ):
        with pytest.raises(InputError, match=rf"^{spelled}: .*{message}$"):
            hub_documents(spelled)
    with pytest.raises(InputError, match=r"row 1: no `body` field: it is missing; the row has `text`, `id`"):
        list(hub_documents("org/set:plain", "body"))


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    ask("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(InputError, match=r"^org/set: not a file here, and the hub cannot be asked \(.*\)$") as error:
        hub_documents("org/set")
    assert "\n" not in str(error.value)


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        InputError, match=r"^org/set: not a file here.*needs the library datasets: pip install 'pyprune"
    ):
        hub_documents("org/set")


def test_data_sets_of_python() -> None:
    made = datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    assert list(dataset_documents(made)) == ["one", "two"]
    assert list(dataset_documents(made.to_iterable_dataset())) == ["one", "two"]
    with pytest.raises(InputError, match=r"data set of splits: give one of them, as dataset\['train'\]"):
        dataset_documents(datasets.DatasetDict({"train": made}))
    with pytest.raises(InputError, match="row 1: no `body` field"):
        list(dataset_documents(made, "body"))
