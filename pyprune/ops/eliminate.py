"""Greedy elimination: units removed one by one, each the one whose removal costs least after all earlier ones.

Optimal Brain Surgeon on units (Hassibi & Stork 1993; with batches of columns, SlimGPT, arXiv 2412.18110), chosen
exactly by a pivoted, lazily updated elimination. It starts from A, the inverse of the damped Hessian H of a output
projection's input, and G = WᵀW, W the output projection's weight. Removing unit g (columns g) and refitting the others
costs e_g = tr(A_gg⁻¹ G_gg) and changes

    A ← A − A_:g A_gg⁻¹ A_g:,   W ← W − W_g A_gg⁻¹ A_g:,   so with r = A_:g A_gg⁻¹ and u = G_:g − r G_gg/2
    G ← G − u rᵀ − r uᵀ.

W itself is not needed while choosing: after any removals it equals W₀ − (W₀_S L_S⁻ᵀ) Lᵀ (`refit`), L the columns
A_:g L_g⁻ᵀ of all removed units, A_gg = L_g L_gᵀ. The operator is `pyprune::eliminate`; `eliminate_panel_reference`
and `eliminate_units` say in plain PyTorch what it computes, for single channels and for wider units.

Rounding. A diagonal entry of A that cancellation takes below eps times its first value has no digits left: it
stays there, so its channel keeps a large error and no pivot is ever 0 or negative. A diagonal entry of G below 0
counts as 0. NaN is worse than any error and its unit goes last; the error that is reported is then NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import WIDE, check_apart, check_contiguous, check_kind, check_square
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .eliminate_core import core_panel_cpu, core_panel_cuda
from .grouped_cholesky import grouped_cholesky_errors
from .lower_triangle import SplitUpdates, update_lower_triangle
from .precision import exact_float32, tf32_products
from .requirements import CORE_BUILT, CUDA_CORE, FLOAT32, ON_CPU, ON_NVIDIA_GPU
from .split_tf32 import has_fast_tf32

OPERATOR = "eliminate"

# Removals between two updates of the whole of A and G, on a CPU and for the reference; on CUDA the core says.
# Larger ones save memory traffic, smaller ones keep the panels in the caches: 64 columns of 11008 rows are 2.8 MB.
PANEL = 64
UNIT_BLOCKS = 4  # where every unit is a separate update: 62 % of the square, in few launches
# Channels from which the updates run as split products on tensor cores, where these are fast.
SPLIT_FROM = 4096


@dataclass(frozen=True)
class Elimination:
    """Result of an elimination: removed units, their errors, and the factor that refits the weights.

    order: int64 [count], units in order of removal. errors: [count], e_g at the moment of removal, so that the sum
    of the first n is the error of removing n units. factor: [d, count·width] L with A after = A − L Lᵀ, columns in
    order of removal, its rows of removed units lower triangular; [d, 0] if it was not kept. width: channels a unit.
    """

    order: Tensor
    errors: Tensor
    factor: Tensor
    width: int

    def removed_channels(self) -> Tensor:
        """int64 [count·width], ascending."""
        return channels_of(self.order, self.width).sort().values

    def kept_channels(self) -> Tensor:
        """int64 [d − count·width], ascending. The host waits for the device."""
        kept = torch.ones(len(self.factor), dtype=torch.bool, device=self.order.device)
        kept[channels_of(self.order, self.width)] = False
        return kept.nonzero().flatten()


def channels_of(units: Tensor, width: int) -> Tensor:
    """The channels of units [n], int64 [n·width], in the order of the units."""
    return (units.unsqueeze(-1) * width + torch.arange(width, device=units.device)).flatten()


def eliminate(
    a: Tensor, g: Tensor, count: int, width: int = 1, keep_factor: bool = True, tf32: bool = False
) -> Elimination:
    """Remove `count` of the d / width units, each time the one whose removal then costs least; ties: the lowest.

    a: [d, d], inverse of the damped Hessian; g: [d, d], WᵀW; float32, or float64 (by the reference only),
    contiguous. Both are consumed: only their lower triangles are read, and changed in place. With `keep_factor`
    False the factor is left out and nothing can be refitted. `tf32`: for single channels, from SPLIT_FROM on and where
    TF32 is fast, A and G are brought up in one TF32 product each, a third of the work: good enough for error curves
    (twelve trained layers of 1024 channels, operands truncated, up to 60 % removed: within 1.2e-4 of float32's).
    Nothing waits for a GPU, but for split updates (from SPLIT_FROM on, where TF32 is fast, without `tf32`), which copy
    two tables to it first.
    Raises ValueError for arguments that do not fit each other or leave no unit, InputError as
    choose_backend does.
    """
    order, errors, factor = eliminate_operator(a, g, count, width, keep_factor, tf32)
    return Elimination(order, errors, factor, width)


def refit(weight: Tensor, elimination: Elimination) -> Tensor:
    """The least-squares weights of the kept channels, [out, d] → [out, kept], kept channels in increasing order.

    W' = W₀ − (W₀_S L_S⁻ᵀ) Lᵀ on the kept channels, which equals W₀ H_:K H_KK⁻¹. weight: W₀, of the dtype and on the
    device of the factor; it stays as it is. The host waits for the device, for which channels are kept.
    Raises ValueError if the weight does not fit the factor or none was kept.
    """
    order, factor = elimination.order, elimination.factor
    if factor.shape[1] != len(order) * elimination.width:
        raise ValueError("refit: the elimination kept no factor; call eliminate with keep_factor=True")
    if weight.dim() != 2 or weight.shape[1] != len(factor):
        raise ValueError(f"refit: the weight is {list(weight.shape)}; the elimination had {len(factor)} channels")
    check_kind("refit", "the weight", weight, WIDE)
    if weight.dtype != factor.dtype or weight.device != factor.device:
        raise ValueError(
            f"refit: the weight is {weight.dtype} on {weight.device}; the factor {factor.dtype} on {factor.device}"
        )
    removed = channels_of(order, elimination.width)  # [n], in order of removal
    kept = elimination.kept_channels()
    with exact_float32():
        coefficients = torch.linalg.solve_triangular(factor[removed].T, weight[:, removed], upper=True, left=False)
        return weight[:, kept].addmm_(coefficients, factor[kept].T, alpha=-1)


@dataclass
class EliminationState:
    """State that the panels of one elimination of single channels pass on, all on its device.

    a_diagonal, g_diagonal: [d], the diagonals after all removals so far. floor: [d], what a_diagonal may not fall
    below. removed: uint8 [d]. order: int64 [count]; errors: [count].
    """

    a_diagonal: Tensor
    g_diagonal: Tensor
    floor: Tensor
    removed: Tensor
    order: Tensor
    errors: Tensor

    @classmethod
    def start(cls, a: Tensor, g: Tensor, count: int) -> EliminationState:
        precision = torch.finfo(a.dtype)
        floor = (a.diagonal().abs() * precision.eps).clamp_(min=precision.tiny)
        return cls(
            torch.maximum(a.diagonal(), floor),
            g.diagonal().clamp(min=0),
            floor,
            torch.zeros(len(a), dtype=torch.uint8, device=a.device),
            torch.empty(count, dtype=torch.int64, device=a.device),
            a.new_empty(count),
        )


# (a, g, selection, first, lower, products) -> None: see eliminate_panel_reference.
Panel = Callable[[Tensor, Tensor, EliminationState, int, Tensor, Tensor], None]


def eliminate_panel_reference(
    a: Tensor, g: Tensor, selection: EliminationState, first: int, lower: Tensor, products: Tensor
) -> None:
    """Removals first … first + n − 1 of an elimination, in plain PyTorch: any device, float32 or float64.

    a, g: [d, d] as they are after the first `first` removals; only lower triangles are read, nothing is written.
    lower: [d, n], any strides, gets the columns ℓ. products: [d, 2·b], b ≥ n, gets u in columns 0 … n − 1 and r in
    columns b … b + n − 1. For the pivot p, with the earlier columns of the panel as L, U, R:

        c = A_:p − L L_pᵀ;  ℓ = c/√c_p;  r = c/c_p;  q = G_:p − U R_pᵀ − R U_pᵀ;  u = q − (q_p/2)·r
        diag(A) ← diag(A) − ℓ²;  diag(G) ← diag(G) − 2 u∘r

    c_p and q_p are the running diagonals. Rows of removed channels are 0 in ℓ, u and r.
    """
    us, rs = products.tensor_split(2, dim=1)  # [d, b], [d, b]
    channels = torch.arange(len(a), device=a.device)
    worst = torch.finfo(a.dtype).max
    for k in range(lower.shape[1]):
        errors = selection.g_diagonal / selection.a_diagonal  # [d]
        ranked = errors.nan_to_num(nan=worst, posinf=worst).masked_fill_(selection.removed.bool(), torch.inf)
        p = ranked.argmin().unsqueeze(0)  # [1]
        pivot, q_pivot = selection.a_diagonal[p], selection.g_diagonal[p]  # [1], [1]
        selection.order[first + k] = p[0]
        selection.errors[first + k] = errors[p][0]
        selection.removed.index_fill_(0, p, 1)  # an assignment would copy the 1 to the device, and wait
        gone = selection.removed.bool()

        c = lower_column(a, p, channels) - lower[:, :k] @ lower[p, :k][0]  # [d]
        q = lower_column(g, p, channels) - us[:, :k] @ rs[p, :k][0] - rs[:, :k] @ us[p, :k][0]
        column = (c / pivot.sqrt()).masked_fill_(gone, 0)
        r = (c / pivot).masked_fill_(gone, 0)
        u = q.masked_fill_(gone, 0) - q_pivot / 2 * r
        column[p] = pivot.sqrt()
        r.index_fill_(0, p, 1)
        u[p] = q_pivot / 2
        lower[:, k], us[:, k], rs[:, k] = column, u, r

        diagonal = torch.maximum(selection.a_diagonal - column.square(), selection.floor)
        selection.a_diagonal.copy_(diagonal)
        selection.g_diagonal.sub_(2 * u * r).clamp_(min=0)


def lower_column(matrix: Tensor, columns: Tensor, channels: Tensor) -> Tensor:
    """Columns of a symmetric matrix [d, d] of which the lower triangle is valid: [d, n], or [d] of one column.

    columns: int64 [n]; channels: 0 … d − 1.
    """
    below = matrix.index_select(1, columns)  # [d, n]
    right = matrix.index_select(0, columns).T  # [d, n]
    column = torch.where(channels.unsqueeze(1) >= columns, below, right)
    return column.squeeze(1) if column.shape[1] == 1 else column


def eliminate_channels(
    a: Tensor, g: Tensor, count: int, keep_factor: bool, tf32: bool, panel: Panel, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator for units of one channel, by panels of `size` removals; between them A and G are brought up."""
    channels = len(a)
    on_tensor_cores = channels >= SPLIT_FROM and has_fast_tf32(a)
    selection = EliminationState.start(a, g, count)
    factor = a.new_empty(channels, count if keep_factor else 0)
    scratch = a.new_empty(channels, 0 if keep_factor else size)
    products = a.new_empty(channels, 2 * size)  # [d, U | R]
    split = SplitUpdates(a, g, size) if on_tensor_cores and not tf32 else None
    for first in range(0, count, size):
        last = min(first + size, count)
        lower = factor[:, first:last] if keep_factor else scratch[:, : last - first]
        panel(a, g, selection, first, lower, products)
        if last == count:
            break
        if split is not None:
            split.apply(lower, products)
            continue
        with tf32_products() if on_tensor_cores else nullcontext():
            update_lower_triangle(a, [(lower, lower)])
            update_lower_triangle(g, [(products, products.roll(size, dims=1))])
    return selection.order, selection.errors, factor


def eliminate_units(a: Tensor, g: Tensor, count: int, width: int, keep_factor: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The operator for units of any width, one unit a step: any device, float32 or float64.

    There are few units and each step is a product of rank `width`, so A and G are brought up after every removal.
    """
    channels = torch.arange(len(a), device=a.device)
    units = len(a) // width
    worst = torch.finfo(a.dtype).max
    order = torch.empty(count, dtype=torch.int64, device=a.device)
    errors = a.new_empty(count)
    factor = a.new_empty(len(a), count * width if keep_factor else 0)
    removed = torch.zeros(units, dtype=torch.bool, device=a.device)
    identity = torch.eye(width, dtype=a.dtype, device=a.device)
    for k in range(count):
        scores = grouped_cholesky_errors(a, g, width)  # [units]
        ranked = scores.nan_to_num(nan=worst, posinf=worst).masked_fill_(removed, torch.inf)
        unit = ranked.argmin().unsqueeze(0)  # [1]
        order[k], errors[k] = unit[0], scores[unit][0]
        removed.index_fill_(0, unit, True)
        gone = removed.repeat_interleave(width, output_size=len(a)).unsqueeze(1)  # [d, 1]

        columns = channels_of(unit, width)  # [w]
        c, q = (lower_column(matrix, columns, channels).reshape(-1, width) for matrix in (a, g))  # [d, w]
        cholesky, failed = torch.linalg.cholesky_ex(c[columns])  # [w, w]
        cholesky = cholesky.masked_fill_((failed > 0).reshape(1, 1), torch.nan)
        inverse = torch.linalg.solve_triangular(cholesky, identity, upper=False)  # two products beat two solves
        column = (c @ inverse.mT).masked_fill_(gone, 0)
        r = column @ inverse
        square = q[columns]  # [w, w]
        u = q.masked_fill_(gone, 0) - r @ square / 2
        # The unit's own rows, free of rounding.
        column[columns] = cholesky
        r[columns] = identity
        u[columns] = square / 2
        if keep_factor:
            factor[:, k * width : (k + 1) * width] = column
        if k + 1 < count:
            update_lower_triangle(a, [(column, column)], UNIT_BLOCKS)
            update_lower_triangle(g, [(torch.cat((u, r), 1), torch.cat((r, u), 1))], UNIT_BLOCKS)
    return order, errors, factor


def check_tensors(a: Tensor, g: Tensor, count: int, width: int) -> None:
    """ValueError unless `count` units of `width` channels can be removed from (a, g)."""
    for name, matrix in (("a", a), ("g", g)):
        check_kind(OPERATOR, name, matrix, WIDE)
    check_square(OPERATOR, "a", a)
    if g.dtype != a.dtype or g.shape != a.shape or g.device != a.device:
        raise ValueError(
            f"eliminate: g is {g.dtype} {list(g.shape)} on {g.device}; a is {a.dtype} {list(a.shape)} on {a.device}"
        )
    for name, matrix in (("a", a), ("g", g)):
        hint = f" (a matrix stored by columns, of which both triangles are valid, can be given as {name}.T)"
        check_contiguous(OPERATOR, name, matrix, hint)
    if width < 1 or a.shape[0] % width != 0:
        raise ValueError(f"eliminate: {a.shape[0]} channels are not units of {width} channels")
    if not 0 <= count < max(a.shape[0] // width, 1):
        raise ValueError(f"eliminate: cannot remove {count} of {a.shape[0] // width} units; one has to stay")


@torch.library.custom_op(
    "pyprune::eliminate",
    mutates_args=("a", "g"),
    schema="(Tensor(a!) a, Tensor(b!) g, SymInt count, SymInt width, bool keep_factor, bool tf32=False) -> "
    "(Tensor, Tensor, Tensor)",
)
def eliminate_operator(
    a: Tensor, g: Tensor, count: int, width: int, keep_factor: bool, tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`eliminate` as an operator: order, errors, factor. Single channels go to the backend that is chosen for them;

    wider units, of which there are few, through library products and the operator grouped_cholesky_errors.
    """
    check_tensors(a, g, count, width)
    check_apart(OPERATOR, {"a": a, "g": g}, {})
    with exact_float32():
        if width > 1:
            return eliminate_units(a, g, count, width, keep_factor)
        return choose_launch(ELIMINATE, a)(a, g, count, keep_factor, tf32)


@eliminate_operator.register_fake
def _(
    a: Tensor, g: Tensor, count: int, width: int, keep_factor: bool, tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors(a, g, count, width)
    factor = a.new_empty(a.shape[0], count * width if keep_factor else 0)
    return a.new_empty(count, dtype=torch.int64), a.new_empty(count), factor


def launch_reference(a: Tensor, g: Tensor, count: int, keep_factor: bool, tf32: bool) -> tuple[Tensor, Tensor, Tensor]:
    return eliminate_channels(a, g, count, keep_factor, tf32, eliminate_panel_reference, PANEL)


def launch_cpu(a: Tensor, g: Tensor, count: int, keep_factor: bool, tf32: bool) -> tuple[Tensor, Tensor, Tensor]:
    return eliminate_channels(a, g, count, keep_factor, tf32, core_panel_cpu(), PANEL)


def launch_cuda(a: Tensor, g: Tensor, count: int, keep_factor: bool, tf32: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device(a.device):
        panel, size = core_panel_cuda(a)
        return eliminate_channels(a, g, count, keep_factor, tf32, panel, size)


# Shape: [channels, channels]
ELIMINATE = Operator(
    OPERATOR,
    versions={"Elimination": 1, "eliminate": 1, "refit": 1},
    kernels={
        "cuda": Kernel(launch_cuda, (ON_NVIDIA_GPU, FLOAT32, *CUDA_CORE)),
        "cpu": Kernel(launch_cpu, (ON_CPU, FLOAT32, CORE_BUILT)),
        "reference": Kernel(launch_reference),
    },
)
