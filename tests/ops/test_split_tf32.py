"""Products in TF32 of high and low parts: the parts, and the sum of their products, in float32 on a CPU."""

import pytest
import torch

from pyprune.ops import split_tf32

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("inner", [5, 256, 700])
def test_a_split_product_is_the_product(inner: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64: float32's own error with twice the unit, since three products of parts stand for one."""
    monkeypatch.setattr(split_tf32, "has_fast_tf32", lambda _: True)
    generator = torch.Generator().manual_seed(inner)
    left, right, total = (torch.randn(size, generator=generator) for size in ((37, inner), (53, inner), (37, 53)))
    exact = total.double() - 0.5 * left.double() @ right.double().T
    bound = 0.5 * left.abs().double() @ right.abs().double().T + total.abs()
    result = total.to(device)
    split_tf32.add_split_product(result, left.to(device), right.to(device), -0.5)
    # Every product to 2^-22 of itself, sums of `inner` terms in float32; tensor cores truncate at each step of 8.
    unit = 2.0**-22 + (inner if device == "cpu" else 4 * inner) * 2.0**-24
    assert ((result.cpu().double() - exact).abs() <= unit * bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("out", "channels", "width"), [(5, 33, 8), (300, 70, 64), (700, 129, 256)])
def test_a_split_gram_is_the_gram(out: int, channels: int, width: int, device: str) -> None:
    """Against float64, with the unit of test_a_split_product_is_the_product."""
    weight = torch.randn(out, channels, generator=torch.Generator().manual_seed(out))
    exact = (weight.double().T @ weight.double()).tril()
    bound = (weight.abs().double().T @ weight.abs().double()).tril()
    result = split_tf32.split_gram(weight.to(device), width).cpu().double().tril()
    unit = 2.0**-22 + (out if device == "cpu" else 4 * out) * 2.0**-24
    assert ((result - exact).abs() <= unit * bound).all()


def test_without_fast_tf32_it_is_the_plain_product() -> None:
    left, right, total = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5)
    expected = total.addmm(left, right.T, alpha=0.5)
    split_tf32.add_split_product(total, left, right, 0.5)
    assert torch.equal(total, expected)


def test_high_and_low_parts() -> None:
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    high, low = torch.empty_like(x), torch.empty_like(x)
    split_tf32.high_and_low(x, high, low)
    assert torch.equal(high + low, x)
    assert not (high.view(torch.int32) & 0x1FFF).any()
    assert (low.abs() <= x.abs() * 2.0**-11).all()
