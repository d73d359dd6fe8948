"""The inverse of a damped Hessian against float64: library path, sweep, dead channels, raised damping."""

import logging
from collections.abc import Callable

import pytest
import torch
from support.forced_backend import each_device
from support.spd_matrices import FAMILIES, FP32_UNIT, SMALL_BLOCKING, hessian, relative_error, symmetric, with_condition
from support.tf32 import as_tensor_cores, in_float32, truncated
from torch import Tensor

from pyprune.errors import InputError
from pyprune.ops import gauss_jordan as module
from pyprune.ops.gauss_jordan import BLOCKING, Blocking, inverse_
from pyprune.ops.inverse_factor import inverse_factor, spd_inverse_factor
from pyprune.ops.spd_inverse import FIRST_DAMPING, damped_inverse, spd_inverse, spd_inverse_reference
from pyprune.ops.split_tf32 import split_factors, split_panel


@pytest.fixture(params=["library", "sweep"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small matrices on either path: a sweep in blocks of 16 columns, on a GPU with look-ahead."""
    if request.param == "sweep":
        monkeypatch.setattr(module, "SWEPT_FROM", dict.fromkeys(("cpu", "cuda"), 1))
        monkeypatch.setattr(module, "BLOCKING", dict.fromkeys(("cpu", "cuda"), SMALL_BLOCKING))
    return request.param


each_path = pytest.mark.usefixtures("path")


def assert_as_good_as_library(h: Tensor, shift: float, inverse: Tensor) -> None:
    """At most twice the error of the library's chain in the same precision, + one rounding, in the Frobenius norm."""
    exact = torch.linalg.inv(h.double() + shift * torch.eye(len(h), dtype=torch.float64, device=h.device))
    error = relative_error(inverse, exact)
    assert error <= 2 * relative_error(spd_inverse_reference(h, shift)[0], exact) + FP32_UNIT
    assert torch.equal(inverse, inverse.T)


@each_device
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channels", [1, 7, 150])
@each_path
def test_matches_float64(channels: int, family: str, device: str) -> None:
    h = FAMILIES[family](channels).to(device)
    before = h.clone()
    damped = damped_inverse(h, 0.01)
    assert torch.equal(h, before)
    assert damped.damping == 0.01
    assert not damped.dead.any()
    assert_as_good_as_library(h, 0.01 * h.diagonal().double().mean().item(), damped.inverse)


@each_device
@pytest.mark.parametrize("family", ["correlated", "condition 1e5"])
@pytest.mark.parametrize("channels", [513, 1500])
def test_matches_float64_in_the_shipped_blocks(
    channels: int, family: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEPT_FROM", dict.fromkeys(("cpu", "cuda"), 1))
    assert BLOCKING[device].swept < channels
    h = FAMILIES[family](channels).to(device)
    shift = 0.01 * h.diagonal().double().mean().item()
    assert_as_good_as_library(h, shift, damped_inverse(h, 0.01).inverse)


@pytest.mark.gpu
def test_split_products_on_the_gpu() -> None:
    """Beside twice the library's error: what the split drops, 2^-21 of each factor, and what tensor cores cut off."""
    h = FAMILIES["correlated"](module.SPLIT_FROM + 100).cuda()
    shift = 0.01 * h.diagonal().double().mean().item()
    exact = torch.linalg.inv(h.double() + shift * torch.eye(len(h), dtype=torch.float64, device=h.device))
    inverse = damped_inverse(h, 0.01).inverse
    library = relative_error(spd_inverse_reference(h, shift)[0], exact)
    assert relative_error(inverse, exact) <= 2 * library + 2.0**-18
    assert torch.equal(inverse, inverse.T)
    assert torch.equal(inverse, damped_inverse(h, 0.01).inverse)


@each_device
@pytest.mark.parametrize("family", ["correlated", "rank d/8", "condition 1e5"])
@pytest.mark.parametrize(("channels", "blocking"), [(200, Blocking(64, 64)), (383, Blocking(64, 128))])
def test_sweep_in_small_blocks_reads_the_lower_triangle(
    channels: int, blocking: Blocking, family: str, device: str
) -> None:
    h = FAMILIES[family](channels).to(device)
    shift = 0.01 * h.diagonal().mean().item()
    a = h + shift * torch.eye(channels, device=device)
    a[torch.ones_like(a, dtype=torch.bool).triu(1)] = torch.nan
    # Within a diagonal block the products touch the upper triangle, but what stands there is not used.
    assert inverse_(a, blocking).item() == 0
    assert_as_good_as_library(h, shift, a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("channels", "product"), [(600, in_float32), (1000, in_float32), (600, as_tensor_cores)])
def test_split_sweep_with_tf32_emulated(
    channels: int, product: Callable[[Tensor, Tensor, Tensor], None], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncation may cost what a GPU can afford: cuSOLVER's chain has 3 to 4 times the error of a sweep in float32
    (H200, d = 4096 to 28672)."""
    h = FAMILIES[family](channels)
    h.diagonal().add_(0.01 * h.diagonal().mean())
    exact = torch.linalg.inv(h.double())
    library = relative_error(spd_inverse_reference(h, 0.0)[0], exact)
    monkeypatch.setattr(module, "has_fast_tf32", lambda _: True)
    monkeypatch.setattr(module, "SPLIT_FROM", 1)
    monkeypatch.setattr(module, "subtract_product", product)
    blocking = BLOCKING["cuda"]
    assert blocking.split
    assert inverse_(h, blocking).item() == 0
    # A sum that is cut off at every addition loses in proportion to its length. Else twice the library's error, as for
    # every operator: that error itself depends on the processor, whose library sums in an order of its own.
    limit = 3 * blocking.split / 128 if product is as_tensor_cores else 2
    assert relative_error(h, exact) <= limit * library + FP32_UNIT


@each_device
def test_panel_is_split_without_loss(device: str) -> None:
    panel = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).to(device)
    panel *= torch.logspace(-20, 15, 20, device=device)
    panel[3, 4], panel[5, 6] = torch.nan, torch.inf
    buffer = torch.full((3, 50, 32), torch.nan, device=device)
    split_panel(panel, buffer)
    for part, (left, right) in zip(panel.split(8, dim=1), split_factors(20, buffer), strict=True):
        high, low = left.unflatten(1, (3, -1)).unbind(1)[:2]
        for factors, order in ((left, (high, low, high)), (right, (low, high, high))):
            torch.testing.assert_close(factors, torch.cat(order, dim=1), rtol=0, atol=0, equal_nan=True)
        finite = part.isfinite()
        assert torch.equal((high + low)[finite], part[finite])
        assert (high + low)[~finite].isnan().all()
        assert torch.equal(truncated(high[finite], 13), high[finite])
        assert (low.abs() <= part.abs() * 2.0**-11)[finite].all()
    assert buffer[2, :, 16:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("split", [0, 128])
def test_look_ahead_changes_no_bit(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPLIT_FROM", 1)
    h = hessian(3000, 6000).cuda()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    results = []
    for look_ahead in (False, True, True, True):
        a = h.clone()
        assert inverse_(a, Blocking(256, 1024, split, look_ahead)).item() == 0
        results.append(a)
    assert all(torch.equal(result, results[0]) for result in results)


@each_device
@each_path
def test_undamped_float64(device: str) -> None:
    h = with_condition(200, 1e4).double().to(device)
    damped = damped_inverse(h, 0.0)
    assert damped.inverse.dtype == torch.float64
    # ‖A − H^-1‖ ≤ c·d·u·cond·‖H^-1‖ (Higham 2002, §14.4), and the same for the inverse it is compared with.
    assert relative_error(damped.inverse, torch.linalg.inv(h)) <= 200 * 2.0**-53 * 1e4


@each_device
@pytest.mark.parametrize("damping", [0.0, 0.01])
@each_path
def test_dead_channels(damping: float, device: str) -> None:
    """A dead channel is cut off, even where rounding left something beside its zero on the diagonal."""
    channels = 70
    dead = [0, 17, channels - 1]
    h = hessian(channels, 4 * channels)
    live = torch.ones(channels, dtype=torch.bool)
    live[dead] = False
    h[dead] = 0
    h[:, dead] = 0
    h[17, 3] = h[3, 17] = 1e-6
    damped = damped_inverse(h.to(device), damping)
    inverse = damped.inverse.cpu()
    assert torch.equal(damped.dead.cpu(), ~live)
    identity = torch.eye(channels)
    assert torch.equal(inverse[dead], identity[dead])
    assert torch.equal(inverse[:, dead], identity[:, dead])
    kept = h[live][:, live]
    shift = damping * kept.diagonal().double().mean().item()
    exact = torch.linalg.inv(kept.double() + shift * torch.eye(len(kept), dtype=torch.float64))
    reference = spd_inverse_reference(kept, shift)[0]
    error = relative_error(inverse[live][:, live], exact)
    assert error <= 2 * relative_error(reference, exact) + FP32_UNIT


@each_device
def test_all_channels_dead(device: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        damped = damped_inverse(torch.zeros(5, 5, device=device), 0.01, "layers.3 o_proj")
    assert torch.equal(damped.inverse, torch.eye(5, device=device))
    assert damped.dead.all()
    assert "layers.3 o_proj: no channel was ever active" in caplog.text


def indefinite(channels: int, eigenvalue: float) -> Tensor:
    """Mean of the diagonal 1; the least eigenvalue is negative, about `eigenvalue`."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(channels, generator=generator), dim=0)
    h = torch.eye(channels) + (eigenvalue - 1) * torch.outer(direction, direction)
    return symmetric(h / h.diagonal().mean())


@each_device
@each_path
@pytest.mark.parametrize(
    ("eigenvalue", "damping", "needed", "raises"),
    [(-0.05, 0.01, 0.1, 1), (-0.5, 0.01, 1.0, 2), (-0.5, 0.001, 1.0, 3), (-0.05, 0.0, 0.1, 3)],
)
def test_damping_is_raised_until_it_helps(
    eigenvalue: float,
    damping: float,
    needed: float,
    raises: int,
    device: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    h = indefinite(60, eigenvalue).to(device)
    before = h.clone()
    with caplog.at_level(logging.WARNING):
        damped = damped_inverse(h, damping, "layers.7 down_proj")
    assert damped.damping == pytest.approx(needed)
    assert torch.equal(h, before)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == raises
    assert all(message.startswith("layers.7 down_proj: ") for message in messages)
    assert messages[-1].endswith(f"trying {needed:g}")
    damped_h = h.double() + needed * h.diagonal().double().mean() * torch.eye(60, dtype=torch.float64, device=device)
    # One small eigenvalue, so one rounding error decides: the library may be lucky. Normwise, error ≲ u·cond.
    exact = torch.linalg.inv(damped_h)
    assert relative_error(damped.inverse, exact) <= FP32_UNIT * torch.linalg.cond(damped_h).item()


@each_device
@each_path
def test_what_no_damping_helps_names_the_layer(device: str) -> None:
    h = indefinite(60, -50.0).to(device)
    with pytest.raises(InputError, match=r"layers\.7 down_proj: .* not positive definite even with damping 10;"):
        damped_inverse(h, 0.01, "layers.7 down_proj")


@each_device
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(3, 3), (9, 2)])
def test_nonfinite_input_names_the_layer(place: tuple[int, int], value: float, device: str) -> None:
    h = hessian(20, 80)
    h[place] = value
    with pytest.raises(InputError, match=r"layers\.0 o_proj: NaN or Inf"):
        damped_inverse(h.to(device), 0.01, "layers.0 o_proj")


@each_device
@each_path
def test_overflow_is_a_failure(device: str, caplog: pytest.LogCaptureFixture) -> None:
    """The inverse of 1e-39 passes float32's range, though the factorisation goes through."""
    h = torch.diag(torch.tensor([1e-39, 1.0]))
    with caplog.at_level(logging.WARNING):
        damped = damped_inverse(h.to(device), 0.0)
    assert damped.damping > 0
    assert damped.inverse.isfinite().all()


@each_device
def test_info_is_the_failing_block(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    h = torch.eye(300, device=device)
    h[200, 200] = -1
    assert inverse_(h.clone(), Blocking(64, 128)).item() == 200 // 64 + 1
    for swept_from in (1, 400):
        monkeypatch.setattr(module, "SWEPT_FROM", dict.fromkeys(("cpu", "cuda"), swept_from))
        info = spd_inverse(h, 0.0)[1]
        assert info.item() > 0
        assert info.dtype == torch.int32
        assert info.device == h.device
        assert spd_inverse(h, 2.0)[1].item() == 0


def singular(channels: int, place: int, dtype: torch.dtype) -> Tensor:
    """L D Lᵀ, L of ones on two diagonals, D of ones but for a zero. Small integers, so that a pivot is exactly 0."""
    lower = torch.eye(channels, dtype=dtype) + torch.diag(torch.ones(channels - 1, dtype=dtype), -1)
    d = torch.ones(channels, dtype=dtype)
    d[place] = 0
    return lower * d @ lower.T


@each_device
@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "place"), [(2, 1), (20, 1), (20, 15), (20, 16), (70, 35), (70, 69), (8, None)])
def test_a_pivot_of_zero_is_info_and_more_damping(
    channels: int, place: int | None, dtype: torch.dtype, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Singular to the last bit, of ones alone too: every inverse says so, and what is damped is still inverted."""
    h = torch.ones(channels, channels, dtype=dtype) if place is None else singular(channels, place, dtype)
    h = h.to(device)
    assert torch.linalg.eigvalsh(h.double())[0].abs() < 1e-10
    assert spd_inverse(h, 0.0)[1].item() > 0
    assert spd_inverse_factor(h, 0.0)[1].item() > 0
    inverse, factor = damped_inverse(h, 0.0), inverse_factor(h, 0.0)
    assert "the Hessian with damping 0 is not positive definite; trying 0.001" in caplog.text
    for found, damping in ((inverse.inverse, inverse.damping), (factor.factor.mT @ factor.factor, factor.damping)):
        assert damping == FIRST_DAMPING
        shift = damping * h.diagonal().double().mean() * torch.eye(channels, dtype=torch.float64, device=device)
        exact = torch.linalg.inv(h.double() + shift)
        unit = torch.finfo(dtype).eps / 2
        # As for damping that is raised; U is backward stable too, and UᵀU takes d more roundings.
        assert relative_error(found, exact) <= (channels + 1) * unit * torch.linalg.cond(h.double() + shift).item()


@each_device
@each_path
def test_same_bits_three_times(device: str) -> None:
    h = hessian(300, 600).to(device)
    first, second, third = (damped_inverse(h).inverse for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@each_device
@each_path
def test_the_callers_tf32_setting_changes_nothing(device: str) -> None:
    h = hessian(300, 600).to(device)
    expected = damped_inverse(h).inverse
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(damped_inverse(h).inverse, expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
def test_memory_of_one_buffer() -> None:
    h = torch.eye(6000, device="cuda")
    damped_inverse(h)  # the library's own workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    damped_inverse(h)
    # One d² buffer; the panel, split 4 times its size, one for temporaries; the blocks on the diagonal.
    extra = 6 * 6000 * BLOCKING["cuda"].swept + 8 * BLOCKING["cuda"].updated ** 2
    assert torch.cuda.max_memory_allocated() - before <= h.nbytes + 4 * extra


@pytest.mark.parametrize(
    ("h", "damping", "message"),
    [
        (torch.zeros(3, 4), 0.01, r"h is \[3, 4\]"),
        (torch.zeros(3), 0.01, r"h is \[3\]"),
        (torch.zeros(3, 3, dtype=torch.bfloat16), 0.01, "h is torch.bfloat16"),
        (torch.eye(3), -0.1, "damping is -0.1"),
        (torch.eye(3), float("nan"), "damping is nan"),
    ],
)
def test_arguments_that_do_not_fit(h: Tensor, damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        damped_inverse(h, damping)


def test_no_channels() -> None:
    assert damped_inverse(torch.zeros(0, 0)).inverse.shape == (0, 0)


@each_device
@each_path
def test_opcheck(device: str) -> None:
    torch.library.opcheck(spd_inverse, (hessian(50, 100).to(device), 1.0))


@each_device
def test_compiles_as_one_graph(device: str) -> None:
    h = hessian(30, 200).to(device)
    torch.compiler.reset()
    compiled = torch.compile(lambda h: spd_inverse(h * 2, 1.0)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h), spd_inverse(h * 2, 1.0)[0] + 1)


@each_path
def test_reads_strided_rows() -> None:
    wide = torch.full((50, 90), torch.nan)
    h = hessian(50, 200)
    wide[:, 20:70] = h
    assert torch.equal(damped_inverse(wide[:, 20:70]).inverse, damped_inverse(h).inverse)
