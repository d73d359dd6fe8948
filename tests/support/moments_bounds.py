"""How far float32 moments of any order of summation may be from the exact ones."""

import torch
from torch import Tensor

from support.moments_oracle import FP32_UNIT, exact_moments


def assert_within_analysed_bound(rows: Tensor, mean: Tensor, m2: Tensor, merges: int) -> None:
    """The worst case of any order of summation and merging, to first order.

    A value passes at most d = 4·(T + merges) roundings: four a row in Welford's recurrence, the longest way
    of all backends, and four a merge. So a mean is off by at most e = d·u·max|x|. M2 is a sum of positive
    terms, each with d roundings; a mean's error enters through δ² with δ²·w ≤ M2 and, by Cauchy-Schwarz,
    Σ 2·δ·e·w ≤ 2·e·sqrt(T·M2); its square adds T·e².
    """
    exact_mean, exact_m2 = exact_moments(rows)
    rounding = 4 * (len(rows) + merges) * FP32_UNIT
    mean_bound = rounding * rows.double().abs().amax(0)
    m2_bound = rounding * exact_m2 + 2 * mean_bound * (len(rows) * exact_m2).sqrt() + len(rows) * mean_bound**2
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

    tiny: on a CPU torch accumulates in float64 and is exact but for one rounding. Float32 moments add the
    four roundings of each merge and, in M2, one rounding of a mean, which weighs the variance's condition
    number κ = sqrt(Σx² / M2) (Chan, Golub & LeVeque 1983). Without centring the error would be u·κ².
    """
    variance, torch_mean = torch.var_mean(rows.float(), dim=0, correction=0)
    torch_errors = errors(rows, torch_mean, variance * len(rows))
    condition = (rows.double().square().sum(0) / exact_moments(rows)[1]).sqrt().max().item()
    tiny = 4 * (1 + merges) * FP32_UNIT
    allowed = (2 * torch_errors[0] + tiny, 2 * torch_errors[1] + tiny + condition * FP32_UNIT)
    for name, error, limit in zip(("mean", "M2"), errors(rows, mean, m2), allowed, strict=True):
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"
