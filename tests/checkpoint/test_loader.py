"""Layers come whole, in order and once, one ahead of the caller; what cannot be read names its file and tensor."""

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyprune.checkpoint import CheckpointReader, LayerPrefetcher, content

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
LAYERS = 4


@pytest.fixture(params=["llama", "qwen2"])
def reader(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> CheckpointReader:
    """Of a copy that a test may break: two layers a file, one file (llama) or with an index (qwen2, with biases)."""
    sharding = {"llama": 0, "qwen2": 2}[request.param]
    folder = tiny_checkpoint(family=request.param, layers=LAYERS, dtype="bfloat16", shard_layers=sharding)
    return CheckpointReader(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """`loader_of` makes the pieces that digests are taken of smaller; after each test they are what they were."""
    monkeypatch.setattr(content, "LEAF_BYTES", content.LEAF_BYTES)


def loader_of(reader: CheckpointReader, path: str, threads: int = 3, chunk_bytes: int = 1000) -> LayerPrefetcher:
    """`path`: "mapped", "copied" (the way of CUDA with a CPU as its device), or "cuda"."""
    device = torch.device("cuda" if path == "cuda" else "cpu")
    content.LEAF_BYTES = 2  # which divides all chunks of these tests
    loader = LayerPrefetcher(reader, device, threads=threads, chunk_bytes=chunk_bytes)
    loader._mapped = path == "mapped"
    return loader


def threads_of_loaders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("layer")]


def assert_layer(tensors: dict[str, Tensor], reader: CheckpointReader, layer: int) -> None:
    expected = reader.read_layer(layer)
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor.cpu(), expected[name]), name


@pytest.mark.parametrize("path", ["mapped", "copied", CUDA])
# One chunk a tensor, chunks that end inside an element's row, and chunks that divide nothing evenly.
@pytest.mark.parametrize(("threads", "chunk_bytes"), [(1, 1 << 20), (2, 4096), (8, 998)])
def test_every_layer_as_read_layer_gives_it(
    reader: CheckpointReader, path: str, threads: int, chunk_bytes: int
) -> None:
    loader = loader_of(reader, path, threads, chunk_bytes)
    count = 0
    for layer, tensors in enumerate(loader.layers()):
        assert_layer(tensors, reader, layer)
        count += 1
    assert count == LAYERS
    sizes = [sum(t.bytes for t in reader.layer_tensors(layer).values()) for layer in range(LAYERS)]
    assert loader.bytes_read == sum(sizes)
    assert loader.wait_seconds > 0
    for layer, tensors in enumerate(loader.layers(2), 2):
        assert_layer(tensors, reader, layer)
    for layer, tensors in enumerate(loader.layers(1, 3), 1):
        assert_layer(tensors, reader, layer)
    assert loader.bytes_read == sum(sizes) + sum(sizes[2:]) + sum(sizes[1:3])
    assert list(loader.layers(3, 3)) == []
    assert not threads_of_loaders()


@pytest.mark.parametrize("path", ["mapped", "copied", CUDA])
def test_a_layer_is_given_up_when_the_next_is_asked_for(reader: CheckpointReader, path: str) -> None:
    layers = loader_of(reader, path).layers()
    first = next(layers)
    kept = first["self_attn.q_proj.weight"]
    second = next(layers)
    assert first == {}
    assert torch.equal(kept.cpu(), reader.read_layer(0)["self_attn.q_proj.weight"])
    assert_layer(second, reader, 1)
    layers.close()


def test_layers_that_are_not_there(reader: CheckpointReader) -> None:
    for first, stop in ((-1, None), (0, LAYERS + 1), (3, 2)):
        with pytest.raises(ValueError, match="of 4"):
            next(loader_of(reader, "mapped").layers(first, stop))


@pytest.mark.parametrize("path", ["mapped", "copied", CUDA])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_early_ends_the_threads(reader: CheckpointReader, path: str, taken: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    layers: Any = loader_of(reader, path).layers()
    for _ in range(taken):
        next(layers)
    layers.close()
    assert not threads_of_loaders()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(StopIteration):
        next(layers)


@pytest.mark.parametrize("path", ["mapped", "copied"])
def test_exactly_one_layer_is_read_ahead(reader: CheckpointReader, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the caller has layer 1, all of layer 2 is read, by other threads, and nothing of layer 3."""
    reads = watch_reads(monkeypatch)
    layers: Any = loader_of(reader, path).layers()
    next(layers)
    next(layers)
    expected = bytes_of(reader, 0) | bytes_of(reader, 1) | bytes_of(reader, 2)
    for _ in range(2000):
        if reads.covered >= expected:
            break
        threading.Event().wait(0.005)
    assert reads.covered == expected
    assert reads.thread_names == {f"layer_{k}" for k in range(1 if path == "mapped" else 3)}
    layers.close()


def bytes_of(reader: CheckpointReader, layer: int) -> set[tuple[str, int]]:
    return {
        (t.file.name, byte)
        for t in reader.layer_tensors(layer).values()
        for byte in range(t.offset, t.offset + t.bytes)
    }


class Reads:
    def __init__(self) -> None:
        self.covered: set[tuple[str, int]] = set()
        self.thread_names: set[str] = set()


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads, lock, preadv = Reads(), threading.Lock(), os.preadv

    def watched(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        with lock:
            reads.covered |= {(file, byte) for byte in range(offset, offset + count)}
            reads.thread_names.add(threading.current_thread().name)
        return count

    monkeypatch.setattr(os, "preadv", watched)
    return reads


@pytest.mark.parametrize("path", ["mapped", "copied", CUDA])
def test_short_reads_are_continued(reader: CheckpointReader, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:333]], offset))
    for layer, tensors in enumerate(loader_of(reader, path).layers()):
        assert_layer(tensors, reader, layer)


@pytest.mark.parametrize("path", ["mapped", "copied", CUDA])
def test_a_file_that_is_cut_short_meanwhile(reader: CheckpointReader, path: str) -> None:
    name = "self_attn.k_proj.weight"
    stored = reader.layer_tensors(2)[name]
    layers: Any = loader_of(reader, path).layers()
    next(layers)
    os.truncate(stored.file, stored.offset + 10)
    # The thread meets the cut in layer 2 or, if it was done with that already, in layer 3; or, from a CPU, layer 1 is
    # to be mapped from a file that has become too short for its header.
    end = rf"\d+, the file (ends )?at {stored.offset + 10}"
    message = rf"tensor model\.layers\.[23]\.\S+ (goes on to byte {end}: cut short since|ends at byte {end})"
    with pytest.raises(OSError, match=message) as short:
        for _ in layers:
            pass
    assert short.value.errno == errno.EIO
    assert short.value.filename == str(stored.file)
    assert not threads_of_loaders()


@pytest.mark.parametrize("path", ["mapped", "copied", CUDA])
def test_a_read_error_is_raised_in_the_caller(
    reader: CheckpointReader, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = reader.layer_tensors(2)["mlp.up_proj.weight"]
    fail_to_read(monkeypatch, range(place.offset, place.offset + place.bytes), place.file)
    layers: Any = loader_of(reader, path).layers()
    assert_layer(next(layers), reader, 0)
    assert_layer(next(layers), reader, 1)
    message = re.escape(f"tensor model.layers.2.mlp.up_proj.weight: {os.strerror(errno.EIO)}")
    with pytest.raises(OSError, match=message) as failed:
        next(layers)
    assert (failed.value.errno, failed.value.filename) == (errno.EIO, str(place.file))
    assert not threads_of_loaders()


def fail_to_read(monkeypatch: pytest.MonkeyPatch, bad: range, file: Path) -> None:
    preadv = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset in bad and os.readlink(f"/proc/self/fd/{descriptor}") == str(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)


@pytest.mark.parametrize("path", ["mapped", "copied"])
def test_a_file_that_is_gone(reader: CheckpointReader, path: str) -> None:
    file = reader.layer_tensors(LAYERS - 1)["input_layernorm.weight"].file
    file.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(file.name)):
        list(loader_of(reader, path).layers())
    assert not threads_of_loaders()


def test_host_memory_does_not_grow_on_a_cpu(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Anonymous memory, that of copies: 2 MB of buffers and threads, beside layers of 25 MB in mapped files."""
    folder = tiny_checkpoint(family="llama", layers=4, hidden_size=1024, heads=8, intermediate_size=3072)
    loader = LayerPrefetcher(CheckpointReader(folder), torch.device("cpu"))
    peak = before = anonymous_bytes()
    for tensors in loader.layers():
        assert sum(t.nbytes for t in tensors.values()) > 24e6
        assert sum(float(t[..., -1].float().sum()) for t in tensors.values())
        peak = max(peak, anonymous_bytes())
    assert peak - before < 8e6


def anonymous_bytes() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


# --- on a CUDA device ---


@pytest.fixture
def large(tiny_checkpoint: Callable[..., Path]) -> CheckpointReader:
    """Six layers of 25 MB."""
    return CheckpointReader(
        tiny_checkpoint(family="llama", layers=6, hidden_size=1024, heads=8, intermediate_size=3072)
    )


def delayed_sums(layers: Iterator[dict[str, Tensor]]) -> list[Tensor]:
    """A sum over each layer that the device is slow to begin with: the caller is far ahead of it."""
    sums = []
    for tensors in layers:
        torch.cuda._sleep(50_000_000)  # some 30 ms, in which the next layer could be read several times
        sums.append(torch.stack([t.double().sum() for t in tensors.values()]).sum())
    return sums


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_memory_is_not_overwritten_while_the_device_reads_it(large: CheckpointReader, own_stream: bool) -> None:
    expected = [sum(float(t.double().sum()) for t in large.read_layer(k).values()) for k in range(large.layers)]
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        sums = delayed_sums(LayerPrefetcher(large, torch.device("cuda"), threads=4, chunk_bytes=1 << 20).layers())
        found = torch.stack(sums).cpu()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-6)


@pytest.mark.gpu
def test_two_layers_of_device_memory(large: CheckpointReader) -> None:
    layer = sum(t.bytes for t in large.layer_tensors(0).values())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in LayerPrefetcher(large, torch.device("cuda"), threads=4, chunk_bytes=1 << 20).layers():
        torch.cuda._sleep(10_000_000)
    assert torch.cuda.max_memory_allocated() - before < 2.1 * layer


@pytest.mark.gpu
def test_closing_early_leaves_later_memory_alone(large: CheckpointReader) -> None:
    """Copies that are under way when the caller gives up must not land in what takes the memory next."""
    layers: Any = LayerPrefetcher(large, torch.device("cuda"), threads=4, chunk_bytes=1 << 20).layers()
    next(layers)
    layers.close()
    fresh = [torch.zeros(1 << 20, device="cuda") for _ in range(20)]
    torch.cuda.synchronize()
    assert not any(t.any() for t in fresh)
