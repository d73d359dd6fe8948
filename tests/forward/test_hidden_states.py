"""Hidden states in micro-batches, on the device and in host memory."""

import pytest
import torch

from pyprune.forward.hidden_states import HiddenStates

SIZE = (7, 5, 3)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def states(device: str, on_device: bool, batch: int) -> HiddenStates:
    hidden = HiddenStates.empty(SIZE, torch.float32, torch.device(device), batch, on_device)
    hidden.data.copy_(torch.arange(105.0).view(SIZE))
    return hidden


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
@pytest.mark.parametrize(
    ("device", "on_device"),
    [
        ("cpu", True),
        ("cpu", False),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
    ],
)
def test_parts_are_read_and_replaced_in_order(device: str, on_device: bool, batch: int) -> None:
    hidden = states(device, on_device, batch)
    assert hidden.on_device == (on_device or device == "cpu")
    for _ in range(3):
        rows = []
        for part in hidden.micro_batches():
            assert part.value.device.type == device
            rows.append(len(part.value))
            part.write_back(part.value * 2 + 1)
        assert sum(rows) == 7
        assert max(rows) == min(batch, 7)
    if device == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(hidden.data.cpu(), torch.arange(105.0).view(SIZE) * 8 + 7)


@pytest.mark.gpu
def test_the_next_part_waits_for_the_buffer() -> None:
    """The device is slower than the host: a part must not be overwritten while it is still read."""
    hidden = HiddenStates.empty((9, 300, 1000), torch.float32, torch.device("cuda"), 1, on_device=False)
    hidden.data.copy_(torch.arange(9.0)[:, None, None].expand(9, 300, 1000))
    sums = []
    for part in hidden.micro_batches():
        torch.cuda._sleep(2_000_000)
        sums.append(part.value.mean())
        part.write_back(part.value + 1)
    for part in hidden.micro_batches():
        torch.cuda._sleep(2_000_000)
        sums.append(part.value.mean())
    assert torch.stack(sums).tolist() == [*range(9), *range(1, 10)]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_copy_has_memory_of_its_own(device: str) -> None:
    hidden = states(device, True, 2)
    other = hidden.copy(on_device=False)
    for part in other.micro_batches():
        part.write_back(torch.zeros_like(part.value))
    if device == "cuda":
        torch.cuda.synchronize()
    assert other.data.sum() == 0
    assert hidden.data.sum() == sum(range(105))
