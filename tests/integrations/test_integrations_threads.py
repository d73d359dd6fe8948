"""CalibrationStatistics while several threads run the model: each row of each layer counts once, in the right sums."""

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from pyprune.integrations import CalibrationStatistics
from pyprune.integrations.patching import Calls

EPSILON = torch.finfo(torch.float32).eps
THREADS, FORWARDS, ROWS, CHANNELS = 6, 40, 5, 12

# What a forward may do: k reads a copy; the forward fails after q; nothing of the kind.
PLAIN, APART, FAILS = "plain", "apart", "fails"


class Block(nn.Module):
    """q, k and v read one tensor; down reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(CHANNELS, 8) for _ in range(3))
        self.down = nn.Linear(8, CHANNELS)

    def forward(self, x: Tensor, what: str = PLAIN) -> Tensor:
        q = self.q(x)
        if what == FAILS:
            raise KeyError(what)
        return self.down(q + self.k(x.clone() if what == APART else x) + self.v(x))


@pytest.fixture(autouse=True)
def threads_take_turns() -> Iterator[None]:
    """Within a few instructions, as on a busy machine."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_in_threads(work: Callable[[int], None], count: int = THREADS) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def record(model: nn.Module) -> dict[str, list[Tensor]]:
    """What each layer reads, in float64; a list takes what threads append without a loss."""
    seen: dict[str, list[Tensor]] = {
        name: [] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    for name, inputs in seen.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, inputs=inputs: inputs.append(arguments[0].detach().double().flatten(0, -2))
        )
    return seen


def check(statistics: CalibrationStatistics, seen: dict[str, list[Tensor]]) -> None:
    """Rows, Hessian, and moments of all that a layer read, in any order: each sum of n float32 terms to n roundings."""
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        own = statistics[name]
        assert own.rows == own.moments.count == len(x)
        bound = len(inputs) * EPSILON * (x.abs().T @ x.abs())
        assert ((own.hessian().double() - x.T @ x).abs() <= bound).all()
        assert ((own.moments.mean - x.mean(0)).abs() <= len(inputs) * EPSILON * x.abs().amax(0)).all()
        spread = ((x - x.mean(0)) ** 2).sum(0)
        torch.testing.assert_close(own.moments.m2.double(), spread, rtol=len(inputs) * EPSILON, atol=0)


def forwards(model: nn.Module, number: int, every: dict[int, str]) -> None:
    generator = torch.Generator().manual_seed(number)
    for step in range(FORWARDS):
        x = torch.randn(ROWS, CHANNELS, generator=generator)
        what = every.get(step % 10, PLAIN)
        with torch.no_grad():
            if what == FAILS:
                with pytest.raises(KeyError):
                    model(x, what)
            else:
                model(x, what)


# Each of what may happen with either value of both others, and those two in every combination.
CASES = [
    (share_inputs, first, every)
    for number, every in enumerate(({}, {7: APART}, {4: FAILS}, {3: APART, 8: FAILS}))
    for share_inputs in (False, True)
    for first in (share_inputs ^ (number % 2 == 1),)
]


@pytest.mark.parametrize(("share_inputs", "first", "every"), CASES)
def test_every_row_counts_once(share_inputs: bool, first: bool, every: dict[int, str]) -> None:
    torch.manual_seed(0)
    model = Block()
    seen = record(model)
    with CalibrationStatistics(model, moments=True, share_inputs=share_inputs) as statistics:
        if first:
            model(torch.randn(ROWS, CHANNELS))
        run_in_threads(lambda number: forwards(model, number, every))
    check(statistics, seen)
    assert len(torch.cat(seen["q"])) == (THREADS * FORWARDS + first) * ROWS
    assert statistics["down"].shared_with == set()
    if first and not every:  # threads between each other's layers are no reason to stop
        assert statistics["q"].shared_with == ({"k", "v"} if share_inputs else set())


def test_one_tensor_in_all_threads() -> None:
    model = Block()
    seen = record(model)
    x = torch.randn(ROWS, CHANNELS)

    def work(_: int) -> None:
        for _ in range(FORWARDS):
            with torch.no_grad():
                model(x)

    with CalibrationStatistics(model, moments=True, share_inputs=True) as statistics:
        run_in_threads(work)
    check(statistics, seen)


def test_statistics_are_read_meanwhile() -> None:
    """What a layer has read so far, whole batches of it; sums go on from there."""
    model = Block()
    seen = record(model)
    with CalibrationStatistics(model, moments=True, share_inputs=True) as statistics:
        model(torch.ones(ROWS, CHANNELS))

        def work(number: int) -> None:
            if number:
                forwards(model, number, {})
            for name in "qkv" * 5:
                hessian = statistics[name].hessian()
                assert hessian.shape == (CHANNELS, CHANNELS)
                assert statistics[name].rows % ROWS == 0

        run_in_threads(work)
    check(statistics, seen)


def test_each_thread_has_its_mask() -> None:
    """A thread's own, or that of the thread which made the statistics."""
    model = nn.Sequential(nn.Linear(CHANNELS, 3))
    kept: list[Tensor] = []

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for _ in range(FORWARDS):
            x = torch.randn(2 + number, CHANNELS, generator=generator)
            mask = torch.rand(2 + number, generator=generator) < 0.5
            if number:
                statistics.keep_rows(mask)
            else:
                mask = torch.tensor([True, False])
            model(x)
            kept.append(x[mask].double())

    with torch.no_grad(), CalibrationStatistics(model, share_inputs=True) as statistics:
        statistics.keep_rows(torch.tensor([1, 0]))
        run_in_threads(work)
    x = torch.cat(kept)
    assert statistics["0"].rows == len(x)
    assert ((statistics["0"].hessian().double() - x.T @ x).abs() <= len(kept) * EPSILON * (x.abs().T @ x.abs())).all()


def test_calls_are_counted_in_threads() -> None:
    calls = Calls()

    def work(_: int) -> None:
        for _ in range(500):
            calls.count(hessian_updates=1)
            calls.count(inverse_factors=2)

    run_in_threads(work)
    assert calls == Calls(THREADS * 500, THREADS * 1000)
