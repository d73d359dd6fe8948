"""The triangular factor of a damped Hessian's inverse against float64: both paths, dead channels, damping."""

import sys
from collections.abc import Callable

import pytest
import torch
from support.forced_backend import each_device
from support.spd_matrices import FAMILIES, FP32_UNIT, SMALL_BLOCKING, hessian, relative_error, with_condition
from support.tf32 import as_tensor_cores, in_float32
from torch import Tensor

from pyprune.errors import InputError
from pyprune.ops import gauss_jordan as sweep
from pyprune.ops import inverse_factor, spd_inverse_factor
from pyprune.ops.gauss_jordan import BLOCKING, Blocking, inverse_factor_
from pyprune.ops.inverse_factor import reverse_, spd_inverse_factor_reference


@pytest.fixture(params=["library", "sweep"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small matrices on either path: a sweep in blocks of 16 columns, on a GPU with look-ahead."""
    if request.param == "sweep":
        monkeypatch.setattr(sweep, "FACTOR_SWEPT_FROM", dict.fromkeys(("cpu", "cuda"), 1))
        monkeypatch.setattr(sweep, "BLOCKING", dict.fromkeys(("cpu", "cuda"), SMALL_BLOCKING))
    return request.param


each_path = pytest.mark.usefixtures("path")


def three_factorisations(h: Tensor) -> Tensor:
    """U as GPTQ and SparseGPT take it."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def damped(h: Tensor, shift: float) -> Tensor:
    return h + shift * torch.eye(len(h), dtype=h.dtype, device=h.device)


def assert_as_good_as_the_chain(h: Tensor, shift: float, factor: Tensor) -> None:
    """At most twice the error of the three factorisations in the same precision, + one rounding (Frobenius norm).

    In a handful of channels one rounding decides, and the library may be lucky: there u·cond, what any backward stable
    factorisation is bound by.
    """
    exact_h = damped(h.double(), shift)
    exact = three_factorisations(exact_h)
    library = relative_error(three_factorisations(damped(h, shift)), exact)
    luck = torch.linalg.cond(exact_h).item() if len(h) < 10 else 1
    assert relative_error(factor, exact) <= 2 * library + FP32_UNIT * luck
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()


@each_device
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channels", [1, 7, 150])
@each_path
def test_matches_float64(channels: int, family: str, device: str) -> None:
    h = FAMILIES[family](channels).to(device)
    before = h.clone()
    result = inverse_factor(h, 0.01)
    assert torch.equal(h, before)
    assert result.damping == 0.01
    assert not result.dead.any()
    assert_as_good_as_the_chain(h, 0.01 * h.diagonal().double().mean().item(), result.factor)
    assert torch.equal(result.factor, inverse_factor(h, 0.01).factor)


@each_device
@pytest.mark.parametrize("family", ["correlated", "condition 1e5"])
@pytest.mark.parametrize("channels", [513, 1500])
def test_matches_float64_in_the_shipped_blocks(
    channels: int, family: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "FACTOR_SWEPT_FROM", dict.fromkeys(("cpu", "cuda"), 1))
    assert BLOCKING[device].swept < channels
    h = FAMILIES[family](channels).to(device)
    assert_as_good_as_the_chain(h, 0.01 * h.diagonal().double().mean().item(), inverse_factor(h, 0.01).factor)


@pytest.mark.gpu
def test_split_products_on_the_gpu() -> None:
    """Beside twice the chain's error: what the split drops, 2^-21 of each factor, and what tensor cores cut off."""
    h = FAMILIES["correlated"](sweep.SPLIT_FROM + 100).cuda()
    shift = 0.01 * h.diagonal().double().mean().item()
    exact = three_factorisations(damped(h.double(), shift))
    library = relative_error(three_factorisations(damped(h, shift)), exact)
    assert relative_error(inverse_factor(h, 0.01).factor, exact) <= 2 * library + 2.0**-18


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("channels", "product"), [(600, in_float32), (600, as_tensor_cores)])
def test_split_sweep_with_tf32_emulated(
    channels: int, product: Callable[[Tensor, Tensor, Tensor], None], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the inverse's: what tensor cores cut off at every addition grows with a panel's width."""
    h = FAMILIES[family](channels)
    h.diagonal().add_(0.01 * h.diagonal().mean())
    exact = three_factorisations(h.double().flip(0, 1)).flip(0, 1)  # L^-1 of h itself
    library = relative_error(three_factorisations(h.flip(0, 1)).flip(0, 1), exact)
    monkeypatch.setattr(sweep, "has_fast_tf32", lambda _: True)
    monkeypatch.setattr(sweep, "SPLIT_FROM", 1)
    monkeypatch.setattr(sweep, "subtract_product", product)
    blocking = BLOCKING["cuda"]
    assert inverse_factor_(h, blocking).item() == 0
    limit = 3 * blocking.split / 128 if product is as_tensor_cores else 2
    assert relative_error(h, exact) <= limit * library + FP32_UNIT


@each_device
@pytest.mark.parametrize(("channels", "blocking"), [(200, Blocking(64, 64)), (383, Blocking(64, 128))])
def test_reads_the_lower_triangle(channels: int, blocking: Blocking, device: str) -> None:
    h = hessian(channels, 2 * channels).to(device)
    a = h.clone()
    a[torch.ones_like(a, dtype=torch.bool).triu(1)] = torch.nan
    assert inverse_factor_(a, blocking).item() == 0
    assert_as_good_as_the_chain(h.flip(0, 1), 0.0, a.flip(0, 1))


@each_device
@each_path
def test_float64(device: str) -> None:
    h = with_condition(200, 1e4).double().to(device)
    factor = inverse_factor(h, 0.0).factor
    assert factor.dtype == torch.float64
    exact = torch.linalg.inv(h)
    # ‖UᵀU − H^-1‖ ≤ c·d·u·cond·‖H^-1‖ (Higham 2002, §14.4), and the same for the inverse it is compared with.
    assert ((factor.T @ factor - exact).norm() / exact.norm()).item() <= 200 * 2.0**-53 * 1e4


@each_device
@each_path
def test_dead_channels(device: str) -> None:
    channels, dead = 70, [0, 17, 69]
    h = hessian(channels, 4 * channels)
    live = torch.ones(channels, dtype=torch.bool)
    live[dead] = False
    h[dead] = 0
    h[:, dead] = 0
    result = inverse_factor(h.to(device), 0.01)
    factor = result.factor.cpu()
    assert torch.equal(result.dead.cpu(), ~live)
    identity = torch.eye(channels)
    assert torch.equal(factor[dead], identity[dead])
    assert torch.equal(factor[:, dead], identity[:, dead])
    kept = h[live][:, live]
    assert_as_good_as_the_chain(kept, 0.01 * kept.diagonal().double().mean().item(), factor[live][:, live])


@each_device
@each_path
def test_what_is_not_positive_definite(device: str, caplog: pytest.LogCaptureFixture) -> None:
    h = torch.eye(60, device=device)
    h[50, 50] = -0.5
    assert spd_inverse_factor(h, 0.0)[1].item() > 0
    assert spd_inverse_factor(h, 1.0)[1].item() == 0
    result = inverse_factor(h, 0.1, "layers.7 down_proj")
    assert result.damping == 1
    assert "layers.7 down_proj: the Hessian with damping 0.1 is not positive definite; trying 1" in caplog.text
    h[50, 50] = -50
    with pytest.raises(InputError, match=r"layers\.7 down_proj: .* not positive definite even with damping"):
        inverse_factor(h, 0.01, "layers.7 down_proj")


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_reversal_in_place(channels: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[reverse_.__module__], "REVERSED_AT_ONCE", chunk)
    a = torch.arange(channels**2, dtype=torch.float32).reshape(channels, channels)
    expected = a.flip(0, 1)
    reverse_(a)
    assert torch.equal(a, expected)


@each_device
def test_the_reference_is_upper_triangular(device: str) -> None:
    factor, info = spd_inverse_factor_reference(hessian(40, 80).to(device), 0.5)
    assert torch.equal(factor, factor.triu())
    assert info.dtype == torch.int32


@pytest.mark.gpu
def test_memory_of_one_buffer() -> None:
    h = torch.eye(6000, device="cuda")
    inverse_factor(h)  # the library's own workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    inverse_factor(h)
    # One d² buffer; the panel, split 4 times its size, one for temporaries; what is reversed at a time, twice.
    extra = 6 * 6000 * BLOCKING["cuda"].swept + 2 * (1 << 24)
    assert torch.cuda.max_memory_allocated() - before <= h.nbytes + 4 * extra


def test_no_channels() -> None:
    assert inverse_factor(torch.zeros(0, 0)).factor.shape == (0, 0)


@each_device
@each_path
def test_opcheck(device: str) -> None:
    torch.library.opcheck(spd_inverse_factor, (hessian(50, 100).to(device), 1.0))
