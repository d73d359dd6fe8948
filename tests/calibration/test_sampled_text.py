"""Sampled text that was kept is used again only where it belongs and is whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pyprune import InputError
from pyprune.calibration.windows import checked_windows
from pyprune.checkpoint import load_cached, save_cached

IDENTITY = {"model": "abc", "windows": [3, 4, 0], "versions": ["2", "5"]}
WINDOWS = torch.arange(12).view(3, 4)


def save(path: Path, windows: Tensor) -> None:
    save_cached({"windows": windows}, path, {"source": "{}"}, IDENTITY)


def load(
    path: Path,
    identity: dict[str, Any] = IDENTITY,
    samples: int | None = 3,
    sequence_length: int = 4,
    vocab_size: int = 12,
) -> Tensor:
    tensors, metadata = load_cached(path, "sampled text", identity)
    assert metadata == {"source": "{}"}
    return checked_windows(path, tensors, samples, sequence_length, vocab_size)


def test_windows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "text.safetensors"
    save(path, WINDOWS)
    reordered = dict(reversed(list(IDENTITY.items())))
    for samples in (3, None):
        found = load(path, reordered, samples)
        assert torch.equal(found, WINDOWS)
        assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": IDENTITY | {"model": "other"}}, "of something else"),
        ({"identity": {}}, "of something else"),
        ({"vocab_size": 11}, "token id 11 is outside"),
        ({"samples": 2}, r"windows of shape \[3, 4\]"),
        ({"sequence_length": 5}, r"windows of shape \[3, 4\]"),
    ],
)
def test_windows_of_something_else_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save(path, WINDOWS)
    with pytest.raises(InputError, match=rf"^{path}: .*{message}.*; delete it$"):
        load(path, **changes)


@pytest.mark.parametrize(
    "windows",
    [
        WINDOWS.float(), WINDOWS.int(), WINDOWS.float() / 0, WINDOWS - 1, WINDOWS[:0], WINDOWS[:, :3], WINDOWS[0],
        WINDOWS[None],
    ],
)  # fmt: skip
def test_tensors_that_are_no_windows_are_refused(windows: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save(path, windows.contiguous())
    with pytest.raises(InputError, match=rf"^{path}: damaged sampled text \(.*\); delete it$"):
        load(path, samples=None)


def test_files_that_hold_none_are_refused(tmp_path: Path) -> None:
    """Of no such format, cut short, with other values of the same shape, or from before files had a digest."""
    path = tmp_path / "text.safetensors"
    save(path, WINDOWS)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:-8], whole[:20], b"\xff" * 100, whole[:-8] + b"\x01" + bytes(7)):
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"^{path}: damaged sampled text") as error:
            load(path)
        assert "\n" not in str(error.value)
    for tensors in ({"other": WINDOWS}, {"windows": WINDOWS}):
        save_file(tensors, path)
        with pytest.raises(InputError, match="damaged sampled text"):
            load(path)
