"""Every kind of text gives the same documents and token ids; what is no text is one line."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pyprune import InputError
from pyprune.calibration.source import TokenSource
from pyprune.calibration.sources.builtin import builtin_documents
from pyprune.calibration.sources.documents import Documents
from pyprune.calibration.sources.files import file_documents
from pyprune.calibration.sources.open import open_documents
from pyprune.calibration.text import tokenize
from pyprune.checkpoint import CheckpointReader

pyarrow = pytest.importorskip("pyarrow")

TEXTS = [
    'A "quoted" line,\nwith a comma and naïve letters\u2028.' + " More words follow." * 20,
    "  spaces around  ",
    "The third document.\n\nIt has two paragraphs.",
]
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def _csv(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def _json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
each_kind = pytest.mark.parametrize("suffix", WRITERS)


@each_kind
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_the_same_in_every_file(suffix: str, packed: bool, tmp_path: Path, demo_model: Path) -> None:
    rows = [{"id": i, "text": text, "body": text[::-1]} for i, text in enumerate(TEXTS)]
    data, path = WRITERS[suffix](rows), tmp_path / f"rows{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert list(file_documents(path)) == TEXTS
    assert list(file_documents(path, "body")) == [text[::-1] for text in TEXTS]

    # The ids of the tokenizer itself: one BOS, the documents with blank lines between, no EOS.
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = tokenizer("\n\n".join(TEXTS), add_special_tokens=False).input_ids
    expected = torch.tensor([tokenizer.bos_token_id, *ids])
    config = CheckpointReader(demo_model).config
    source = TokenSource(str(path), demo_model, config, torch.device("cpu"), torch.float32)
    assert torch.equal(source.evaluation(16, None, 0).flatten(), expected[: len(expected) // 16 * 16])


def test_a_packed_txt_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT.GZ"
    path.write_bytes(gzip.compress(b"one\r\ntwo\n\nthree", mtime=0))
    assert list(file_documents(path)) == ["one\ntwo\n\nthree"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("column", ["messages", "conversations", "dialogue"])
def test_conversations(suffix: str, column: str, tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(WRITERS[suffix]([{"id": 1, column: CHAT}, {"id": 2, column: CHAT[:1]}]))
    named = column if column == "dialogue" else None
    assert list(file_documents(path, named)) == [CHAT, CHAT[:1]]
    path.write_bytes(WRITERS[suffix]([{"id": 1, column: sharegpt}]))
    assert list(file_documents(path, named)) == [CHAT]


def test_fields_that_parquet_fills_are_left_out(tmp_path: Path) -> None:
    """A message without a field that another one has reads as from JSON: templates ask whether it is there."""
    messages = [{**CHAT[0], "name": "Ann"}, CHAT[1]]
    for suffix in (".parquet", ".jsonl"):
        (tmp_path / f"a{suffix}").write_bytes(WRITERS[suffix]([{"messages": messages}]))
        assert list(file_documents(tmp_path / f"a{suffix}")) == [messages]


def test_json_may_hold_strings_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TEXTS))
    assert list(file_documents(path)) == TEXTS
    path.write_bytes(_jsonl([{"text": text} for text in TEXTS]))
    assert list(file_documents(path)) == TEXTS


def test_a_long_field_of_a_csv(tmp_path: Path) -> None:
    limit, long = csv.field_size_limit(), "word " * 50_000  # the module's limit is 128 KiB
    (tmp_path / "a.csv").write_bytes(_csv([{"text": long}]))
    assert list(file_documents(tmp_path / "a.csv")) == [long]
    assert csv.field_size_limit() == limit


def test_the_fingerprint_is_of_the_documents(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    prints = []
    for suffix, write in WRITERS.items():
        (tmp_path / f"a{suffix}").write_bytes(write(rows))
        documents = file_documents(tmp_path / f"a{suffix}")
        assert len(list(documents)) == 3
        prints.append(documents.fingerprint)
    given = open_documents(TEXTS)
    assert list(given) == TEXTS
    assert {*prints, given.fingerprint} == {prints[0]}
    changed = open_documents([*TEXTS[:2], TEXTS[2] + " "])
    assert len(list(changed)) == 3
    assert changed.fingerprint != prints[0]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", "has no text"),
        ("a.csv", b"text\n", "has no text"),
        ("a.csv", b"id,body\n1,b\n", "line 1: no `text` field with a string, and no `messages`; it has `id`, `body`"),
        ("a.csv", b"text\na,b\n", "line 2: more fields than the header has columns"),
        ("a.csv", b'text\n"never ends', "not valid CSV near line 1"),
        ("a.csv", b"text\n\0", "not a text: byte 5 is zero"),
        ("a.json", b"[1, 2]", "row 1: no `text` field"),
        ("a.json", b"[{]", "not valid JSON"),
        ("a.json", b'["a", {"text": [{"role": "user"}]}]', "row 2: `text` mixes strings and conversations"),
        ("a.jsonl", b'{"messages": []}', "line 1: `messages` is no conversation, a list of"),
        ("a.jsonl", b'{"messages": ["hello"]}', "line 1: `messages` is no conversation, a list of"),
        ("a.jsonl", b'{"id": 1, "body": "b"}', "it has `id`, `body`: name one with --text-column"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"word " * 1000, mtime=0)[:-20], "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b"\x89PNG", mtime=0), r"not UTF-8 text \(byte 0\)"),
        ("a.parquet", b"", "has no text"),
        ("a.parquet", b"PAR1 is not all", "not a whole Parquet file"),
        ("a.parquet", _parquet([{"text": "a"}])[:-30], "not a whole Parquet file"),
        ("a.parquet", _parquet([{"id": 1, "body": "b"}]), "it has `id`, `body`: name one with --text-column"),
        ("a.parquet", _parquet([{"text": "a"}, {"text": None}]), "row 2: no `text` field: it is not a string"),
        ("a.pdf.gz", b"", "a text is a file .txt, .jsonl, .json, .csv or .parquet"),
    ],
)
def test_what_is_no_text_is_one_line(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        list(file_documents(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


@each_kind
def test_a_column_that_is_not_there(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(WRITERS[suffix]([{"id": 1, "text": "b"}]))
    with pytest.raises(InputError, match=r"no `body` field: it is missing; the row has `id`, `text`$"):
        file_documents(tmp_path / f"a{suffix}", "body")


def test_names_that_are_files_and_names_that_are_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    for name in ("missing.csv.gz", "./missing", "/missing.parquet"):
        with pytest.raises(InputError, match=rf"^{Path(name)}: (cannot be read: No such file|no such file)"):
            open_documents(name)
    with pytest.raises(InputError, match=r"^org/missing: no such file \(the hub is not asked: org is a folder here\)$"):
        open_documents("org/missing")
    with pytest.raises(InputError, match=r"^some words: neither a file here nor a data set of the hub, name\[:config"):
        open_documents("some words")


def test_the_builtin_text() -> None:
    documents = list(builtin_documents())
    size = sum(len(document.encode()) for document in documents if isinstance(document, str))
    assert len(documents) == 336
    assert 200_000 <= size <= 1_000_000
    assert all(isinstance(document, str) and document.strip() == document for document in documents)


def test_fewer_windows_of_the_builtin_text(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = iter(["word " * 200] * 2)
    monkeypatch.setattr("pyprune.calibration.sources.open.builtin_documents", lambda: Documents("builtin", short))
    config = CheckpointReader(demo_model).config
    source = TokenSource("builtin", demo_model, config, torch.device("cpu"), torch.float32)
    tokens = len(tokenize("\n\n".join(["word " * 200] * 2), AutoTokenizer.from_pretrained(demo_model)))
    assert source.calibration(1000, 64, 0).shape == (tokens // 64, 64)
