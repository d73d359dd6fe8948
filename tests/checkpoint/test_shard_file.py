"""The file is byte for byte what safetensors itself writes, from tensors of any strides and any device."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyprune.checkpoint.content import digest_of
from pyprune.checkpoint.shard_file import write_shard

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def samples(device: str) -> dict[str, Tensor]:
    """Every type; no dimension, none of a dimension's elements, strided in every way, one row larger than a piece."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        matrix = torch.randn(37, 53, generator=generator).to(device, dtype)
        tensors |= {
            f"{dtype}.matrix": matrix,
            f"{dtype}.transposed": matrix.T,
            f"{dtype}.columns": matrix[:, 3:11],
            f"{dtype}.stepped": matrix[::5, ::3],
            f"{dtype}.vector": matrix[4],
            f"{dtype}.column": matrix[:, 4],
            f"{dtype}.expanded": matrix[:1, :1].expand(19, 2),
            f"{dtype}.permuted": matrix[:36, :52].view(6, 6, 4, 13).permute(2, 0, 3, 1),
            f"{dtype}.wide": torch.randn(2, 900, 2, generator=generator).to(device, dtype)[..., 0],
            f"{dtype}.scalar": matrix[2, 2],
            f"{dtype}.empty": matrix[:0],
            f"{dtype}.no columns": matrix[:, :0],
            f'{dtype}."é\\\n': matrix[1],
        }
    return tensors


def side_stream(device: str) -> torch.cuda.Stream | None:
    """One that waits for all that was asked of the device so far."""
    if device == "cpu":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("piece_bytes", [600, 4096, 16 << 20])
def test_bytes_are_those_of_safetensors(
    tmp_path: Path, device: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyprune.checkpoint.shard_file.PIECE_BYTES", piece_bytes)
    tensors = samples(device)
    expected = {name: t.cpu().contiguous() for name, t in tensors.items()}
    save_file({name: t.clone() for name, t in expected.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    given = dict(tensors)
    size, digests = write_shard(tmp_path / "ours", given, side_stream(device))
    assert size == (tmp_path / "theirs").stat().st_size
    assert digests == {name: digest_of(t) for name, t in expected.items()}
    assert given == {}
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    read = load_file(tmp_path / "ours")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_shard(tmp_path / "ours", {})
    save_file({}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_parameters_and_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, part, position: pwrite(fd, part[:101], position))
    weight = torch.nn.Parameter(torch.arange(600.0).view(20, 30))
    write_shard(tmp_path / "file", {"plain": weight, "turned": weight.T})
    read = load_file(tmp_path / "file")
    assert torch.equal(read["plain"], weight)
    assert torch.equal(read["turned"], weight.T)


def test_a_left_over_file_does_not_keep_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10_000)
    file.chmod(0o600)
    write_shard(file, {"a": torch.ones(3)})
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    assert load_file(file)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_an_error_names_the_file_and_leaves_none(
    tmp_path: Path, device: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(os, call), []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == (3 if call == "pwrite" else 1):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return original(*arguments)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EDQUOT))) as error:
        write_shard(tmp_path / "file", samples(device), side_stream(device))
    assert (error.value.errno, error.value.filename) == (errno.EDQUOT, str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_values_that_are_still_in_the_making(tmp_path: Path) -> None:
    """The stream waits for them."""
    expected = torch.arange(9_000_000, dtype=torch.float32).view(3000, 3000)
    tensor = torch.zeros(3000, 3000, device="cuda")
    source = expected.cuda()
    torch.cuda._sleep(200_000_000)  # some 100 ms
    tensor.copy_(source)
    assert not torch.cuda.current_stream().query()
    write_shard(tmp_path / "file", {"plain": tensor, "turned": tensor.T}, side_stream("cuda"))
    read = load_file(tmp_path / "file")
    assert torch.equal(read["plain"], expected)
    assert torch.equal(read["turned"], expected.T)
