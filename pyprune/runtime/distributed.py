"""One run on several processes, as `torchrun` starts them: each sees its own windows, all get the same statistics.

In one process every function here hands back what it was given. In several, each must be called by all of them in the
same order. Before anything is exchanged, all meet at torchrun's store: there a process that waits learns that another
one failed, which it would not inside a collective operation, least of all on a GPU.

The first process that fails says why in its one line and names the exit status; the others see that at the store and
leave without a word, with the same status. The user then sees that line, and torchrun's own report below it, whose
status is always 1. A process that was killed leaves no word; then torchrun ends the others.
"""

import errno
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from .device import select_device
from .stopping import Stopped

T = TypeVar("T")

# All do the same work between two meetings; the longest difference is a slow disk's over one layer.
TIMEOUT = timedelta(minutes=30)
# Wait of a process that ended for the others, which may have to remove their files.
FAREWELL_SECONDS = 60.0
# Pauses, in seconds, between a waiting process's looks at the store: longer and longer.
SHORTEST_PAUSE, LONGEST_PAUSE = 1e-4, 5e-3
FAILED = "failed"


class _Group:
    """The processes of this run, from the inside of one: its rank among `size`, and the store where they meet."""

    def __init__(self) -> None:
        store, self.rank, self.size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        self.store = dist.PrefixStore("pyprune", store)
        self.meetings = 0
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=dist.PrefixStore("group", store),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )

    def next_meeting(self) -> str:
        self.meetings += 1
        return f"meeting-{self.meetings}"

    def meet(self) -> None:
        """Wait until every process is here. OSError: another one failed, or does not come."""
        meeting = self.next_meeting()
        with _store_there():
            if self.store.add(f"{meeting}-arrived", 1) == self.size:
                self.store.set(meeting, "")
        self.wait_for(meeting, TIMEOUT.total_seconds())

    def wait_for(self, key: str, seconds: float) -> None:
        """Wait until the key is in the store. OSError: another process failed, or the time is up."""
        start, pause = time.monotonic(), SHORTEST_PAUSE
        while not self._has(key):
            if self._has(FAILED):
                raise OSError(errno.ECONNABORTED, "another process of this run failed", "torchrun")
            if time.monotonic() - start > seconds:
                minutes = round(seconds / 60)
                raise OSError(errno.ETIMEDOUT, f"another process did not come for {minutes} minutes", "torchrun")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)

    def _has(self, key: str) -> bool:
        with _store_there():
            return self.store.check([key])

    def fail(self, status: int) -> tuple[bool, int]:
        """Return whether this process was the first to fail, and the exit status that the first one named."""
        try:
            word = self.store.compare_set(FAILED, "", f"{self.rank} {status}").decode()
        except dist.DistNetworkError:  # the store went with its process, which left no word
            return True, status
        first, named = word.split()
        return int(first) == self.rank, int(named)

    def close(self) -> None:
        """Leave together: one that ended earlier would take its connections, and maybe the store, from the others."""
        with suppress(dist.DistNetworkError):  # the store went with its process: nobody to take leave of
            self.store.add("left", 1)
            deadline = time.monotonic() + FAREWELL_SECONDS
            while self.store.add("left", 0) < self.size and time.monotonic() < deadline:
                time.sleep(LONGEST_PAUSE)
        dist.destroy_process_group()


@contextmanager
def _store_there() -> Iterator[None]:
    """OSError where the store is gone, with the process that had it."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise OSError(errno.ECONNABORTED, "another process of this run is gone", "torchrun") from error


_group: _Group | None = None


@contextmanager
def process_group() -> Iterator[None]:
    """Let the processes that torchrun started work together; without torchrun it does nothing.

    All but the first have no stdout and log errors only. An exception that leaves it becomes SystemExit with the
    status of the process that failed first (1 unless that one left by SystemExit); only there is it printed. Stopped
    leaves it as it is, in a process that has to end then.
    """
    global _group
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    _group, stopped = _Group(), False
    try:
        with ExitStack() as quiet:
            if not is_main_process():
                quiet.enter_context(redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
                logging.getLogger("pyprune").setLevel(logging.ERROR)
            yield
    except Stopped:
        stopped = True
        raise
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise SystemExit(_group.fail(stop.code if isinstance(stop.code, int) else 1)[1]) from stop
    except BaseException as error:
        first, status = _group.fail(1)
        if first:  # here, since the others' leaving makes torchrun end this process
            traceback.print_exc()
            sys.stderr.flush()
        raise SystemExit(status) from error
    finally:
        # The others got the signal too, or the store went with the process that had it: nobody to take leave of.
        if not stopped:
            _group.close()
            _group = None


def may_report(status: int) -> bool:
    """Return whether this process is the first that failed, which prints the error and exits with `status`."""
    return _group is None or _group.fail(status)[0]


def rank() -> int:
    return 0 if _group is None else _group.rank


def world_size() -> int:
    return 1 if _group is None else _group.size


def is_main_process() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def local_device(name: str) -> torch.device:
    """`select_device`; in several processes `auto` and `cuda` are a device for each, which is then the current one.

    InputError as there, and for more processes than devices, or one device for all.
    """
    if _group is None:
        return select_device(name)
    if name.startswith("cuda:"):
        raise InputError(f"device {name!r} is one for {_group.size} processes; give cuda, each takes its own")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices and name in ("auto", "cuda"):
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        if here > devices:
            raise InputError(f"{here} processes for {devices} CUDA device(s): start one a device, or use --device cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = select_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_windows(count: int) -> None:
    """InputError unless every process gets a window of `count`."""
    if count < world_size():
        raise InputError(
            f"{count} windows for {world_size()} processes: each needs one; "
            "start fewer processes, or ask for more windows (--samples, --allocation-samples)"
        )


def local_windows(windows: Tensor) -> Tensor:
    """This process's block of windows [N, tokens], a view; sizes differ by one at most. InputError: too few."""
    check_windows(len(windows))
    return windows.tensor_split(world_size())[rank()] if _group else windows


def all_reduce_(*tensors: Tensor | None) -> None:
    """Make every tensor the sum over all processes, in place, to the same bits on each; None is passed over.

    Contiguous, any numeric type, on the CPU or this process's CUDA device. OSError: another process failed.
    """
    if _group is not None:
        _group.meet()
        for tensor in tensors:
            if tensor is not None:
                _exchange(dist.all_reduce, tensor)


def all_reduce_sum(*counts: int) -> list[int]:
    """The sum of each count over all processes."""
    if _group is None:
        return list(counts)
    sums = torch.tensor(counts, dtype=torch.int64)
    all_reduce_(sums)
    return sums.tolist()


def all_reduce_min(number: int) -> int:
    """The least of all processes' numbers."""
    if _group is None:
        return number
    least = torch.tensor(number, dtype=torch.int64)
    _group.meet()
    _exchange(dist.all_reduce, least, dist.ReduceOp.MIN)
    return int(least)


def all_gather_rows(rows: Tensor) -> Tensor:
    """All-gather rows [own, ...] of every process in the order of ranks: [all, ...]."""
    if _group is None:
        return rows
    sizes = torch.zeros(_group.size, dtype=torch.int64)
    sizes[_group.rank] = len(rows)
    all_reduce_(sizes)
    own = slice(int(sizes[: _group.rank].sum()), int(sizes[: _group.rank + 1].sum()))
    everything = rows.new_zeros(int(sizes.sum()), *rows.shape[1:])
    everything[own] = rows
    all_reduce_(everything)  # exact: every row is one process's, and zeros
    return everything


def broadcast_(*tensors: Tensor | None) -> None:
    """Overwrite every tensor by the first process's, whose shape and type it has; None is passed over."""
    if _group is not None:
        _group.meet()
        for tensor in tensors:
            if tensor is not None:
                whole = tensor.contiguous()
                _exchange(dist.broadcast, whole, 0)
                if whole is not tensor:
                    tensor.copy_(whole)


def broadcast_object(make: Callable[[], T]) -> T:
    """Broadcast what `make` returns in the main process, which alone calls it: a small object that can be pickled."""
    if _group is None:
        return make()
    box = [make()] if is_main_process() else [None]
    _group.meet()
    _exchange(dist.broadcast_object_list, box, 0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process does what is within it before the others do, however long it takes."""
    if _group is None:
        yield
        return
    meeting = _group.next_meeting()
    if not is_main_process():
        _group.wait_for(meeting, math.inf)
    yield
    if is_main_process():
        _group.store.set(meeting, "")


def _exchange(operation: Callable[..., object], *arguments: object, **named: object) -> None:
    try:
        operation(*arguments, **named)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OSError(errno.ECONNRESET, f"the processes lost touch ({reason})", "torchrun") from error
