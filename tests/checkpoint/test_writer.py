"""Parts are written behind the caller's back: one at a time, in order, and no error is lost."""

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
from pyprune.checkpoint.journal import FORMAT, read_journal

IDENTITY = {"ratio": 0.3}
NAMES = "abc"  # of the tensor of each part


def begun(output: Path, resume: bool = False, shard_size: int = 12) -> CheckpointWriter:
    """A writer of three parts of 12 bytes, each in a file of its own unless said otherwise."""
    made = CheckpointWriter(output, IDENTITY, resume)
    made.begin()
    made.lay_out([{name: torch.empty(3, device="meta")} for name in NAMES], shard_size)
    return made


def file_of(w: CheckpointWriter, part: int) -> Path:
    return w.plan.tensors[NAMES[part]].file


def journal(w: CheckpointWriter) -> list[int]:
    """Parts in the journal, each line of which must be whole."""
    assert (w.partial / "journal.jsonl").read_text().endswith("\n")
    first, *entries = read_journal(w.partial / "journal.jsonl")
    assert first == {"format": FORMAT, "identity": IDENTITY, "source": {}}
    return [entry["part"] for entry in entries]


class Gate:
    """Stands before the writing of every part; `started` is released when one has reached it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started, self.passes = threading.Semaphore(0), threading.Semaphore(0)
        self.at_once = self.most_at_once = 0

        def gated(*arguments: Any) -> Any:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.started.release()
            assert self.passes.acquire(timeout=60)
            written = shard_file.write_tensors(*arguments)
            self.at_once -= 1
            return written

        monkeypatch.setattr(writer, "write_tensors", gated)


def test_one_part_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, w = Gate(monkeypatch), begun(tmp_path / "out")
    w.write(0, {"a": torch.ones(3)}, record={"kept": [1]})
    assert gate.started.acquire(timeout=60)
    # The first write has returned though its part is not written, and so does not count.
    assert w.done == {}
    assert w.record(0) is None
    assert journal(w) == []
    second = threading.Thread(target=w.write, args=(1, {"b": torch.ones(3)}))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "two parts at once"
    gate.passes.release()
    second.join(60)
    assert not second.is_alive()
    assert w.record(0) == {"kept": [1]}
    assert journal(w) == [0]
    gate.passes.release()
    w.flush()
    assert journal(w) == [0, 1]
    assert w.wait_seconds > 0.1
    assert w.bytes_written == 12 * 2 + sum(map(len, w.plan.headers.values()))
    assert gate.most_at_once == 1


def test_what_is_handed_over_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may take entries out of its dictionary, and no written tensor is kept."""
    import weakref

    gate, w = Gate(monkeypatch), begun(tmp_path / "out")
    tensors = {"a": torch.ones(3)}
    references = [weakref.ref(t) for t in tensors.values()]
    w.write(0, tensors)
    tensors.clear()
    gate.passes.release()
    w.flush()
    assert [reference() for reference in references] == [None]
    assert load_file(file_of(w, 0))["a"].tolist() == [1, 1, 1]
    assert w.done[0]["checksums"].keys() == {"a"}


def test_the_line_comes_after_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w, fsync, synced = begun(tmp_path / "out"), os.fsync, []

    def watched(descriptor: int) -> None:
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), journal(w)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    w.write(1, {"b": torch.ones(3)})
    w.flush()
    assert synced == [(file_of(w, 1).name, []), ("journal.jsonl", [1])]


def test_files_and_their_headers_come_before_the_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, synced = os.fsync, []

    def watched(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    w = begun(tmp_path / "out")
    assert synced == ["journal.tmp", *(file.name for file in sorted(w.plan.headers)), "out.partial"]


def test_parts_that_lie_in_two_files(tmp_path: Path) -> None:
    """They count where both files have their bytes, and are written again where one of them lost them."""

    def two(resume: bool) -> CheckpointWriter:
        w = CheckpointWriter(tmp_path / "out", IDENTITY, resume)
        w.begin()
        w.lay_out(parts, 20)
        return w

    parts = [{name: torch.full((3,), float(n)) for n, name in enumerate(names)} for names in ("ab", "cd", "e")]
    w = two(resume=False)
    assert [w.plan.tensors[name].file.name for name in "abcde"] == [
        f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)
    ]
    for part, tensors in enumerate(parts):
        w.write(part, dict(tensors))
    w.flush()
    w.close()
    damaged = w.plan.tensors["d"]
    with damaged.file.open("r+b") as f:
        f.seek(damaged.offset)
        f.write(b"x")
    again = two(resume=True)
    assert again.done.keys() == {0, 2}
    again.write(1, dict(parts[1]))
    again.write_index()
    assert again.prove().keys() == set("abcde")
    assert all(torch.equal(again.read(k)[name], t) for k, part in enumerate(parts) for name, t in part.items())


@pytest.mark.parametrize("changed", ["shape", "shard size", "fewer parts"])
def test_what_another_plan_left_does_not_count(tmp_path: Path, changed: str) -> None:
    """A resumed run whose choice differs has other sizes: files of the old ones go, and none of theirs remains."""
    w = begun(tmp_path / "out")
    for part, name in enumerate(NAMES):
        w.write(part, {name: torch.ones(3)})
    w.write_index()
    w.close()
    again = CheckpointWriter(tmp_path / "out", IDENTITY, True)
    assert again.done.keys() == {0, 1, 2}
    again.begin()
    sizes = {"a": 3, "b": 3, "c": 4 if changed == "shape" else 3}
    if changed == "fewer parts":
        del sizes["c"]
    again.lay_out([{name: torch.ones(size)} for name, size in sizes.items()], 100 if changed == "shard size" else 16)
    kept = {"shape": {0, 1}, "shard size": set(), "fewer parts": set()}[changed]
    assert again.done.keys() == kept
    assert set(journal(again)) == kept
    for part, (name, size) in enumerate(sizes.items()):
        if part not in kept:
            again.write(part, {name: torch.ones(size)})
    again.write_index()
    assert again.prove().keys() == sizes.keys()
    again.finish()
    assert {file.name for file in again.output.glob("*.safetensors")} == {file.name for file in again.plan.headers}
    assert (again.output / "model.safetensors.index.json").exists() == (changed != "shard size")


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
    assert error.value.filename == str(file_of(w, 1))
    assert not w.output.exists()
    assert w.done.keys() == {0}
    assert journal(w) == [0]
    w.close()
    again = begun(tmp_path / "out", resume=True)
    for part in (1, 2):
        again.write(part, {NAMES[part]: torch.ones(3)})
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


def test_two_parts_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is begun while the first is on its way to the disk; the third waits. All are in the journal."""
    gate, w = Gate(monkeypatch), begun(tmp_path / "out")
    w.in_flight = 2
    for part in (0, 1):
        w.write(part, {NAMES[part]: torch.ones(3)})
    assert len(w._pending) == 2
    assert journal(w) == []
    threading.Timer(0.1, gate.passes.release, (2,)).start()
    w.write(2, {"c": torch.ones(3)})
    assert w.wait_seconds > 0.05
    gate.passes.release(8)
    w.write_index()
    assert sorted(journal(w)) == [0, 1, 2]
    for part, name in enumerate(NAMES):
        assert load_file(file_of(w, part))[name].tolist() == [1, 1, 1]


def test_close_finishes_the_part_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, w = Gate(monkeypatch), begun(tmp_path / "out")
    w.write(0, {"a": torch.ones(3)})
    threading.Timer(0.1, gate.passes.release).start()
    w.close()
    assert journal(w) == [0]
    assert not any(thread.is_alive() for thread in w._threads._threads)


def test_close_says_nothing_of_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called when the caller has an error of its own, and the part is written again on resume."""
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


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"b": torch.ones(3)},
        {"a": torch.ones(4)},
        {"a": torch.ones(3).bfloat16()},
        dict.fromkeys("ab", torch.ones(3)),
    ],
    ids=["none", "another", "shape", "type", "more"],
)
def test_other_tensors_than_planned(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    w = begun(tmp_path / "out")
    with pytest.raises(ValueError, match=r"part 0: tensor [ab] is .*, but .* was planned"):
        w.write(0, tensors)
    w.flush()
    assert journal(w) == []


@pytest.mark.gpu
def test_tensors_of_a_device_are_those_of_the_moment_of_writing(tmp_path: Path) -> None:
    """Their memory may be taken by others as soon as the writer lets go, and not before."""
    w = CheckpointWriter(tmp_path / "out", IDENTITY, False)
    w.begin()
    sizes = {"device": torch.empty(1000, 4000, dtype=torch.bfloat16, device="meta"), "host": torch.empty(3)}
    w.lay_out([{f"{name} {part}": tensor for name, tensor in sizes.items()} for part in range(3)], 10_000_000)
    for part in range(3):
        torch.cuda._sleep(100_000_000)
        tensor = torch.full((4000, 1000), float(part), device="cuda").T.to(torch.bfloat16)
        w.write(part, {f"device {part}": tensor, f"host {part}": torch.ones(3)})
        del tensor
        torch.full((4000, 1000), -1.0, device="cuda")
    w.write_index()
    for part in range(3):
        read = w.read(part)
        assert (read[f"device {part}"] == part).all()
        assert read[f"device {part}"].shape == (1000, 4000)
        assert (read[f"host {part}"] == 1).all()
