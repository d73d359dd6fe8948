"""SlimGPT: Algorithm 1 step by step against a float64 transcription that inverts the Hessian again at every step."""

import pytest
import torch
from torch import Tensor

from pyprune.calibration.second_moments import SecondMoments
from pyprune.errors import InputError
from pyprune.methods import make_method, second_order
from pyprune.methods.slimgpt import SlimGpt, dynamic_groups
from pyprune.ops import DampedInverse


def problem(channels: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A damped Hessian of correlated inputs and a weight, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels**0.5
    x = torch.randn(4 * channels, channels, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(channels))
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(channels)
    return hessian, torch.randn(outputs, channels, generator=generator, dtype=torch.float64)


def algorithm_1(hessian: Tensor, weight: Tensor, count: int, width: int, sizes: list[int]) -> tuple[set[int], Tensor]:
    """The paper's loop: invert what is left, choose, compensate, drop. Returns removed units and kept columns."""
    assert sum(sizes) == count
    columns = torch.arange(weight.shape[1])  # those that are left
    weight, removed = weight.clone(), set()
    for size in sizes:
        inverse = torch.linalg.inv(hessian[columns][:, columns])
        errors = []
        for unit in range(len(columns) // width):
            own = slice(unit * width, (unit + 1) * width)
            pivots = torch.linalg.cholesky(inverse[own, own]).diagonal() ** 2
            errors.append(float((weight[:, own] ** 2 / pivots).sum()))
        chosen = sorted(range(len(errors)), key=lambda unit: errors[unit])[:size]
        inside = torch.tensor([unit * width + k for unit in sorted(chosen) for k in range(width)])
        block = torch.linalg.inv(inverse[inside][:, inside])
        weight = weight - weight[:, inside] @ block @ inverse[inside]
        left = torch.ones(len(columns), dtype=torch.bool)
        left[inside] = False
        removed |= {int(columns[i]) // width for i in inside}
        columns, weight = columns[left], weight[:, left]
    return removed, weight


@pytest.mark.parametrize(("width", "count"), [(1, 100), (1, 7), (4, 9), (8, 1)])
def test_removal_follows_algorithm_1(width: int, count: int) -> None:
    hessian, weight = problem(160, 24, seed=width)
    sizes = dynamic_groups(count) if width == 1 else [1] * count
    removed, expected = algorithm_1(hessian, weight, count, width, sizes)
    chosen, refitted = SlimGpt().remove(torch.linalg.inv(hessian).contiguous(), weight.clone(), count, width)
    assert set(chosen.tolist()) == removed
    assert (refitted - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize("width", [1, 2])
def test_what_goes_and_is_singular_is_refused_by_name(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inverse whose blocks are of rank one, as rounding makes them where inputs are nearly the same."""
    inverse, weight = torch.ones(8, 8), torch.ones(3, 8)
    _, refitted = SlimGpt().remove(inverse.clone(), weight.clone(), 3, width)
    assert not refitted.isfinite().any()
    found = DampedInverse(inverse, 0.0, torch.zeros(8, dtype=torch.bool))
    monkeypatch.setattr(second_order, "damped_inverse", lambda *_: found)
    with pytest.raises(InputError, match=r"layers\.3 o_proj: .*raise --damping"):
        SlimGpt().reconstruct(SecondMoments(inverse, 9), weight, 3, width, "layers.3 o_proj")


def test_dynamic_groups_are_the_authors() -> None:
    assert dynamic_groups(2202) == [845, 166, *[64] * 18, 39]
    assert dynamic_groups(5504) == [1024, 992, 240, *[64] * 50, 48]
    assert dynamic_groups(30) == [30]
    assert dynamic_groups(130) == [64, 64, 2]


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="no schedule 'sideways'"):
        make_method("slimgpt", {"schedule": "sideways"})
    with pytest.raises(InputError, match="damping"):
        make_method("slimgpt", {"damping": -1.0})
    with pytest.raises(InputError, match="no option --allocation"):
        make_method("slimgpt", {"allocation": "log"})
