"""Greedy elimination on every backend that this machine has, against a dense float64 elimination."""

import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support.forced_backend import each_backend_of, each_device, forced_backend
from support.tf32 import as_tensor_cores, in_float32
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pyprune.errors import InputError
from pyprune.ops import lower_triangle, use_backend
from pyprune.ops.eliminate import Elimination, eliminate, eliminate_operator, exact_float32, refit

OPERATOR = "eliminate"
each_backend = each_backend_of("cpu", "cuda")
forced = partial(forced_backend, OPERATOR)
OUTPUTS = 24


def correlated(channels: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A damped Hessian of correlated channels, of this rank before damping, and a weight: float64, CPU."""
    generator = torch.Generator().manual_seed(channels)
    mixing = torch.randn(rank or channels, channels, dtype=torch.float64, generator=generator)
    x = torch.randn(3 * channels, len(mixing), dtype=torch.float64, generator=generator) @ mixing
    hessian = x.T @ x
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian, torch.randn(OUTPUTS, channels, dtype=torch.float64, generator=generator)


def inverse(hessian: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def poisoned(matrix: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """A copy of the lower triangle, NaN above it."""
    copy = matrix.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    above = torch.ones_like(copy, dtype=torch.bool).triu(1)
    return copy.masked_fill_(above, torch.nan)


def run(
    hessian: Tensor,
    weight: Tensor,
    count: int,
    width: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    keep_factor: bool = True,
    tf32: bool = False,
) -> Elimination:
    a, g = poisoned(inverse(hessian), dtype, device), poisoned(weight.T @ weight, dtype, device)
    return eliminate(a, g, count, width, keep_factor, tf32)


def eliminate_densely(hessian: Tensor, weight: Tensor, count: int, width: int) -> tuple[list[int], list[float], Tensor]:
    """Order, errors and the weight after all, by the definition: A and W as a whole after every removal."""
    a, w = inverse(hessian), weight.clone()
    units = [slice(first, first + width) for first in range(0, len(a), width)]
    order: list[int] = []
    errors = []
    for _ in range(count):
        costs = [
            math.inf if u in order else torch.trace(torch.linalg.solve(a[s, s], w[:, s].T @ w[:, s])).item()
            for u, s in enumerate(units)
        ]
        errors.append(min(costs))
        order.append(costs.index(min(costs)))
        s = units[order[-1]]
        r = torch.linalg.solve(a[s, s], a[s])  # [w, d]
        w = w - w[:, s] @ r
        a = a - a[:, s] @ r
    return order, errors, w


def least_squares(hessian: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """W₀ H_:K H_KK⁻¹."""
    return torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.T).T


def set_error(hessian: Tensor, weight: Tensor, removed: Tensor) -> float:
    """The exact error of removing these channels, tr(W_S A_SS⁻¹ W_Sᵀ)."""
    block = inverse(hessian)[removed][:, removed]
    return torch.trace(weight[:, removed] @ torch.linalg.solve(block, weight[:, removed].T)).item()


PROBLEMS = [(40, 1, 20), (130, 1, 129), (150, 1, 64), (140, 1, 65), (7, 1, 1), (48, 4, 5), (60, 6, 9), (64, 16, 3)]


@each_device
@pytest.mark.parametrize(("channels", "width", "count"), PROBLEMS)
def test_float64_is_the_dense_elimination(channels: int, width: int, count: int, device: str) -> None:
    hessian, weight = correlated(channels)
    elimination = run(hessian, weight, count, width, device=device)
    order, errors, remaining = eliminate_densely(hessian, weight, count, width)
    assert elimination.order.tolist() == order
    torch.testing.assert_close(elimination.errors.cpu(), torch.tensor(errors, dtype=torch.float64), rtol=1e-8, atol=0)

    kept = elimination.kept_channels().cpu()
    refitted = refit(weight.to(device), elimination).cpu()
    scale = remaining.abs().max().item()
    torch.testing.assert_close(refitted, remaining[:, kept], rtol=0, atol=1e-8 * scale)
    torch.testing.assert_close(refitted, least_squares(hessian, weight, kept), rtol=0, atol=1e-8 * scale)

    lost = weight.clone()
    lost[:, kept] -= refitted
    assert torch.trace(lost @ hessian @ lost.T).item() == pytest.approx(elimination.errors.sum().item(), rel=1e-8)


@pytest.mark.parametrize(("channels", "width", "count"), [(100, 1, 80), (60, 6, 9)])
def test_factor_is_what_was_taken_from_the_inverse(channels: int, width: int, count: int) -> None:
    hessian, weight = correlated(channels)
    elimination = run(hessian, weight, count, width)
    factor = elimination.factor
    after = inverse(hessian) - factor @ factor.T
    kept, removed = elimination.kept_channels(), elimination.removed_channels()
    exact = inverse(hessian[kept][:, kept])
    torch.testing.assert_close(after[kept][:, kept], exact, rtol=0, atol=1e-10 * exact.abs().max().item())
    assert after[removed].abs().max() < 1e-10 * exact.abs().max()
    in_order = (elimination.order.unsqueeze(1) * width + torch.arange(width)).flatten()
    assert not factor[in_order].triu(1).any()
    assert (factor[in_order].diagonal() > 0).all()


@each_backend
@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 129, 199])
def test_float32_chooses_as_float64_at_every_panel_boundary(count: int, backend: str, device: str) -> None:
    hessian, weight = correlated(200)
    exact = run(hessian, weight, count)
    with forced(backend, device):
        elimination = run(hessian, weight, count, dtype=torch.float32, device=device)
    assert elimination.order.tolist() == exact.order.tolist()
    # Measured 7e-6 at the most; the errors grow from 1 to 1e4 on the way.
    torch.testing.assert_close(elimination.errors.cpu().double(), exact.errors, rtol=1e-4, atol=0)
    scale = exact.factor.abs().max().item()
    torch.testing.assert_close(elimination.factor.cpu().double(), exact.factor, rtol=0, atol=1e-5 * scale)


def assert_set_as_good(hessian: Tensor, weight: Tensor, elimination: Elimination, exact: Elimination) -> None:
    """The same set as float64's, or one whose exact error is within 0.1 % of it: low rank makes near-ties."""
    removed, best = elimination.removed_channels().cpu(), exact.removed_channels()
    assert len(set(removed.tolist())) == len(best)
    if not torch.equal(removed, best):
        assert set_error(hessian, weight, removed) <= 1.001 * set_error(hessian, weight, best)


@each_backend
@pytest.mark.parametrize("rank", [300, 60, 5], ids="rank {}".format)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_float32_sets_on_hessians_of_low_rank(share: float, rank: int, backend: str, device: str) -> None:
    hessian, weight = correlated(300, rank)
    count = int(share * 300)
    exact = run(hessian, weight, count)
    with forced(backend, device):
        elimination = run(hessian, weight, count, dtype=torch.float32, device=device)
    assert_set_as_good(hessian, weight, elimination, exact)


@each_device
@pytest.mark.parametrize(("channels", "width", "count"), [(96, 4, 12), (96, 48, 1), (192, 16, 11)])
def test_float32_wide_units(channels: int, width: int, count: int, device: str) -> None:
    hessian, weight = correlated(channels)
    exact = run(hessian, weight, count, width)
    elimination = run(hessian, weight, count, width, dtype=torch.float32, device=device)
    assert_set_as_good(hessian, weight, elimination, exact)
    torch.testing.assert_close(elimination.errors.cpu().double(), exact.errors, rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def model_problems(request: pytest.FixtureRequest) -> dict[str, tuple[Tensor, Tensor, int]]:
    """(damped Hessian, weight, head_dim) of output projections of a trained model over 16 × 512 tokens, float64."""
    from transformers import AutoModelForCausalLM

    from pyprune.calibration.source import TokenSource

    shared: Path = request.getfixturevalue("shared_dir")
    folder = shared / "models" / "llama-24m-mha"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = str(shared / "data" / "wikitext2-valid.txt")
    windows = TokenSource(text, folder, model.config, torch.device("cpu"), torch.float32).calibration(16, 512, 0)
    output_projs = {}
    for layer in (0, 5, 11):
        block = model.model.layers[layer]
        output_projs |= {f"{layer} o_proj": block.self_attn.o_proj, f"{layer} down_proj": block.mlp.down_proj}
    hessians = {
        name: torch.zeros(output_proj.in_features, output_proj.in_features, dtype=torch.float64)
        for name, output_proj in output_projs.items()
    }

    def collect(name: str) -> object:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            hessians[name].addmm_(rows.T, rows)

        return hook

    for name, output_proj in output_projs.items():
        output_proj.register_forward_pre_hook(collect(name))
    with torch.inference_mode():
        for window in windows:
            model(window.unsqueeze(0))
    problems = {}
    for name, hessian in hessians.items():
        hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
        weight = output_projs[name].weight.detach().double()
        problems[name] = (hessian, weight, model.config.head_dim)
    return problems


@pytest.mark.slow
@pytest.mark.shared
@each_backend
@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("output_proj", ["down_proj", "o_proj"])
def test_float32_sets_on_a_trained_model(
    output_proj: str, share: float, backend: str, device: str, model_problems: dict[str, tuple[Tensor, Tensor, int]]
) -> None:
    for layer in (0, 11):
        hessian, weight, _ = model_problems[f"{layer} {output_proj}"]
        count = int(share * len(hessian))
        exact = run(hessian, weight, count)
        with forced(backend, device):
            elimination = run(hessian, weight, count, dtype=torch.float32, device=device)
        assert_set_as_good(hessian, weight, elimination, exact)
        refitted = refit(weight.float().to(device), elimination).cpu().double()
        kept = elimination.kept_channels().cpu()
        lost = weight.clone()
        lost[:, kept] -= refitted
        # The refit costs no more than the set has to.
        error = set_error(hessian, weight, elimination.removed_channels().cpu())
        assert torch.trace(lost @ hessian @ lost.T).item() <= 1.0001 * error


@pytest.mark.slow
@pytest.mark.shared
@each_device
def test_float32_heads_of_a_trained_model(device: str, model_problems: dict[str, tuple[Tensor, Tensor, int]]) -> None:
    for layer in (0, 5, 11):
        hessian, weight, head_dim = model_problems[f"{layer} o_proj"]
        count = len(hessian) // head_dim // 2
        exact = run(hessian, weight, count, head_dim)
        elimination = run(hessian, weight, count, head_dim, dtype=torch.float32, device=device)
        assert_set_as_good(hessian, weight, elimination, exact)


@each_backend
@pytest.mark.parametrize(("channels", "count"), [(300, 200), (1000, 130)])
def test_same_bits_three_times(channels: int, count: int, backend: str, device: str) -> None:
    hessian, weight = correlated(channels)
    with forced(backend, device):
        first, *others = (run(hessian, weight, count, dtype=torch.float32, device=device) for _ in range(3))
    for other in others:
        assert torch.equal(first.order, other.order)
        assert torch.equal(first.errors, other.errors)
        assert torch.equal(first.factor, other.factor)


def test_threads_do_not_change_a_panel() -> None:
    channels = 4200  # two threads' worth
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, 8, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            a = torch.eye(channels).addmm_(mixing, mixing.T)
            g = torch.eye(channels).addmm_(mixing, mixing.T, beta=0.5)
            with forced("cpu", "cpu"):
                results.append(eliminate(a, g, 40))
    finally:
        torch.set_num_threads(before)
    one, two = results
    assert torch.equal(one.order, two.order)
    assert torch.equal(one.factor, two.factor)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, weight = correlated(150)
    exact = run(hessian, weight, 70)
    monkeypatch.setenv("PYPRUNE_CPU_ISA", isa)
    with forced("cpu", "cpu"):
        try:
            elimination = run(hessian, weight, 70, dtype=torch.float32)
        except ValueError as error:
            pytest.skip(str(error))
    assert elimination.order.tolist() == exact.order.tolist()


@each_backend
def test_without_the_factor(backend: str, device: str) -> None:
    hessian, weight = correlated(200)
    with forced(backend, device):
        full = run(hessian, weight, 140, dtype=torch.float32, device=device)
        bare = run(hessian, weight, 140, dtype=torch.float32, device=device, keep_factor=False)
    assert torch.equal(full.order, bare.order)
    assert torch.equal(full.errors, bare.errors)
    assert bare.factor.shape == (200, 0)
    assert torch.equal(full.kept_channels(), bare.kept_channels())
    with pytest.raises(ValueError, match="kept no factor"):
        refit(weight.float().to(device), bare)


@each_backend
def test_equal_errors_go_by_index(backend: str, device: str) -> None:
    with forced(backend, device):
        elimination = eliminate(torch.eye(150, device=device), torch.eye(150, device=device), 100)
    assert elimination.order.tolist() == list(range(100))


@each_backend
@pytest.mark.parametrize("matrix", ["a", "g"])
def test_nan_goes_last(matrix: str, backend: str, device: str) -> None:
    hessian, weight = correlated(90)
    matrices = {"a": poisoned(inverse(hessian), torch.float32, device)}
    matrices["g"] = poisoned(weight.T @ weight, torch.float32, device)
    matrices[matrix][5, 5] = torch.nan
    with forced(backend, device):
        elimination = eliminate(matrices["a"], matrices["g"], 89)
    assert sorted(elimination.order.tolist()) == [channel for channel in range(90) if channel != 5]
    assert elimination.errors.isfinite().all()


@each_backend
def test_nan_everywhere_is_reported(backend: str, device: str) -> None:
    a, g = (torch.full((70, 70), torch.nan, device=device) for _ in range(2))
    with forced(backend, device):
        elimination = eliminate(a, g, 66)
    assert len(set(elimination.order.tolist())) == 66
    assert elimination.errors.isnan().all()


@each_backend
def test_cancelled_pivots_do_not_win(backend: str, device: str) -> None:
    """Pairs of equal channels: with one removed, nothing is left in float32 of the other's diagonal entry."""
    hessian, weight = correlated(40)
    twice = torch.arange(40).repeat(2)
    hessian = hessian[twice][:, twice]
    hessian.diagonal().add_(1e-10 * hessian.diagonal().mean())
    weight = torch.cat((weight, weight.roll(1, dims=0)), 1)
    with forced(backend, device):
        elimination = run(hessian, weight, 79, dtype=torch.float32, device=device)
    assert elimination.errors.isfinite().all()
    assert (elimination.errors >= 0).all()
    removed = elimination.order[:40].cpu() % 40
    assert len(set(removed.tolist())) == 40  # one of each pair


@each_backend
def test_dead_channels_go_first(backend: str, device: str) -> None:
    """A channel that never fires has H_jj = 1 and W_:j = 0: it costs nothing."""
    hessian, weight = correlated(100)
    dead = torch.tensor([3, 50, 99])
    hessian[dead] = 0
    hessian[:, dead] = 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    with forced(backend, device):
        elimination = run(hessian, weight, 10, dtype=torch.float32, device=device)
    assert elimination.order[:3].tolist() == dead.tolist()
    assert not elimination.errors[:3].any()


@pytest.mark.parametrize("width", [1, 4])
def test_nothing_to_remove(width: int) -> None:
    hessian, weight = correlated(20)
    elimination = run(hessian, weight, 0, width)
    assert elimination.order.shape == elimination.errors.shape == (0,)
    assert elimination.factor.shape == (20, 0)
    assert torch.equal(refit(weight, elimination), weight)


def test_library_precision_is_put_back() -> None:
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        with exact_float32():
            assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
        assert [setting.fp32_precision for setting in settings] == ["tf32", "tf32"]
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def matrices(size: int = 12, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.eye(size, dtype=dtype, device=device), torch.eye(size, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("a", "g", "count", "width", "message"),
    [
        (*matrices(dtype=torch.float16), 3, 1, "a is torch.float16; use float32 or float64"),
        (torch.zeros(4, 5), torch.zeros(4, 5), 1, 1, r"a is \[4, 5\]"),
        (torch.eye(4), torch.eye(5), 1, 1, r"g is torch.float32 \[5, 5\] on cpu; a is torch.float32 \[4, 4\]"),
        (torch.eye(4), torch.eye(4).double(), 1, 1, "g is torch.float64"),
        (torch.eye(4), torch.eye(4, device="meta"), 1, 1, "on meta"),
        (torch.eye(8)[::2, ::2], torch.eye(4), 1, 1, r"a has strides \[16, 2\]"),
        (torch.eye(4), torch.ones(4, 4).tril().T, 1, 1, r"g has strides \[1, 4\]"),
        (*matrices(), 3, 5, "12 channels are not units of 5 channels"),
        (*matrices(), 3, 0, "12 channels are not units of 0 channels"),
        (*matrices(), 12, 1, "cannot remove 12 of 12 units"),
        (*matrices(), 3, 4, "cannot remove 3 of 3 units"),
        (*matrices(), -1, 1, "cannot remove -1 of 12 units"),
        (*[torch.eye(4)] * 2, 1, 1, "a and g are the same memory"),
    ],
)
def test_arguments_that_do_not_fit(a: Tensor, g: Tensor, count: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eliminate(a, g, count, width)


def test_weights_that_do_not_fit() -> None:
    elimination = eliminate(*matrices(), 3)
    with pytest.raises(ValueError, match=r"the weight is \[5, 11\]; the elimination had 12 channels"):
        refit(torch.zeros(5, 11), elimination)
    with pytest.raises(ValueError, match=r"the weight is torch\.float64"):
        refit(torch.zeros(5, 12, dtype=torch.float64), elimination)


def test_forcing_an_ineligible_backend_reaches_the_caller() -> None:
    with (
        use_backend("cuda"),
        pytest.raises(InputError, match="the input is on cpu"),
    ):
        eliminate(*matrices(), 3)


def test_core_refuses_what_cannot_be() -> None:
    core = pytest.importorskip("pyprune._core")
    address = torch.zeros(16).data_ptr()
    sizes = {"channels": 4, "first": 0, "pivots": 2, "lower_stride": 2, "width": 2, "threads": 1}
    names = ("a", "g", "a_diagonal", "g_diagonal", "floor", "removed", "order", "errors", "lower", "products")
    arguments = sizes | {f"{name}_ptr": address for name in names}
    for changed, message in (
        ({"channels": 0}, "channels must be positive"),
        ({"channels": 2}, "leave no channel"),
        ({"first": -1}, "first must not be negative"),
        ({"width": 1}, "width must be at least pivots"),
        ({"lower_stride": 1}, "lower_stride must be at least pivots"),
        ({"lower_stride": 2**60}, "more memory than can exist"),
        ({"a_ptr": 0}, "a_ptr is null"),
        ({"order_ptr": address + 4}, "order_ptr is not aligned"),
        ({"products_ptr": address + 1}, "products_ptr is not aligned"),
        ({"threads": 0}, "threads must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            core.eliminate_panel_cpu(**(arguments | changed))


def test_schema() -> None:
    schema = (
        "pyprune::eliminate(Tensor(a!) a, Tensor(b!) g, SymInt count, SymInt width, bool keep_factor, "
        "bool tf32=False) -> (Tensor, Tensor, Tensor)"
    )
    assert str(torch.ops.pyprune.eliminate.default._schema) == schema


@each_backend
@pytest.mark.parametrize("keep_factor", [True, False])
def test_opcheck(keep_factor: bool, backend: str, device: str) -> None:
    hessian, weight = correlated(80)
    a, g = (x.to(device, torch.float32).contiguous() for x in (inverse(hessian), weight.T @ weight))
    with forced(backend, device):
        torch.library.opcheck(eliminate_operator, (a, g, 70, 1, keep_factor))
    if backend == "reference":
        torch.library.opcheck(eliminate_operator, (a, g, 7, 8, keep_factor))


@each_backend
def test_compiles_as_one_graph(backend: str, device: str) -> None:
    def step(a: Tensor, g: Tensor, count: int) -> tuple[Tensor, Tensor]:
        elimination = eliminate(a, g, count)
        return elimination.order, elimination.factor * 2

    hessian, weight = correlated(90)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    with forced(backend, device):
        for count in (70, 66, 80):
            a, g = (poisoned(x, torch.float32, device) for x in (inverse(hessian), weight.T @ weight))
            order, doubled = compiled(a, g, count)
            eager = run(hessian, weight, count, dtype=torch.float32, device=device)
            assert torch.equal(order, eager.order)
            assert torch.equal(doubled, eager.factor * 2)
    # Once for the first count, once for any count.
    assert counter.frame_count == 2


@pytest.mark.parametrize("product", [in_float32, as_tensor_cores])
@pytest.mark.parametrize("rank", [300, 40])
def test_split_updates_with_tf32_emulated(
    rank: int, product: Callable[[Tensor, Tensor, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split products choose as well as float32 does, and so they refit; several panels, the last one narrower."""
    module = importlib.import_module("pyprune.ops.eliminate")
    hessian, weight = correlated(300, rank)
    exact = run(hessian, weight, 150)
    monkeypatch.setattr(module, "has_fast_tf32", lambda _: True)
    monkeypatch.setattr(module, "SPLIT_FROM", 1)
    monkeypatch.setattr(lower_triangle, "subtract_product", product)
    elimination = run(hessian, weight, 150, dtype=torch.float32)
    assert_set_as_good(hessian, weight, elimination, exact)
    kept = elimination.kept_channels()
    lost = weight.clone()
    lost[:, kept] -= refit(weight.float(), elimination).double()
    error = set_error(hessian, weight, elimination.removed_channels())
    assert torch.trace(lost @ hessian @ lost.T).item() <= 1.0001 * error


@pytest.mark.parametrize("rank", [300, 40])
def test_curves_in_tf32(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of removing n channels, every n: off by what truncated operands lose, 2^-10 of each product.

    The first 2^-10 is of A and G as they are read; n removals move them by about as much again as they hold.
    """
    module = importlib.import_module("pyprune.ops.eliminate")
    hessian, weight = correlated(300, rank)
    exact = run(hessian, weight, 150).errors.cumsum(0)
    monkeypatch.setattr(module, "has_fast_tf32", lambda _: True)
    monkeypatch.setattr(module, "SPLIT_FROM", 1)
    monkeypatch.setattr(module, "SplitUpdates", None)
    monkeypatch.setattr(lower_triangle, "subtract_product", in_float32)
    found = run(hessian, weight, 150, dtype=torch.float32, keep_factor=False, tf32=True).errors.double().cumsum(0)
    assert ((found - exact).abs() <= 8 * 2.0**-10 * exact).all()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [4100, 11008])
def test_curves_in_tf32_on_tensor_cores(channels: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(channels, channels, device="cuda", generator=generator)
    x *= torch.logspace(0, 2, channels, device="cuda")
    weight = torch.randn(256, channels, device="cuda", generator=generator)
    hessian = (x.T @ x).double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    a, g = inverse(hessian).float().contiguous(), weight.T @ weight
    count = 2 * channels // 5
    with forced("cuda", "cuda"):
        exact, found = (
            eliminate(a.clone(), g.clone(), count, 1, False, tf32).errors.double().cumsum(0) for tf32 in (False, True)
        )
    assert ((found - exact).abs() <= 8 * 2.0**-10 * exact).all()
    assert not torch.equal(found, exact)


def test_block_columns_of_the_trailing_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_triangle, "TRAILING_WIDTH", 1)
    monkeypatch.setattr(lower_triangle, "TRAILING_STEP", 1)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(-9, 9, (33, 33), generator=generator).float()
    left = torch.randint(-9, 9, (33, 4), generator=generator).float()
    expected = matrix - left @ left.T
    above = torch.ones(33, 33).triu(7).bool()  # beyond the widest block column
    before = matrix.clone()
    lower_triangle.update_lower_triangle(matrix, [(left, left)], 5)
    assert torch.equal(matrix.tril(), expected.tril())
    assert torch.equal(matrix[above], before[above])


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [4100, 11008])
def test_every_multiprocessor_takes_part(channels: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(channels // 2, channels, device="cuda", generator=generator)
    weight = torch.randn(256, channels, device="cuda", generator=generator).double()
    hessian = (x.T @ x).double()
    hessian.diagonal().add_(0.05 * hessian.diagonal().mean())
    a, g = inverse(hessian).contiguous(), weight.T @ weight
    with forced("cuda", "cuda"):
        elimination = eliminate(a.float(), g.float(), 300)
    exact = eliminate(a.clone(), g, 300)  # the reference
    error, best = (
        torch.trace(weight[:, s] @ torch.linalg.solve(a[s][:, s], weight[:, s].T)).item()
        for s in (elimination.order, exact.order)
    )
    assert len(elimination.order.unique()) == 300
    assert error <= 1.001 * best


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "width"), [("cuda", 1), ("reference", 1), ("reference", 8)])
def test_the_host_does_not_wait(backend: str, width: int) -> None:
    hessian, weight = correlated(160)
    a, g = (poisoned(x, torch.float32, "cuda") for x in (inverse(hessian), weight.T @ weight))
    with forced(backend, "cuda"):
        eliminate(a.clone(), g.clone(), 15, width)  # libraries set themselves up
        torch.cuda.set_sync_debug_mode("error")
        try:
            eliminate(a, g, 15, width)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    """46400² floats: entries of the last rows lie past 2^31."""
    channels, count = 46_400, 70
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")
    mixing = torch.randn(channels, 4, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    a = (mixing @ mixing.T).fill_diagonal_(0)
    a.diagonal().add_(mixing.square().sum(1) + 1)
    # The cheapest channels are the last ones, then some of the first.
    cost = torch.arange(channels, 0, -1, device="cuda", dtype=torch.float32)
    cost[5:10] = 1.5
    g = torch.diag(cost)
    expected = run_few(mixing.double().cpu(), cost.double().cpu(), count)
    with forced("cuda", "cuda"):
        elimination = eliminate(a, g, count)
    assert elimination.order.tolist() == expected


def run_few(mixing: Tensor, cost: Tensor, count: int) -> list[int]:
    """The greedy order for A = I + M Mᵀ and a diagonal G, by dense updates of the columns that matter."""
    a_diagonal = 1 + mixing.square().sum(1)
    g_diagonal = cost.clone()
    ells: list[Tensor] = []
    us: list[Tensor] = []
    rs: list[Tensor] = []
    order: list[int] = []
    for _ in range(count):
        errors = g_diagonal / a_diagonal
        errors[order] = math.inf
        p = int(errors.argmin())
        unit = torch.zeros_like(cost)
        unit[p] = 1
        c = mixing @ mixing[p] + unit - sum((x * x[p] for x in ells), torch.zeros_like(cost))
        q = unit * cost[p] - sum((u * r[p] + r * u[p] for u, r in zip(us, rs, strict=True)), torch.zeros_like(cost))
        r = c / c[p]
        ells.append(c / c[p].sqrt())
        rs.append(r)
        us.append(q - q[p] / 2 * r)
        a_diagonal = a_diagonal - ells[-1].square()
        g_diagonal = g_diagonal - 2 * us[-1] * r
        order.append(p)
    return order
