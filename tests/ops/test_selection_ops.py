"""Selections of the residual stream: the references, and the kernels in Triton's interpreter and on a GPU.

The tests of this first half run three times: on a CPU with the references, in the interpreter with the kernels
(interpreter.py), and on a GPU with the operators, which choose the kernels.
"""

import pytest
import torch
from support.forced_backend import each_device
from support.interpreter import INTERPRETED, mend, poison_memory, run_interpreted
from torch import Tensor

from pyprune.ops.dispatch import choose_backend
from pyprune.ops.requirements import KERNEL_DTYPES
from pyprune.ops.rms_norm import rms_norm_reference

if INTERPRETED:
    mend()
    from pyprune.triton_kernels.selection import rms_norm_gather_triton as rms_norm_gather
    from pyprune.triton_kernels.selection import scatter_add_rms_norm_gather_triton as scatter_add_rms_norm_gather_
    from pyprune.triton_kernels.selection import scatter_add_triton as scatter_add_
else:
    from pyprune.ops import rms_norm_gather, scatter_add_, scatter_add_rms_norm_gather_

EPS = 1e-5
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES)
# (rows, channels, channels that are added to, channels that are read). A program takes 512 of 1000 channels at a time.
each_shape = pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 5, 4, 2), (7, 64, 64, 1), (13, 96, 33, 96), (3, 1000, 999, 513), (1, 8192, 4096, 4100)]
)


def draw(rows: int, channels: int, device: str, dtype: torch.dtype = torch.float32, whole: bool = False) -> Tensor:
    """Random normal; `whole`: integers up to 64, whose sums every type holds exactly."""
    generator = torch.Generator().manual_seed(rows * 10007 + channels)
    if whole:
        return torch.randint(-64, 65, (rows, channels), generator=generator).to(device, dtype)
    return (3 * torch.randn(rows, channels, generator=generator)).to(device, dtype)


def select(channels: int, count: int, device: str, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(channels + count)
    return torch.randperm(channels, generator=generator)[:count].sort().values.to(device, dtype)


def added(residual: Tensor, update: Tensor, index: Tensor) -> Tensor:
    """The sum, written without the reference."""
    result = residual.clone()
    result[..., index.long()] += update
    return result


def assert_as_good_as_torch(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """err ≤ 2 err_torch + tiny, a few roundings of float32: of the mean, the root, its inverse and two products.

    dtype: that of the residual stream.
    """
    assert found.dtype == plain.dtype
    assert found.shape == plain.shape
    error, of_torch, size = (
        torch.linalg.vector_norm(x) for x in (found.double() - exact, plain.double() - exact, exact)
    )
    bound = 2 * of_torch + 4 * torch.finfo(torch.float32).eps * size
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter truncates what it converts to bfloat16, the sum, the normed row and the product.
        bound = 3 * torch.finfo(torch.bfloat16).eps * size
    assert error <= bound


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


@pytest.mark.usefixtures("poisoned_memory")
@each_device
@each_dtype
@each_shape
def test_rms_norm_gather(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    rows, channels, _, count = shape
    x, weight, index = (
        draw(rows, channels, device, dtype),
        draw(1, channels, device)[0],
        select(channels, count, device),
    )
    for own in (weight.to(dtype), weight):  # the latter in float32 beside any x
        found = rms_norm_gather(x, own, EPS, index)
        plain = rms_norm_reference(x, own, EPS)[:, index]
        exact = rms_norm_reference(x.double(), own.double(), EPS)[:, index]
        assert_as_good_as_torch(found, plain, exact, dtype)
        assert found.is_contiguous()


@pytest.mark.usefixtures("poisoned_memory")
@each_device
@each_dtype
@each_shape
def test_scatter_add(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    rows, channels, count, _ = shape
    index = select(channels, count, device)
    residual, update = draw(rows, channels, device, dtype), draw(rows + 1, count, device, dtype)[1:]
    found = residual.clone()
    scatter_add_(found, update, index)
    assert_as_good_as_torch(
        found, added(residual, update, index), added(residual.double(), update.double(), index), dtype
    )
    others = torch.ones(channels, dtype=torch.bool, device=device).index_fill(0, index, False)
    assert torch.equal(found[:, others], residual[:, others])
    residual, update = (draw(*x.shape, device, dtype, whole=True) for x in (residual, update))
    found = residual.clone()
    scatter_add_(found, update, index)
    assert torch.equal(found, added(residual, update, index))


@pytest.mark.usefixtures("poisoned_memory")
@each_device
@each_dtype
@each_shape
def test_one_pass_is_both(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """To the bit, three times; one selection is int32, the other int64."""
    rows, channels, update_count, count = shape
    residual, update = draw(rows, channels, device, dtype), draw(rows, update_count, device, dtype)
    weight = draw(1, channels, device, dtype)[0]
    update_index = select(channels, update_count, device, torch.int32)
    index = select(channels, count, device, torch.int64)
    expected_residual = residual.clone()
    scatter_add_(expected_residual, update, update_index)
    expected = rms_norm_gather(expected_residual, weight, EPS, index)
    for _ in range(3):
        found_residual = residual.clone()
        found = scatter_add_rms_norm_gather_(found_residual, update, update_index, weight, EPS, index)
        assert torch.equal(found_residual, expected_residual)
        assert torch.equal(found, expected)
    plain = rms_norm_reference(added(residual, update, update_index), weight, EPS)[:, index]
    exact_residual = added(residual.double(), update.double(), update_index)
    assert_as_good_as_torch(found, plain, rms_norm_reference(exact_residual, weight.double(), EPS)[:, index], dtype)


@each_device
def test_nan_stays_in_its_row(device: str) -> None:
    x, weight, index = draw(5, 40, device), draw(1, 40, device)[0], select(40, 17, device)
    clean = rms_norm_gather(x, weight, EPS, index)
    x[2, 39] = torch.nan
    found = rms_norm_gather(x, weight, EPS, index)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


if not INTERPRETED:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    def case(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """residual, update, update_index, weight, index"""
        residual, update = draw(4, 6, device, dtype), draw(4, 3, device, dtype)
        return residual, update, select(6, 3, device), draw(1, 6, device, dtype)[0], select(6, 2, device)

    @each_device
    def test_any_dimensions_strides(device: str) -> None:
        """Not contiguous, each of them; [2, 7, 40], [40] and no token at all."""
        residual, update = draw(40, 14, device).T.view(2, 7, 40), draw(14, 40, device).view(2, 7, 40)[..., ::2]
        weight, (update_index, index) = draw(1, 80, device)[0, ::2], select(40, 40, device).view(20, 2).T
        assert not any(x.is_contiguous() for x in (residual, update, weight, index))
        whole = added(residual, update, update_index)
        expected = rms_norm_reference(whole, weight, EPS)[..., index]
        torch.testing.assert_close(rms_norm_gather(whole, weight, EPS, index), expected)
        for own in (residual, residual.contiguous()):
            found = own.clone()
            assert found.stride() == own.stride()
            scatter_add_(found, update, update_index)
            assert torch.equal(found, whole)
            found = own.clone()
            selected = scatter_add_rms_norm_gather_(found, update, update_index, weight, EPS, index)
            assert torch.equal(found, whole)
            torch.testing.assert_close(selected, expected)
        found = residual[1, 3].clone()
        selected = scatter_add_rms_norm_gather_(found, update[1, 3], update_index, weight, EPS, index)
        torch.testing.assert_close(selected, expected[1, 3])
        none = scatter_add_rms_norm_gather_(residual[:, :0], update[:, :0], update_index, weight, EPS, index)
        assert none.shape == rms_norm_gather(residual[:, :0], weight, EPS, index).shape == (2, 0, 20)
        scatter_add_(residual[:, :0], update[:, :0], update_index)

    @pytest.mark.slow
    @each_device
    def test_opcheck(device: str) -> None:
        residual, update, update_index, weight, index = case(device)
        torch.library.opcheck(scatter_add_, (residual, update, update_index))
        torch.library.opcheck(scatter_add_rms_norm_gather_, (residual, update, update_index, weight, EPS, index))
        x, weight = residual.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.library.opcheck(rms_norm_gather, (x, weight, EPS, index))

    @each_device
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_as_one_graph(dynamic: bool, device: str) -> None:
        residual, update, update_index, weight, index = case(device)

        def step(residual: Tensor, update: Tensor) -> Tensor:
            narrow = scatter_add_rms_norm_gather_(residual, update * 2, update_index, weight, EPS, index)
            scatter_add_(residual, narrow, index)
            return rms_norm_gather(residual, weight, EPS, update_index) + 1

        own = residual.clone()
        expected = step(own, update)
        found = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)(residual, update)
        assert torch.equal(found, expected)
        assert torch.equal(residual, own)

    @pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
    def test_gradients(index_dtype: torch.dtype) -> None:
        x, weight = (t.double().requires_grad_() for t in (draw(6, 5, "cpu").view(2, 3, 5), draw(1, 5, "cpu")[0]))
        index = select(5, 3, "cpu", index_dtype)
        assert torch.autograd.gradcheck(lambda x, weight: rms_norm_gather(x, weight, EPS, index), (x, weight))

    @each_device
    @each_dtype
    def test_gradients_are_those_of_the_reference(dtype: torch.dtype, device: str) -> None:
        """Compiled too; in 16 bits autograd rounds every step, so that float64 is the measure."""
        x, weight, index = draw(9, 40, device, dtype), draw(1, 40, device, dtype)[0], select(40, 17, device)
        factor = draw(9, 17, device, dtype)

        def gradients(norm, dtype: torch.dtype) -> tuple[Tensor, ...]:
            own = [t.to(dtype).requires_grad_() for t in (x, weight)]
            return torch.autograd.grad((norm(*own, EPS) * factor).sum(), own)

        def selected(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return rms_norm_gather(x, weight, eps, index)

        def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return rms_norm_reference(x, weight, eps)[:, index]

        expected, exact = gradients(plain, dtype), gradients(plain, torch.float64)
        for norm in (selected, torch.compile(selected, fullgraph=True, backend="aot_eager")):
            for found, of_torch, true in zip(gradients(norm, dtype), expected, exact, strict=True):
                assert_as_good_as_torch(found, of_torch, true, dtype)

    def test_refuses() -> None:
        residual, update, added_to, weight, index = case()
        gather, add, both = rms_norm_gather, scatter_add_, scatter_add_rms_norm_gather_
        for operator, arguments, message in (
            (gather, (residual, weight[1:], EPS, index), "needs one of its last size"),
            (gather, (residual.int(), weight, EPS, index), "floating type"),
            (gather, (residual, weight, EPS, index.short()), "needs int32 or int64"),
            (gather, (residual, weight, EPS, index[:0]), "of 1 to all"),
            (gather, (residual, weight, EPS, torch.arange(7)), "of 1 to all"),
            (gather, (residual, weight, EPS, index[None]), "one dimension"),
            (gather, (residual, weight, EPS, index.to("meta")), "the index is on meta"),
            (add, (residual.int(), update, added_to), "needs a floating type"),
            (add, (residual[0, 0], update, added_to), "a dimension of channels"),
            (add, (residual, update, added_to[:2]), "one value each"),
            (add, (residual, update[:3], added_to), "one value each"),
            (add, (residual, update.double(), added_to), "the update torch.float64"),
            (both, (residual, update, added_to, weight[1:], EPS, index), "needs one of its last size"),
            (both, (residual, update, added_to, weight, EPS, index.short()), "needs int32 or int64"),
        ):
            with pytest.raises(ValueError, match=message):
                operator(*arguments)
        assert torch.equal(residual, case()[0]), "it was changed before it was refused"

    @pytest.mark.gpu
    def test_the_kernels_run_on_the_gpu() -> None:
        operators = ("rms_norm_gather", "scatter_add", "scatter_add_rms_norm_gather")
        for dtype in KERNEL_DTYPES:
            x = torch.zeros(1, 8, dtype=dtype, device="cuda")
            assert [choose_backend(operator, x) for operator in operators] == ["triton"] * 3
        for channels in (32768, 40000):  # the kernels' widest row, and what the reference does instead
            residual, update = draw(3, channels, "cuda", torch.bfloat16), draw(3, channels // 2, "cuda", torch.bfloat16)
            index = select(channels, channels // 2, "cuda")
            weight = draw(1, channels, "cuda", torch.bfloat16)[0]
            whole = added(residual, update, index)
            found = scatter_add_rms_norm_gather_(residual, update, index, weight, EPS, index)
            assert torch.equal(residual, whole)
            plain = rms_norm_reference(whole, weight, EPS)[:, index]
            exact = rms_norm_reference(whole.double(), weight.double(), EPS)[:, index]
            assert_as_good_as_torch(found, plain, exact, torch.bfloat16)

    @pytest.mark.gpu
    def test_past_two_to_the_31_elements() -> None:
        rows, channels, count = 2**19 + 1, 4100, 4099
        index = select(channels, count, "cuda")
        weight = draw(1, channels, "cuda", torch.bfloat16)[0]
        residual = torch.zeros(rows, channels, dtype=torch.bfloat16, device="cuda")
        update = torch.zeros(rows, count, dtype=torch.bfloat16, device="cuda")
        residual[-1], update[-1] = draw(1, channels, "cuda")[0], draw(1, count, "cuda")[0]
        last = residual[-1:].clone()
        expected = scatter_add_rms_norm_gather_(last, update[-1:], index, weight, EPS, index)
        found = scatter_add_rms_norm_gather_(residual, update, index, weight, EPS, index)
        assert torch.equal(residual[-1:], last)
        assert torch.equal(found[-1:], expected)
        assert not found[:-1].any()
