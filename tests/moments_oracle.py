"""What the moments of rows are, in float64, and how far float32 may be from them."""

import torch
from torch import Tensor

UNIT = 2.0**-24  # unit roundoff of float32


def exact_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred sum of squares of rows [T, C], two passes in float64. float64 [C]."""
    exact = rows.double()
    mean = exact.mean(0)
    return mean, (exact - mean).square().sum(0)


def assert_within_analysed_bound(rows: Tensor, mean: Tensor, m2: Tensor, merges: int) -> None:
    """The worst case of any order of summation and merging, to first order.

    A value passes at most d = 4·(T + merges) roundings: four a row in Welford's recurrence, the longest way of
    all backends, and four a merge. So a mean is off by at most e = d·u·max|x|. M2 is a sum of positive terms,
    each with d roundings; a mean's error enters through δ² with δ²·w ≤ M2 and, by Cauchy-Schwarz,
    Σ 2·δ·e·w ≤ 2·e·sqrt(T·M2); its square adds T·e².
    """
    exact_mean, exact_m2 = exact_moments(rows)
    depth = 4 * (len(rows) + merges)
    mean_bound = depth * UNIT * rows.double().abs().amax(0)
    m2_bound = depth * UNIT * exact_m2 + 2 * mean_bound * (len(rows) * exact_m2).sqrt() + len(rows) * mean_bound**2
    assert ((mean.double() - exact_mean).abs() <= mean_bound).all()
    assert ((m2.double() - exact_m2).abs() <= m2_bound).all()


def errors(rows: Tensor, mean: Tensor, m2: Tensor) -> tuple[float, float]:
    """Largest |Δmean| / max|x| and largest |ΔM2| / M2 over the channels of rows [T, C]."""
    exact_mean, exact_m2 = exact_moments(rows)
    mean_error = (mean.double() - exact_mean).abs().max() / rows.double().abs().max()
    m2_error = ((m2.double() - exact_m2).abs() / exact_m2).max()
    return mean_error.item(), m2_error.item()


def assert_as_good_as_torch(rows: Tensor, mean: Tensor, m2: Tensor, merges: int = 1) -> None:
    """Error against float64 at most twice that of torch.var_mean on the rows in float32, + tiny.

    tiny: torch can be exact by luck (one row, powers of two), and the last merge alone rounds four times.
    """
    variance, torch_mean = torch.var_mean(rows.float(), dim=0, correction=0)
    allowed = errors(rows, torch_mean, variance * len(rows))
    tiny = 4 * (1 + merges) * UNIT
    for name, error, limit in zip(("mean", "M2"), errors(rows, mean, m2), allowed, strict=True):
        assert error <= 2 * limit + tiny, f"{name}: error {error:.2e}, torch {limit:.2e}"
