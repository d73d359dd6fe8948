"""CalibrationStatistics: what the hooks gather equals float64 over each layer's own inputs, shared or not."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyprune.errors import InputError
from pyprune.integrations import CalibrationStatistics
from pyprune.ops import inverse_factor

EPSILON = torch.finfo(torch.float32).eps


class Block(nn.Module):
    """q, k and v read one tensor; down reads another. `apart`: k reads its own copy in this forward."""

    def __init__(self, channels: int = 24, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(channels, 8, dtype=dtype) for _ in range(3))
        self.down = nn.Linear(8, channels, dtype=dtype)
        self.idle = nn.Linear(8, 8, dtype=dtype)

    def forward(self, x: Tensor, apart: Tensor | None = None, change: bool = False) -> Tensor:
        q = self.q(x)
        if change:
            x.mul_(2)
        k = self.k(input=x if apart is None else apart)
        return self.down(torch.tanh(q + k + self.v(x)))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def record() -> Iterator[Callable[[nn.Module], dict[str, list[Tensor]]]]:
    """What each Linear reads, in float64, by hooks of its own."""
    handles = []

    def start(model: nn.Module) -> dict[str, list[Tensor]]:
        seen: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):

                def hook(_: nn.Module, arguments: Any, named: Any, name: str = name) -> None:
                    x = arguments[0] if arguments else named["input"]
                    seen.setdefault(name, []).append(x.detach().double().reshape(-1, x.shape[-1]))

                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return seen

    yield start
    for handle in handles:
        handle.remove()


def hooks_of(model: nn.Module) -> list[dict[int, Any]]:
    return [dict(module._forward_pre_hooks) for module in model.modules()]


def check(statistics: CalibrationStatistics, seen: dict[str, list[Tensor]]) -> None:
    """Every layer that was called: rows, Hessian and moments are those of its own inputs."""
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        exact = x.T @ x
        own = statistics[name]
        assert own.rows == len(x)
        # The library's own float32 product of the same rows is the measure.
        library = (x.float().T @ x.float() - exact).norm() / exact.norm()
        hessian = own.hessian().double()
        assert torch.equal(hessian, hessian.T)
        assert (hessian - exact).norm() / exact.norm() <= 2 * library + EPSILON
        assert own.moments.count == len(x)
        # Each channel's mean is a sum of float32 terms no larger than its largest value, kept in float32.
        bound = 8 * EPSILON * x.abs().amax(0)
        assert ((own.moments.mean - x.mean(0)).abs() <= bound).all()
        torch.testing.assert_close(own.moments.m2.double(), ((x - x.mean(0)) ** 2).sum(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("share_inputs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(record: Any, dtype: torch.dtype, share_inputs: bool) -> None:
    torch.manual_seed(0)
    model = Block(dtype=dtype)
    seen = record(model)
    before = hooks_of(model)
    with CalibrationStatistics(model, moments=True, share_inputs=share_inputs) as statistics:
        for shape in ((2, 7, 24), (5, 24), (1, 1, 24), (0, 24)):
            model(3 + torch.randn(shape, dtype=dtype))
    assert hooks_of(model) == before
    check(statistics, seen)
    assert statistics["q"].shared_with == ({"k", "v"} if share_inputs else set())
    assert (statistics["q"].hessian() is statistics["v"].hessian()) == share_inputs
    assert statistics["down"].shared_with == set()


def test_sharing_multiplies_once(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune.ops import Hessian

    updates = 0
    update = Hessian.update

    def counted(self: Hessian, x: Tensor) -> None:
        nonlocal updates
        updates += 1
        update(self, x)

    monkeypatch.setattr(Hessian, "update", counted)
    for share_inputs, expected in ((False, 4 * 3), (True, 2 * 3)):
        updates = 0
        with CalibrationStatistics(block, share_inputs=share_inputs):
            for _ in range(3):
                block(torch.randn(4, 24))
        assert updates == expected


@pytest.mark.parametrize("forward", [0, 1, 2])
def test_layers_that_stop_to_share(block: Block, record: Any, forward: int, caplog: pytest.LogCaptureFixture) -> None:
    """From the first forward on k's inputs differ, or later once: each layer has its own, and q and v still share."""
    seen = record(block)
    with CalibrationStatistics(block, moments=True, share_inputs=True) as statistics:
        for number in range(4):
            block(torch.randn(6, 24), apart=torch.randn(6, 24) if number == forward else None)
    check(statistics, seen)
    assert ("share" in caplog.text) == (forward > 0)
    # k never joins where it began apart; where it left, q had read what k did not, and v comes after k.
    assert statistics["k"].shared_with == set()
    assert statistics["q"].shared_with == ({"v"} if forward == 0 else set())


def test_equal_values_are_not_the_same_tensor(block: Block, record: Any) -> None:
    seen = record(block)
    x = torch.randn(5, 24)
    with CalibrationStatistics(block, moments=True, share_inputs=True) as statistics:
        block(x, apart=x.clone())
    check(statistics, seen)
    assert statistics["q"].shared_with == {"v"}


def test_changed_in_place_at_first(block: Block, record: Any) -> None:
    """Before anything is shared, what was read is added at once: the change is not seen, and nothing is joined."""
    seen = record(block)
    with torch.no_grad(), CalibrationStatistics(block, moments=True, share_inputs=True) as statistics:
        block(torch.randn(5, 24), change=True)
    check(statistics, seen)
    assert statistics["q"].shared_with == set()
    assert statistics["k"].shared_with == {"v"}


def test_changed_in_place_while_shared(block: Block, record: Any) -> None:
    """q's input is gone before it was added: its statistics are refused, k's and v's are right."""
    seen = record(block)
    with torch.no_grad(), CalibrationStatistics(block, moments=True, share_inputs=True) as statistics:
        block(torch.randn(5, 24))
        block(torch.randn(5, 24), change=True)
    with pytest.raises(RuntimeError, match=r"q: an input was changed in place.*share_inputs=False"):
        statistics["q"].hessian()
    del seen["q"]
    check(statistics, seen)


def test_a_layer_called_twice(record: Any) -> None:
    """In one forward, on another tensor and on the very same one: both count."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) + self.second(x) + self.first(self.first(x))

    model = Twice()
    seen = record(model)
    with CalibrationStatistics(model, moments=True, share_inputs=True) as statistics:
        for _ in range(3):
            model(torch.randn(4, 8))
    assert [len(inputs) for inputs in seen.values()] == [9, 6]
    check(statistics, seen)


@pytest.mark.parametrize("share_inputs", [False, True])
def test_an_exception_leaves_no_hooks(block: Block, record: Any, share_inputs: bool) -> None:
    """A forward that fails between q and k: q's input counts, k and v have not read it, and all go on from there."""
    failing = False

    def fail(*_: Any) -> None:
        if failing:
            raise KeyboardInterrupt

    block.k.register_forward_pre_hook(fail)
    seen = record(block)
    before = hooks_of(block)
    statistics = CalibrationStatistics(block, moments=True, share_inputs=share_inputs)
    with statistics:
        block(torch.randn(4, 24))
    failing = True
    with pytest.raises(KeyboardInterrupt), statistics:
        block(torch.randn(5, 24))
    assert hooks_of(block) == before
    check(statistics, seen)
    assert (statistics["q"].rows, statistics["k"].rows) == (9, 4)
    failing = False
    with statistics:
        block(torch.randn(6, 24))
    assert hooks_of(block) == before
    check(statistics, seen)
    assert statistics["v"].shared_with == ({"k"} if share_inputs else set())


def test_entering_twice(block: Block) -> None:
    before = hooks_of(block)
    with CalibrationStatistics(block) as statistics:
        with pytest.raises(RuntimeError, match="in place already"):
            statistics.__enter__()
        block(torch.randn(3, 24))
    assert hooks_of(block) == before
    assert statistics["q"].rows == 3


def test_padding(block: Block, record: Any) -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]])
    x = torch.randn(2, 4, 24)
    for share_inputs in (False, True):
        with CalibrationStatistics(block, moments=True, share_inputs=share_inputs) as statistics:
            statistics.keep_rows(mask)
            block(x)
            with pytest.raises(ValueError, match="q: reads 4 rows, and the mask has 8 elements"):
                block(x[0])
            statistics.keep_rows(None)
            block(x[:1])
        kept = torch.cat([x[mask.bool()], x[0]]).double()
        torch.testing.assert_close(statistics["k"].hessian().double(), kept.T @ kept, rtol=1e-5, atol=1e-5)
        assert statistics["k"].rows == statistics["down"].rows == statistics["v"].moments.count == 9


def test_inference_mode(block: Block, record: Any) -> None:
    """Its tensors have no version, so they are not shared; before and after it, sharing goes on."""
    seen = record(block)
    with CalibrationStatistics(block, moments=True, share_inputs=True) as statistics:
        block(torch.randn(3, 24))
        with torch.inference_mode():
            block(torch.randn(3, 24))
        block(torch.randn(3, 24))
    check(statistics, seen)
    assert not any(statistics[name].shared_with for name in "qkv")


def test_inverse_factor(block: Block) -> None:
    with CalibrationStatistics(block, ["q"]) as statistics:
        block(torch.randn(200, 24))
    own = statistics["q"].inverse_factor(0.02)
    expected = inverse_factor(statistics["q"].hessian(), 0.02)
    assert own.damping == 0.02
    assert torch.equal(own.factor, expected.factor)
    h = statistics["q"].hessian().double()
    damped = h + 0.02 * h.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    u = own.factor.double()
    torch.testing.assert_close(u.T @ u @ damped, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-4)


def test_which_layers(block: Block) -> None:
    class Special(nn.Linear):
        pass

    block.idle = Special(8, 8)
    assert list(CalibrationStatistics(block)) == ["q", "k", "v", "down", "idle"]
    assert list(CalibrationStatistics(block, ["down", "q"])) == ["q", "down"]
    assert list(CalibrationStatistics(block, "down")) == ["down"]
    assert list(CalibrationStatistics(block, lambda name, layer: layer.in_features == 8)) == ["down", "idle"]
    with pytest.raises(InputError, match=r"up is no torch\.nn\.Linear of the model; q is one"):
        CalibrationStatistics(block, ["q", "up"])
    with pytest.raises(InputError, match=r"no torch\.nn\.Linear is chosen"):
        CalibrationStatistics(block, [])
    with pytest.raises(ValueError, match="neither"):
        CalibrationStatistics(block, hessian=False)


def test_what_cannot_be_read(block: Block) -> None:
    with CalibrationStatistics(block, hessian=False, moments=True) as moments:
        block(torch.randn(3, 24))
        with pytest.raises(ValueError, match=r"k: reads torch\.float32 \[3, 23\]; it needs 24 channels"):
            block(torch.randn(3, 24), apart=torch.randn(3, 23))
    with CalibrationStatistics(block) as hessians:
        block(torch.randn(3, 24))
    with pytest.raises(ValueError, match="Hessians were not asked for"):
        moments["q"].hessian()
    with pytest.raises(ValueError, match="moments were not asked for"):
        _ = hessians["q"].moments
    assert hessians["idle"].rows == 0
    for read in (hessians["idle"].hessian, hessians["idle"].inverse_factor):
        with pytest.raises(InputError, match="idle: the layer has read no rows"):
            read()
    assert "up" not in hessians
    with pytest.raises(KeyError, match="up is none of the 5 chosen"):
        _ = hessians["up"]


def test_requires_no_gradient(block: Block) -> None:
    """Gradients flow through the layers as without hooks, and not into the statistics."""
    x = torch.randn(4, 24, requires_grad=True)
    with CalibrationStatistics(block, moments=True, share_inputs=True) as statistics:
        block(x).sum().backward()
    assert x.grad is not None
    assert not statistics["q"].hessian().requires_grad
