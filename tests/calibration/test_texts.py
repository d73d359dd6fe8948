"""Texts as users have them: any case of suffix, any line ends, pipes; and what is no text, in a line."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.texts import read_text

import pyprune.calibration.sources.files
from pyprune import InputError


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.Txt"])
def test_a_text_is_the_same_whatever_ends_its_lines(name: str, end: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(end.join(["one", "", " two\u2028\x85 ", "three", ""]).encode())
    assert read_text(tmp_path / name) == "one\n\n two\u2028\x85 \nthree\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.JsonL"])
def test_records_are_the_same_whatever_ends_their_lines(name: str, end: str, tmp_path: Path) -> None:
    texts = ["in the record\r\nas it is", "a lone \r too", "\u2028"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / name).write_bytes(end.join([*lines, "", ""]).encode())
    assert read_text(tmp_path / name) == "\n\n".join(texts)


@pytest.mark.parametrize("name", ["pipe", "pipe.txt", "pipe.jsonl"])
def test_a_pipe_is_read_to_its_end(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    content = json.dumps({"text": "some text"}) if name.endswith("jsonl") else "some text"
    reader = os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK)  # so that the writer need not wait for one
    writer = os.open(tmp_path / name, os.O_WRONLY)
    os.write(writer, content.encode())
    threading.Timer(0.3, os.close, (writer,)).start()
    assert read_text(tmp_path / name) == "some text"
    os.close(reader)


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_folder, "cannot be read: Is a directory"),
        (_loop, "cannot be read: Too many levels"),
        (_dangling, "cannot be read: No such file"),
        (_bytes(b"PK\x03\x04 text \0\0"), "not a text: byte 10 is zero"),
        (_bytes("text".encode("utf-16")), "not a text: byte 3 is zero"),
        (_bytes(b"\x89PNG\r\n"), r"not UTF-8 text \(byte 0\)"),
        (_bytes(b"\r\n \r"), "has no text"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_is_no_text_is_one_line(name: str, make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        read_text(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["zero\0.txt", "x" * 5000 + ".txt", "half\ud800.txt", "bytes\udcff.txt", "folder", "a.csv"]
)
def test_names_that_are_no_texts_are_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").write_text("text")
    with pytest.raises(InputError) as error:
        read_text(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_text_without_end_is_not_read_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyprune.calibration.sources.files, "MOST_BYTES", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"word " * (1 << 18))
    with pytest.raises(InputError, match="more than 1 MiB of text"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(InputError, match="byte 0 is zero"):
        read_text("/dev/zero")


def test_a_number_or_a_nesting_that_python_does_not_read_is_one_line(tmp_path: Path) -> None:
    for line in ("[" * 100_000, '{"text": ' + "9" * 10_000 + "}"):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
        with pytest.raises(InputError, match=r"a\.jsonl, line 2: (not valid JSON|no `text` field)"):
            read_text(tmp_path / "a.jsonl")
