"""Shards are written behind the caller's back: one at a time, in order, and no error is lost."""

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyprune.checkpoint import CheckpointWriter, shard_file, writer
from pyprune.checkpoint.journal import read_journal

IDENTITY = {"ratio": 0.3}


def begun(output: Path, shards: int = 3, resume: bool = False) -> CheckpointWriter:
    made = CheckpointWriter(output, shards, IDENTITY, resume)
    made.begin()
    return made


def journal(w: CheckpointWriter) -> list[int]:
    """Shards in the journal, each line of which must be whole."""
    assert (w.partial / "journal.jsonl").read_text().endswith("\n")
    first, *entries = read_journal(w.partial / "journal.jsonl")
    assert first == {"identity": IDENTITY, "source": {}}
    return [entry["shard"] for entry in entries]


class Gate:
    """Stands before the writing of every shard; `started` is released when one has reached it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started, self.passes = threading.Semaphore(0), threading.Semaphore(0)
        self.at_once = self.most_at_once = 0

        def gated(*arguments: Any) -> Any:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.started.release()
            assert self.passes.acquire(timeout=60)
            written = shard_file.write_shard(*arguments)
            self.at_once -= 1
            return written

        monkeypatch.setattr(writer, "write_shard", gated)


def test_one_shard_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, w = Gate(monkeypatch), begun(tmp_path / "out")
    w.write(0, {"a": torch.ones(3)}, record={"kept": [1]})
    assert gate.started.acquire(timeout=60)
    # The first write has returned though its shard is not written, and so does not count.
    assert w.done == {}
    assert w.record(0) is None
    assert journal(w) == []
    second = threading.Thread(target=w.write, args=(1, {"b": torch.ones(3)}))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "two shards at once"
    gate.passes.release()
    second.join(60)
    assert not second.is_alive()
    assert w.record(0) == {"kept": [1]}
    assert journal(w) == [0]
    gate.passes.release()
    w.flush()
    assert journal(w) == [0, 1]
    assert w.wait_seconds > 0.1
    assert w.bytes_written == sum(w.file(k).stat().st_size for k in (0, 1))
    assert gate.most_at_once == 1


def test_what_is_handed_over_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may take entries out of its dictionary, and no written tensor is kept."""
    import weakref

    gate, w = Gate(monkeypatch), begun(tmp_path / "out")
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    references = [weakref.ref(t) for t in tensors.values()]
    w.write(0, tensors)
    tensors.clear()
    gate.passes.release()
    w.flush()
    assert [reference() for reference in references] == [None, None]
    assert load_file(w.file(0)).keys() == {"a", "b"}
    assert w.done[0]["checksums"].keys() == {"a", "b"}


def test_the_line_comes_after_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w, fsync, synced = begun(tmp_path / "out"), os.fsync, []

    def watched(descriptor: int) -> None:
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), sorted(os.listdir(w.partial))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    w.write(1, {"a": torch.ones(3)})
    w.flush()
    name = w.file(1).stem
    assert synced == [
        (f"{name}.tmp", ["journal.jsonl", f"{name}.tmp"]),
        ("out.partial", ["journal.jsonl", f"{name}.safetensors"]),
        ("journal.jsonl", ["journal.jsonl", f"{name}.safetensors"]),
    ]


CALLS: dict[str, Callable[[CheckpointWriter], object]] = {
    "write": lambda w: w.write(2, {"c": torch.ones(3)}),
    "flush": lambda w: w.flush(),
    "write_index": lambda w: w.write_index(),
    "finish": lambda w: w.finish(),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_an_error_of_the_thread_reaches_the_caller(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = begun(tmp_path / "out")
    w.write(0, {"a": torch.ones(3)})
    w.flush()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails(errno.EIO))
        w.write(1, {"b": torch.ones(3)})
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))) as error:
            CALLS[call](w)
    assert error.value.filename == str(w.file(1).with_suffix(".tmp"))
    assert not w.output.exists()
    assert w.done.keys() == {0}
    assert journal(w) == [0]
    assert sorted(p.name for p in w.partial.iterdir()) == ["journal.jsonl", w.file(0).name]
    w.close()
    again = begun(tmp_path / "out", resume=True)
    for shard in (1, 2):
        again.write(shard, {f"{shard}": torch.ones(3)})
    again.write_index()
    again.finish()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def fails(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_no_half_line_stays_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w, fsync = begun(tmp_path / "out"), os.fsync
    w.write(0, {"a": torch.ones(3)})
    w.flush()

    def full(descriptor: int) -> None:
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("journal.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        w.write(1, {"b": torch.ones(3)})
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))):
            w.flush()
    assert journal(w) == [0]
    assert w.done.keys() == {0}
    w.write(2, {"c": torch.ones(3)})
    w.flush()
    assert journal(w) == [0, 2]


def test_two_shards_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is begun while the first is on its way to the disk; the third waits. All are in the journal."""
    gate, w = Gate(monkeypatch), begun(tmp_path / "out")
    w.in_flight = 2
    for shard in (0, 1):
        w.write(shard, {f"{shard}": torch.ones(3)})
    assert len(w._pending) == 2
    assert journal(w) == []
    threading.Timer(0.1, gate.passes.release, (2,)).start()
    w.write(2, {"2": torch.ones(3)})
    assert w.wait_seconds > 0.05
    gate.passes.release(8)
    w.write_index()
    assert sorted(journal(w)) == [0, 1, 2]
    for shard in range(3):
        assert (load_file(w.file(shard))[f"{shard}"] == 1).all()


def test_close_finishes_the_shard_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, w = Gate(monkeypatch), begun(tmp_path / "out")
    w.write(0, {"a": torch.ones(3)})
    threading.Timer(0.1, gate.passes.release).start()
    w.close()
    assert journal(w) == [0]
    assert not any(thread.is_alive() for thread in w._threads._threads)


def test_close_says_nothing_of_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called when the caller has an error of its own, and the shard is written again on resume."""
    w = begun(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails(errno.EIO))
        w.write(0, {"a": torch.ones(3)})
        w.close()
    assert journal(w) == []


def test_discard_waits_for_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, w = Gate(monkeypatch), begun(tmp_path / "out")
    w.write(0, {"a": torch.ones(3)})
    threading.Timer(0.1, gate.passes.release).start()
    w.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_no_checkpoint_has(tmp_path: Path) -> None:
    w = begun(tmp_path / "out")
    with pytest.raises(ValueError, match=r"tensor a is torch\.float64; float32, bfloat16, float16 or int32 is needed"):
        w.write(0, {"a": torch.ones(3, dtype=torch.float64)})
    w.flush()
    assert journal(w) == []


@pytest.mark.gpu
def test_tensors_of_a_device_are_those_of_the_moment_of_writing(tmp_path: Path) -> None:
    """Their memory may be taken by others as soon as the writer lets go, and not before."""
    w = begun(tmp_path / "out")
    for shard in range(3):
        torch.cuda._sleep(100_000_000)
        tensor = torch.full((4000, 1000), float(shard), device="cuda").T.to(torch.bfloat16)
        w.write(shard, {f"{shard}": tensor, f"host {shard}": torch.ones(3)})
        del tensor
        torch.full((4000, 1000), -1.0, device="cuda")
    w.write_index()
    for shard in range(3):
        read = load_file(w.file(shard))
        assert (read[f"{shard}"] == shard).all()
        assert read[f"{shard}"].shape == (1000, 4000)
        assert (read[f"host {shard}"] == 1).all()
