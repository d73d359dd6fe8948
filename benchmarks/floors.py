"""What a run cannot be faster than: the disk's own rates, and the bare forward over the calibration text."""

import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from generated import GeneratedReader

from pyprune.forward.layer_forward import LayerForward
from pyprune.runtime.device import select_dtype
from pyprune.testing.random_checkpoint import make_checkpoint

CHUNK = 16 << 20  # bytes a call: the calls' own cost does not show
READERS = (1, 4)  # threads: a file system in the network may need several to give what it can


def drop_page_cache(folder: Path) -> None:
    """Have the weights in `folder` read from the disk again."""
    os.sync()  # a page that is still to be written stays
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rates(folder: Path, scratch: Path, limit: int) -> dict[str, Any]:
    """Bytes per second of reading the weights in `folder` and of writing to `scratch`, up to `limit` bytes each."""
    reads = {}
    for threads in READERS:
        drop_page_cache(folder)
        reads[threads] = _read_rate(folder, limit, threads)
    size = min(limit, sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    return {
        "read_bytes_per_second": max(reads.values()),
        "read_threads": max(reads, key=reads.__getitem__),
        "write_bytes_per_second": _write_rate(scratch, size),
    }


def _read_rate(folder: Path, limit: int, threads: int) -> float:
    own = threading.local()

    def read(place: tuple[Path, int]) -> int:
        path, offset = place
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(CHUNK)
        with path.open("rb", buffering=0) as file:
            return os.preadv(file.fileno(), [own.buffer], offset)

    places = [
        (path, offset)
        for path in sorted(folder.glob("*.safetensors"))
        for offset in range(0, path.stat().st_size, CHUNK)
    ]
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        total = sum(pool.map(read, places[: max(1, limit // CHUNK)]))
        return total / (time.perf_counter() - start)


def _write_rate(scratch: Path, size: int) -> float:
    chunk = os.urandom(min(CHUNK, size))
    with tempfile.NamedTemporaryFile(dir=scratch) as file:
        start = time.perf_counter()
        written = 0
        while written < size:
            written += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return written / (time.perf_counter() - start)


def forward_seconds(
    sizes: dict[str, Any], samples: int, sequence_length: int, device: torch.device, scratch: Path
) -> float:
    """Seconds of one random layer's forward over all windows, warm, hidden states on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)  # a run with --device-memory lowers it
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        make_checkpoint(folder, headers_only=True, **(sizes | {"layers": 1, "vocab_size": 256}))
        reader = GeneratedReader(Path(folder), device)
        windows = torch.randint(0, 256, (samples, sequence_length), generator=torch.Generator().manual_seed(0))
        forward = LayerForward(reader, windows, device, select_dtype("auto", reader.dtype, device))
        hidden = forward.embed()
        block = forward.build(list(reader.read_layer(0).items()), 0)
        seconds = 0.0
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            forward.run(block, 0, hidden, {})
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
    return seconds
