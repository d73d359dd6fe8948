"""One small call of every public operator: fixed inputs, everything that it computes, and the same in float64 by a
formula that shares nothing with the operator. What holds of all operators is tested on these."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops

EPS = 1e-5
ROWS, CHANNELS = 11, 8
DAMPING = 0.01
FP32_UNIT = 2.0**-24

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """run(*inputs()) is a tuple of all results, tensors that were changed in place included.

    exact: the same in float64, of inputs in float64. units: how far from it float32 may be, in its roundings of the
    largest element: one for each rounding on the longest way to a result, times the condition number of what is
    inverted. compiles: as one graph. waits: the host does, for the device, so that no CUDA graph can hold it.
    """

    inputs: Callable[[], Tensors]
    run: Callable[..., Tensors]
    exact: Callable[..., Tensors]
    units: float
    compiles: bool = True
    waits: bool = False


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Values between −1 and 1, the same on every machine but for the last bit."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(1.7 * count + 0.1 * count.square() + phase).view(shape).float()


def positive_definite(size: int = CHANNELS) -> Tensor:
    """H, its eigenvalues between 1 and CONDITION: what an autoregression of 0.5 has."""
    place = torch.arange(size)
    return 3 * 0.5 ** (place[:, None] - place).abs().float()


CONDITION = 9


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def added(residual: Tensor, update: Tensor, index: Tensor) -> Tensor:
    """residual + update · S, S the rows `index` of the identity."""
    return residual + update @ torch.eye(residual.shape[-1], dtype=residual.dtype)[index.long()]


def exact_moments(*parts: Tensor) -> Tensors:
    rows = torch.cat([part.flatten(0, -2) for part in parts])
    return rows.mean(0), rows.var(0, correction=0) * len(rows)


def damped(h: Tensor) -> Tensor:
    return h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def upper_factor(h: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def unit_errors(a: Tensor, g: Tensor, width: int) -> Tensor:
    """tr(A_SS⁻¹ G_SS) of every unit S."""
    units = [slice(first, first + width) for first in range(0, len(a), width)]
    return torch.stack([torch.linalg.solve(a[s, s], g[s, s]).trace() for s in units])


def pivots(a: Tensor, g: Tensor, width: int) -> Tensor:
    """Σ G_jj / L_jj²; L_jj² is the j-th leading minor over the one before."""
    sums = []
    for first in range(0, len(a), width):
        block = a[first : first + width, first : first + width]
        minors = [block.new_ones(()), *(torch.linalg.det(block[:n, :n]) for n in range(1, width + 1))]
        squares = g.diagonal()[first : first + width]
        sums.append(sum(squares[n] * minors[n] / minors[n + 1] for n in range(width)))
    return torch.stack(sums)


def greedy(a: Tensor, g: Tensor, count: int, width: int) -> tuple[list[int], Tensor]:
    """Order and errors: at every step the whole cost of all that would then be gone, from scratch."""
    order: list[int] = []
    totals = [a.new_zeros(())]
    for _ in range(count):
        costs = {}
        for unit in range(len(a) // width):
            if unit not in order:
                gone = torch.cat([torch.arange(u * width, (u + 1) * width) for u in (*order, unit)])
                costs[unit] = torch.linalg.solve(a[gone][:, gone], g[gone][:, gone]).trace()
        order.append(min(costs, key=lambda unit: costs[unit].item()))
        totals.append(costs[order[-1]])
    return order, torch.stack(totals).diff()


def exact_elimination(a: Tensor, g: Tensor, count: int, width: int) -> Tensors:
    """Order, errors, and the kept channels' A after all, the inverse of their block of H."""
    order, errors = greedy(a, g, count, width)
    gone = torch.cat([torch.arange(u * width, (u + 1) * width) for u in order])
    kept = torch.tensor(sorted(set(range(len(a))) - set(gone.tolist())))
    return torch.tensor(order), errors, torch.linalg.inv(torch.linalg.inv(a)[kept][:, kept])


def run_elimination(a: Tensor, g: Tensor, count: int, width: int) -> Tensors:
    before = a.tril() + a.tril(-1).mT
    found = ops.eliminate(a, g, count, width)
    gone = (found.order.unsqueeze(1) * width + torch.arange(width, device=a.device)).flatten()
    after = before - found.factor @ found.factor.mT
    kept = after.new_ones(len(after)).index_fill(0, gone, 0)
    by_kept = torch.argsort(kept, descending=True, stable=True)[: len(after) - count * width]
    return found.order, found.errors, after[by_kept][:, by_kept]


def elimination_inputs() -> Tensors:
    """A = H⁻¹ and G = WᵀW, of the rank of 5 outputs."""
    weight = wave(5, CHANNELS, phase=1.0)
    return torch.linalg.inv(positive_definite().double()).float().contiguous(), (weight.mT @ weight).contiguous()


def exact_walk(weight: Tensor, h: Tensor) -> Tensors:
    """SparseGPT's 2 of 4 by its definition: at every column the inverse of what is left of H is taken anew."""
    weight, losses = weight.clone(), weight.new_zeros(len(weight))
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(len(h))]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    for first in range(0, len(h), 4):
        scores = weight[:, first : first + 4].square() / pivots[first : first + 4]
        gone = torch.zeros_like(weight, dtype=torch.bool)
        gone[:, first : first + 4] = scores.argsort(1).argsort(1) < 2
        for j in range(first, first + 4):
            moved = torch.where(gone[:, j], weight[:, j], 0)
            losses += moved.square() / pivots[j]
            weight[:, j:] -= torch.outer(moved, inverses[j][0] / pivots[j])
            weight[:, j] = torch.where(gone[:, j], 0, weight[:, j])
    return weight, losses


def exact_refit(weight: Tensor, a: Tensor, g: Tensor) -> Tensors:
    """W₀ H_:K H_KK⁻¹ on what the greedy choice of 3 keeps."""
    h = torch.linalg.inv(a)
    kept = sorted(set(range(len(a))) - set(greedy(a, g, 3, 1)[0]))
    return (weight @ h[:, kept] @ torch.linalg.inv(h[kept][:, kept]),)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Each pair of coordinates as a complex number, times e^(i·angle)."""
    first, second = x.chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([product.real, product.imag], dim=-1)


def in_place(operator: Callable[..., object], *changed: int) -> Callable[..., Tensors]:
    """run() of an operator that returns nothing or a tensor, and changes these of its arguments."""

    def run(*inputs: Tensor) -> Tensors:
        result = operator(*inputs)
        return (*([result] if isinstance(result, Tensor) else []), *(inputs[place] for place in changed))

    return run


def streamed_moments(update: Callable[..., None]) -> Callable[..., Tensors]:
    def run(x: Tensor, y: Tensor, mean: Tensor, m2: Tensor) -> Tensors:
        update(x, 0, mean, m2)
        update(y, ROWS, mean, m2)
        return mean, m2

    return run


def merged_moments(x: Tensor, y: Tensor) -> Tensors:
    moments, others = (ops.ChannelMoments.zeros(CHANNELS, x.device) for _ in range(2))
    moments.update(x)
    others.update(y)
    moments.merge(others)
    return moments.mean, moments.m2, moments.variance(), moments.sum_of_squares()


def exact_merged(x: Tensor, y: Tensor) -> Tensors:
    rows = torch.cat([x, y])
    return *exact_moments(x, y), rows.var(0), rows.square().sum(0)


def centred_hessian(x: Tensor) -> Tensors:
    hessian = ops.Hessian.zeros(CHANNELS, x.device, sums=True)
    hessian.update(x)
    return (hessian.finish(centred=True, scale=0.5),)


def updated_hessian(x: Tensor, lower: Tensor, sums: Tensor) -> Tensors:
    ops.hessian_update(x, lower, sums)
    return lower.tril(), sums


def finished_hessian(lower: Tensor, sums: Tensor) -> Tensors:
    ops.hessian_finish(lower, sums, ROWS, 2.0)
    return (lower,)


ANGLES = 3 * wave(1, 3, 2, phase=2.0)
SUMS_OF_ROWS = 4.0 * 2 * ROWS
INVERSES = 10.0 * CHANNELS * CONDITION  # the worst case (Higham 2002, chapter 14)
NORMS = CHANNELS / 2 + 8
INDEX = torch.tensor([0, 3, 4, 7])


def two_parts() -> Tensors:
    return wave(ROWS, CHANNELS), wave(2, 3, CHANNELS, phase=1.0), *torch.zeros(2, CHANNELS)


def normed_inputs() -> Tensors:
    return wave(3, CHANNELS), wave(CHANNELS, phase=1.0), INDEX.clone()


def stream_inputs() -> Tensors:
    return wave(3, CHANNELS), wave(3, 2, phase=1.0), torch.tensor([1, 3]), wave(CHANNELS, phase=2.0), INDEX.clone()


def assert_exact(case: Case, found: Tensors) -> None:
    exact = case.exact(*(x.double() if x.is_floating_point() else x for x in case.inputs()))
    for own, true in zip(found, exact, strict=True):
        assert own.shape == true.shape
        limit = case.units * FP32_UNIT * true.double().abs().max()
        assert (own.cpu().double() - true.double()).abs().max() <= limit


CASES = {
    "ChannelMoments": Case(lambda: (wave(ROWS, CHANNELS), wave(5, CHANNELS, phase=1.0)), merged_moments, exact_merged,
        SUMS_OF_ROWS),
    "Hessian": Case(lambda: (wave(ROWS, CHANNELS),), centred_hessian,
        lambda x: ((x - x.mean(0)).mT @ (x - x.mean(0)) / 2,), SUMS_OF_ROWS),
    "add_split_product": Case(lambda: (wave(4, 5), wave(4, 6, phase=1.0), wave(5, 6, phase=2.0)),
        in_place(lambda total, left, right: ops.add_split_product(total, left, right, -0.5), 0),
        lambda total, left, right: (total - torch.einsum("mk,nk->mn", left, right) / 2,), 32, compiles=False),
    "channel_moments_update": Case(two_parts, streamed_moments(ops.channel_moments_update),
        lambda x, y, *_: exact_moments(x, y), SUMS_OF_ROWS),
    "channel_moments_update_reference": Case(two_parts, streamed_moments(ops.channel_moments_update_reference),
        lambda x, y, *_: exact_moments(x, y), SUMS_OF_ROWS),
    "damped_inverse": Case(lambda: (positive_definite(),), lambda h: (ops.damped_inverse(h, DAMPING).inverse,),
        lambda h: (torch.linalg.inv(damped(h)),), INVERSES, compiles=False, waits=True),
    "eliminate": Case(elimination_inputs, lambda a, g: run_elimination(a, g, 3, 1),
        lambda a, g: exact_elimination(a, g, 3, 1), INVERSES),
    "eliminate, units of 2": Case(elimination_inputs, lambda a, g: run_elimination(a, g, 2, 2),
        lambda a, g: exact_elimination(a, g, 2, 2), INVERSES),
    "grouped_cholesky_errors": Case(elimination_inputs, lambda a, g: (ops.grouped_cholesky_errors(a, g, 4),),
        lambda a, g: (unit_errors(a, g, 4),), INVERSES),
    "grouped_cholesky_errors, diagonal": Case(elimination_inputs,
        lambda a, g: (ops.grouped_cholesky_errors(a, g, 4, True),), lambda a, g: (pivots(a, g, 4),), INVERSES),
    "grouped_cholesky_errors_reference": Case(elimination_inputs,
        lambda a, g: (ops.grouped_cholesky_errors_reference(a, g, 2),), lambda a, g: (unit_errors(a, g, 2),), INVERSES,
        compiles=False),
    "hessian_finish": Case(lambda: (wave(CHANNELS, CHANNELS), wave(CHANNELS, phase=1.0)), finished_hessian,
        lambda lower, sums: (2 * (lower.tril() + lower.tril(-1).mT - torch.outer(sums, sums) / ROWS),), 4),
    "hessian_update": Case(lambda: (wave(ROWS, CHANNELS), torch.ones(CHANNELS, CHANNELS), torch.ones(CHANNELS)),
        updated_hessian, lambda x, lower, sums: ((lower + torch.einsum("ti,tj->ij", x, x)).tril(), sums + x.sum(0)),
        SUMS_OF_ROWS),
    "inverse_factor": Case(lambda: (positive_definite(),), lambda h: (ops.inverse_factor(h, DAMPING).factor,),
        lambda h: (upper_factor(damped(h)),), INVERSES, compiles=False, waits=True),
    "lower_gram": Case(lambda: (wave(5, CHANNELS),), lambda weight: (ops.lower_gram(weight).tril(),),
        lambda weight: (torch.einsum("oi,oj->ij", weight, weight).tril(),), 16),
    "refit": Case(lambda: (wave(5, CHANNELS, phase=1.0), *elimination_inputs()),
        lambda weight, a, g: (ops.refit(weight, ops.eliminate(a, g, 3)),), exact_refit, INVERSES, compiles=False,
        waits=True),
    "rms_norm": Case(normed_inputs, lambda x, weight, _: (ops.rms_norm(x, weight, EPS),),
        lambda x, weight, _: (rms(x, weight),), NORMS),
    "rms_norm_gather": Case(normed_inputs, lambda x, weight, index: (ops.rms_norm_gather(x, weight, EPS, index),),
        lambda x, weight, index: (rms(x, weight)[:, index],), NORMS),
    "rotate_": Case(lambda: (wave(2, 3, 3, 4), ANGLES.cos().repeat(1, 1, 2), ANGLES.sin().repeat(1, 1, 2)),
        in_place(ops.rotate_, 0), lambda x, *_: (turned(x, ANGLES.double()),), 8),
    "scatter_add_": Case(lambda: stream_inputs()[:3], in_place(ops.scatter_add_, 0), lambda *all: (added(*all),), 1),
    "scatter_add_rms_norm_gather_": Case(stream_inputs,
        in_place(lambda x, update, own, weight, index:
            ops.scatter_add_rms_norm_gather_(x, update, own, weight, EPS, index), 0),
        lambda x, update, own, weight, index: (rms(added(x, update, own), weight)[:, index], added(x, update, own)),
        2 * NORMS),
    "sparsify_": Case(lambda: (wave(5, CHANNELS), positive_definite()),
        in_place(lambda weight, h: ops.sparsify_(weight, ops.spd_inverse_factor(h, 0.0)[0], 2, 4), 0),
        lambda weight, h: exact_walk(weight, h)[::-1], INVERSES),
    "spd_inverse": Case(lambda: (positive_definite(),), lambda h: ops.spd_inverse(h, 0.5),
        lambda h: (torch.linalg.inv(h + 0.5 * torch.eye(CHANNELS, dtype=h.dtype)), torch.zeros(())), INVERSES),
    "spd_inverse_factor": Case(lambda: (positive_definite(),), lambda h: ops.spd_inverse_factor(h, 0.5),
        lambda h: (upper_factor(h + 0.5 * torch.eye(CHANNELS, dtype=h.dtype)), torch.zeros(())), INVERSES),
    "swiglu_": Case(lambda: (3 * wave(4, 5), wave(4, 5, phase=1.0)), in_place(ops.swiglu_, 0),
        lambda gate, up: (gated(gate, up),), 16),
}  # fmt: skip
