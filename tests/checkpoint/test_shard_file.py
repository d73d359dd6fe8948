"""Files are byte for byte what safetensors itself writes, from tensors of any strides and any device, in any order."""

import errno
import os
import random
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyprune.checkpoint.content import Digests, digest_of
from pyprune.checkpoint.shard_file import is_reserved, reserve_shard, write_tensors
from pyprune.checkpoint.shard_plan import ShardPlan, check_shard_size, plan_shards
from pyprune.errors import InputError

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


def reserved(folder: Path, parts: list[dict[str, Tensor]], shard_size: int = 1 << 40) -> ShardPlan:
    """The plan of files that are there, with their headers."""
    plan = plan_shards(folder, parts, shard_size)
    for file, header in plan.headers.items():
        reserve_shard(file, header, plan.sizes[file])
    return plan


def write(folder: Path, tensors: dict[str, Tensor], stream: torch.cuda.Stream | None = None) -> Digests:
    """Write them as one part of one file, model.safetensors."""
    return write_tensors(reserved(folder, [tensors]).tensors, dict(tensors), stream)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("piece_bytes", [600, 4096, 16 << 20])
def test_bytes_are_those_of_safetensors(
    tmp_path: Path, device: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyprune.checkpoint.shard_file.PIECE_BYTES", piece_bytes)
    tensors = samples(device)
    expected = {name: t.cpu().contiguous() for name, t in tensors.items()}
    save_file({name: t.clone() for name, t in expected.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    plan = reserved(tmp_path, [tensors])
    given = dict(tensors)
    digests = write_tensors(plan.tensors, given, side_stream(device))
    file = tmp_path / "model.safetensors"
    assert plan.sizes == {file: (tmp_path / "theirs").stat().st_size}
    assert digests == {name: digest_of(t) for name, t in expected.items()}
    assert given == {}
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()
    read = load_file(file)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shard_size", [1, 1000, 3000, 5000, 20_000, 1 << 40])
def test_files_are_those_of_save_pretrained(tmp_path: Path, shard_size: int) -> None:
    """huggingface_hub divides the tensors, safetensors writes its files: ours have the same names and bytes."""
    given = samples("cpu").items()  # empty ones have no memory by which huggingface_hub could tell them apart
    tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in given if t.numel()}
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[first : first + 7]} for first in range(0, len(names), 7)]
    in_order = {name: tensors[name] for part in parts for name in part}
    theirs = split_torch_state_dict_into_shards(in_order, max_shard_size=shard_size)
    plan = reserved(tmp_path, parts, shard_size)
    for part in random.Random(shard_size).sample(parts, len(parts)):  # whichever comes first
        write_tensors(plan.tensors, dict(part))
    assert {file.name for file in tmp_path.iterdir()} == theirs.filename_to_tensors.keys()
    for file, inside in theirs.filename_to_tensors.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / file).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    """To its elements, from the beginning of the file, though the parts mix types of odd lengths."""
    kinds = (torch.bfloat16, torch.int32, torch.float16, torch.float32)
    parts = [{f"{k}.{kind}": torch.empty(2 * k + 1, dtype=kind, device="meta") for kind in kinds} for k in range(9)]
    for shard_size in (40, 400, 4000):
        for place in plan_shards(tmp_path, parts, shard_size).tensors.values():
            assert place.offset % place.dtype.itemsize == 0


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write(tmp_path, {})
    save_file({}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_type_that_no_checkpoint_has(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"tensor a is torch\.float64; float32, bfloat16, float16, int32 or int64 is needed"
    ):
        plan_shards(tmp_path, [{"a": torch.ones(3, dtype=torch.float64)}], 1000)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "5GB"])
def test_a_size_that_no_file_has(size: object) -> None:
    with pytest.raises(InputError, match="a whole number of bytes is needed"):
        check_shard_size(size)


def test_parameters_and_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, part, position: pwrite(fd, part[:101], position))
    weight = torch.nn.Parameter(torch.arange(600.0).view(20, 30))
    write(tmp_path, {"plain": weight, "turned": weight.T})
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["plain"], weight)
    assert torch.equal(read["turned"], weight.T)


def test_a_reserved_file_is_whole_and_takes_no_space(tmp_path: Path) -> None:
    plan = reserved(tmp_path, [{"a": torch.empty(1 << 28, device="meta")}])
    ((file, header),) = plan.headers.items()
    assert is_reserved(file, header, plan.sizes[file])
    assert file.stat().st_size == len(header) + (4 << 28)
    assert file.stat().st_blocks * 512 < 1 << 20
    with safe_open(file, framework="pt") as f:
        assert f.get_slice("a").get_shape() == [1 << 28]
    os.truncate(file, 100)
    assert not is_reserved(file, header, plan.sizes[file])
    file.unlink()
    assert not is_reserved(file, header, plan.sizes[file])


def test_a_left_over_file_does_not_keep_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 10_000)
    file.chmod(0o600)
    write(tmp_path, {"a": torch.ones(3)})
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    assert load_file(file)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_an_error_names_the_file(tmp_path: Path, device: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two files the one that refused."""
    tensors = samples(device)
    plan = reserved(tmp_path, [tensors], 30_000)
    original, last = getattr(os, call), max(plan.headers)
    assert len(plan.headers) > 1

    def failing(descriptor: int, *arguments: object) -> object:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(last):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return original(descriptor, *arguments)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EDQUOT))) as error:
        write_tensors(plan.tensors, tensors, side_stream(device))
    assert (error.value.errno, error.value.filename) == (errno.EDQUOT, str(last))


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_a_file_that_cannot_be_reserved_does_not_stay(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EFBIG))) as error:
        reserved(tmp_path, [{"a": torch.ones(3)}])
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "model.safetensors"))
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
    write(tmp_path, {"plain": tensor, "turned": tensor.T}, side_stream("cuda"))
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["plain"], expected)
    assert torch.equal(read["turned"], expected.T)
