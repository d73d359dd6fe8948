"""What processes of one run exchange, function by function, in three processes on CPUs, and in one alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.processes import run_together

from pyprune.calibration.channel_statistics import ReferenceFluctuation, merge_over_processes
from pyprune.errors import InputError
from pyprune.ops import ChannelMoments
from pyprune.runtime import distributed


def block_moments(rank: int) -> ChannelMoments:
    """Moments of 1, 100 and 5000 rows of 64 channels with offsets of up to 1000 standard deviations."""
    rows = torch.randn((1, 100, 5000)[rank], 64, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    rows += torch.linspace(-1000, 1000, 64, dtype=torch.float64) * (1 + rank / 100)
    return ChannelMoments(len(rows), rows.mean(0).float(), (rows - rows.mean(0)).square().sum(0).float())


def check_exchange() -> None:
    """In each of three processes: every function of pyprune.runtime.distributed against what it is to give."""
    with distributed.process_group():
        rank = distributed.rank()
        blocks = [block_moments(k) for k in range(3)]
        merged = block_moments(rank)
        merge_over_processes(merged)
        count = sum(b.count for b in blocks)
        mean = sum(b.count * b.mean.double() for b in blocks) / count
        m2 = sum(b.m2.double() + b.count * (b.mean.double() - mean) ** 2 for b in blocks)
        assert merged.count == count
        # Rounded once to float32, from float64 sums.
        torch.testing.assert_close(merged.mean.double(), mean, rtol=2**-24 * 1.001, atol=0)
        torch.testing.assert_close(merged.m2.double(), m2, rtol=2**-24 * 1.001, atol=0)
        first = distributed.broadcast_object(lambda: merged.m2)
        assert torch.equal(merged.m2, first)

        assert (
            distributed.local_windows(torch.arange(7)[:, None]).flatten().tolist() == [[0, 1, 2], [3, 4], [5, 6]][rank]
        )
        with pytest.raises(InputError, match="2 windows for 3 processes"):
            distributed.local_windows(torch.zeros(2, 5))
        assert distributed.all_reduce_sum(rank, 10) == [3, 30]
        assert distributed.all_reduce_min(5 - rank) == 3
        rows = torch.full((rank + 1, 2), float(rank))
        assert distributed.all_gather_rows(rows)[:, 0].tolist() == [0, 1, 1, 2, 2, 2]
        whole = torch.full((3, 4), rank)
        distributed.broadcast_(None, whole.T, whole[:, 1:2])
        assert whole.eq(0).all()
        total = torch.ones(2, 2) * rank
        distributed.all_reduce_(total, None)
        assert total.eq(3).all()


def test_exchange_between_three_processes(tmp_path: Path) -> None:
    processes = run_together(tmp_path / "logs", *[check_exchange] * 3)
    assert [process.status for process in processes] == [0, 0, 0], processes


def test_one_process_exchanges_nothing() -> None:
    """Every tensor is handed back as it is, the same object."""
    tensor = torch.tensor([1.0, torch.nan])
    distributed.all_reduce_(tensor)
    distributed.broadcast_(tensor)
    assert distributed.all_gather_rows(tensor) is distributed.local_windows(tensor) is tensor
    assert distributed.broadcast_object(lambda: tensor) is tensor
    assert distributed.all_reduce_sum(3, 4) == [3, 4]
    assert (distributed.rank(), distributed.world_size(), distributed.is_main_process()) == (0, 1, True)


def test_reference_fluctuation_in_the_order_of_all_windows() -> None:
    """Authors' running update over windows; an oracle in float64 straight from the formula in the docstring."""
    x = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = ReferenceFluctuation(3, torch.device("cpu"))
    for window in x:
        reference.update(ChannelMoments(8, window.mean(0), (window - window.mean(0)).square().sum(0)))
    expected = sum(
        (k - 1) / k * (x[k - 1] - x[:k].mean((0, 1))).square().sum(0) for k in range(2, 6)
    ) / 4  # fmt: skip
    torch.testing.assert_close(reference.value(), expected, rtol=1e-12, atol=0)


def test_each_process_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(distributed, "_group", SimpleNamespace(rank=1, size=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.local_device("auto") == distributed.local_device("cuda") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")] * 2
    assert distributed.local_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="'cuda:0' is one for 2 processes"):
        distributed.local_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes for 2 CUDA"):
        distributed.local_device("auto")
