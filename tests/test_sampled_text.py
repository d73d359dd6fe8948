"""Sampled text that was kept is used again only where it belongs and is whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pyprune import InputError
from pyprune.windows import load_windows, save_windows

IDENTITY = {"model": "abc", "windows": [3, 4, 0], "versions": ["2", "5"]}
WINDOWS = torch.arange(12).view(3, 4)


def test_windows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "text.safetensors"
    save_windows(path, WINDOWS, IDENTITY)
    reordered = dict(reversed(list(IDENTITY.items())))
    for samples in (3, None):
        found = load_windows(path, reordered, 12, samples, 4)
        assert torch.equal(found, WINDOWS)
        assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": IDENTITY | {"model": "other"}}, "does not belong"),
        ({"identity": {}}, "does not belong"),
        ({"vocab_size": 11}, "token id 11 is outside"),
        ({"samples": 2}, "3 windows, not 2"),
        ({"sequence_length": 5}, r"int64 \[3, 4\]"),
    ],
)
def test_windows_of_something_else_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save_windows(path, WINDOWS, IDENTITY)
    arguments = {"identity": IDENTITY, "vocab_size": 12, "samples": 3, "sequence_length": 4} | changes
    with pytest.raises(InputError, match=rf"^{path}: .*{message}.*; delete it$"):
        load_windows(path, **arguments)


@pytest.mark.parametrize(
    "windows",
    [
        WINDOWS.float(), WINDOWS.int(), WINDOWS.float() / 0, WINDOWS - 1, WINDOWS[:0], WINDOWS[:, :3], WINDOWS[0],
        WINDOWS[None],
    ],
)  # fmt: skip
def test_tensors_that_are_no_windows_are_refused(windows: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save_windows(path, windows.contiguous(), IDENTITY)
    with pytest.raises(InputError, match=rf"^{path}: damaged sampled text \(.*\); delete it$"):
        load_windows(path, IDENTITY, 12, None, 4)


def test_files_that_hold_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save_windows(path, WINDOWS, IDENTITY)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:-8], whole[:20], b"\xff" * 100):
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"^{path}: damaged sampled text") as error:
            load_windows(path, IDENTITY, 12, 3, 4)
        assert "\n" not in str(error.value)
    save_file({"other": WINDOWS}, path)
    with pytest.raises(InputError, match="damaged sampled text"):
        load_windows(path, IDENTITY, 12, 3, 4)
    save_file({"windows": WINDOWS}, path)  # as before files said what they belong to
    with pytest.raises(InputError, match="does not belong"):
        load_windows(path, IDENTITY, 12, 3, 4)
