"""SparseGPT's walk: the published algorithm in float64 column by column, patterns, the kernel in the interpreter."""

import math

import pytest
import torch
from support.forced_backend import each_device
from support.spd_matrices import hessian
from torch import Tensor

from pyprune.ops import inverse_factor, sparsify_
from pyprune.ops.sparsify import BLOCK, sparsify_reference, walk_reference

PATTERNS = [(2, 4), (4, 8), (1, 4), (3, 6), (0, 0)]
RATIO = 0.4


def problem(channels: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the factor of a damped Hessian's inverse, float64."""
    weight = torch.randn(outputs, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weight, inverse_factor(hessian(channels, 3 * channels, seed).double(), 0.01).factor


def by_inverses(weight: Tensor, h: Tensor, zeros: int, group: int) -> tuple[Tensor, float]:
    """Optimal brain surgeon as it is derived: the inverse of what is left is taken anew at every column.

    Removing w_j of a row whose columns before j are settled costs w_j² / [(H_R)^-1]_jj, R = {j, j+1, ...}, and moves
    the rest by -w_j (H_R)^-1_j: / (H_R)^-1_jj. Scores look at the pivots that the walk will have at each column.
    """
    weight, loss = weight.clone(), 0.0
    channels = weight.shape[1]
    pivots = [float(torch.linalg.inv(h[j:, j:])[0, 0]) for j in range(channels)]
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    for j in range(channels):
        inverse = torch.linalg.inv(h[j:, j:])
        if j % group == 0:
            for row in range(len(weight)):
                scores = [float(weight[row, j + k] ** 2) / pivots[j + k] for k in range(group)]
                for k in sorted(range(group), key=lambda k: scores[k])[:zeros]:
                    chosen[row, j + k] = True
        for row in range(len(weight)):
            if chosen[row, j]:
                loss += float(weight[row, j] ** 2 / inverse[0, 0])
                weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
                weight[row, j] = 0
    return weight, loss


def golden_inputs() -> tuple[Tensor, Tensor]:
    x = [
        [[math.sin(1.3 * (k + 1) * (t + 1) + 0.77 * (c + 1) ** 2) for c in range(8)] for t in range(12)]
        for k in range(2)
    ]
    weight = [[math.cos(0.45 * (o + 1) + 0.83 * (c + 1) + 0.05 * o * c) for c in range(8)] for o in range(4)]
    return torch.tensor(x, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64)


@each_device
def test_the_golden_vector(device: str) -> None:
    """By the authors' formulas in float32, computed apart from this code; their loss is half of ours.

    In float64 it is 1.153537; float32 sums of two orders differ by 3e-5.
    """
    x, weight = (tensor.to(device) for tensor in golden_inputs())
    rows = x.flatten(0, 1)
    losses = sparsify_(weight, inverse_factor(2 / len(x) * rows.T @ rows, 0.01).factor, 2, 4)
    expected = torch.tensor([0, 0, -0.761617, -0.678245, 0, 0, 0.997387, 0.252896], dtype=torch.float64)
    assert (weight[0].cpu() - expected).abs().max() < 1e-6
    assert losses.sum().item() / 2 == pytest.approx(1.153552, abs=3e-5)


@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (1, 3), (4, 8)])
def test_is_optimal_brain_surgeon(zeros: int, group: int) -> None:
    channels = 24
    weight, _ = problem(channels, 5)
    h = hessian(channels, 3 * channels).double()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    expected, loss = by_inverses(weight, h, zeros, group)
    losses = sparsify_(weight, inverse_factor(h, 0.0).factor, zeros, group)
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-10)
    assert losses.sum().item() == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize(("zeros", "group"), PATTERNS)
def test_blocks_change_nothing_but_where_the_ratio_is_met(zeros: int, group: int) -> None:
    """The lazy update is the whole update: columns behind see the same sums."""
    channels = 3 * BLOCK - 24  # 360 is a multiple of every group here; the last block is short
    weight, factor = problem(channels, 7)
    lazy, eager = weight.clone(), weight.clone()
    losses = sparsify_(lazy, factor, zeros, group, RATIO)
    mask = lazy == 0
    errors, expected = walk_reference(eager, factor, mask, 0, 0)
    torch.testing.assert_close(lazy, eager, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(errors != 0, mask)


@pytest.mark.parametrize(("zeros", "group"), PATTERNS[:-1])
def test_every_group_keeps_its_pattern(zeros: int, group: int) -> None:
    weight, factor = problem(360, 9)
    sparsify_(weight, factor, zeros, group)
    assert (weight.unflatten(1, (-1, group)) == 0).sum(-1).unique().tolist() == [zeros]


@pytest.mark.parametrize("parts", [[], [9], [4, 5]])
def test_unstructured_ratio_holds_in_each_part_of_a_block(parts: list[int]) -> None:
    weight, factor = problem(300, 9)
    sparsify_(weight, factor, 0, 0, RATIO, parts)
    for block in weight.split(BLOCK, dim=1):
        for part in block.split(parts or [9]):
            assert (part == 0).sum().item() == int(RATIO * part.numel())


def test_parts_are_what_each_would_be_alone() -> None:
    weight, factor = problem(300, 9)
    together = weight.clone()
    sparsify_(together, factor, 0, 0, RATIO, [4, 5])
    for part, own in zip(weight.split([4, 5]), together.split([4, 5]), strict=True):
        alone = part.clone()
        sparsify_(alone, factor, 0, 0, RATIO)
        torch.testing.assert_close(alone, own, rtol=1e-12, atol=1e-12)


@each_device
@pytest.mark.parametrize(("zeros", "group"), PATTERNS)
@pytest.mark.parametrize(("channels", "outputs"), [(24, 3), (360, 33), (480, 17)])
def test_float32_against_float64(channels: int, outputs: int, zeros: int, group: int, device: str) -> None:
    """Where both choose the same weights. A mask decided by rounding differs, and then everything behind it."""
    weight, factor = problem(channels, outputs, seed=channels)
    exact = weight.clone()
    exact_losses = sparsify_reference(exact, factor, zeros, group, RATIO)
    reference, own = weight.float(), weight.float().to(device)
    sparsify_reference(reference, factor.float(), zeros, group, RATIO)
    losses = sparsify_(own, factor.float().to(device), zeros, group, RATIO)
    own = own.cpu()
    same = ((own == 0) == (exact == 0)).all(1)
    assert same.sum() >= 0.8 * outputs
    scale = weight.abs().max()
    plain = (reference[same] - exact[same]).abs().max()
    assert (own[same] - exact[same]).abs().max() <= 4 * plain + 2.0**-22 * scale
    torch.testing.assert_close(losses.cpu().double()[same], exact_losses[same], rtol=1e-4, atol=0)


@each_device
def test_a_weight_with_strided_rows(device: str) -> None:
    weight, factor = problem(256, 8)
    wide = torch.full((8, 300), torch.nan, dtype=torch.float32)
    wide[:, 20:276] = weight
    wide, alone = wide.to(device), weight.float().to(device)
    view, factor = wide[:, 20:276], factor.float().to(device)
    assert torch.equal(sparsify_(view, factor, 2, 4), sparsify_(alone, factor, 2, 4))
    assert torch.equal(view, alone)
    assert wide[:, :20].isnan().all()
    assert wide[:, 276:].isnan().all()


@each_device
def test_columns_that_lie_apart(device: str) -> None:
    weight, factor = (tensor.float().to(device) for tensor in problem(256, 8))
    across, expected = weight.T.contiguous().T, weight.clone()
    losses = sparsify_(expected, factor, 2, 4)
    assert torch.equal(sparsify_(across, factor.T.contiguous().T, 2, 4), losses)
    assert torch.equal(across, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 8), torch.eye(7), 2, 4), r"weight \[3, 8\] needs torch.float32 \[8, 8\]"),
        ((torch.zeros(3, 8).bfloat16(), torch.eye(8).bfloat16(), 2, 4), "use a float32 or float64 matrix"),
        ((torch.zeros(3, 10), torch.eye(10), 2, 4), "10 columns are not a multiple of the group of 4"),
        ((torch.zeros(3, 8), torch.eye(8), 5, 4), "5 zeros of every 4"),
        ((torch.zeros(3, 8), torch.eye(8), 0, 0, 1.5), "the ratio is 1.5"),
        ((torch.zeros(3, 8), torch.eye(8), 0, 0, 0.5, [1, 1]), r"parts \[1, 1\] are not the 3 rows"),
    ],
)
def test_arguments_that_do_not_fit(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify_(*arguments)


@each_device
def test_opcheck_and_one_graph(device: str) -> None:
    weight, factor = problem(16, 3)
    weight, factor = weight.to(device), factor.to(device)
    torch.library.opcheck(sparsify_, (weight.clone(), factor, 2, 4))
    torch.compiler.reset()
    compiled = torch.compile(lambda w, u: sparsify_(w * 2, u, 2, 4) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, factor), sparsify_(weight * 2, factor, 2, 4) + 1)


def test_no_rows() -> None:
    assert sparsify_(torch.zeros(0, 8), torch.eye(8), 2, 4).shape == (0,)
