"""Float64 oracle of the channel moments, and the error that an fp32 kernel may show against it."""

from torch import Tensor

FP32_UNIT = 2.0**-24
TILE_ROWS = 8  # the smallest tile of the kernels: what they centre before they merge


def exact_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred sum of squares over the rows of x [T, C], each float64 [C]."""
    rows = x.double()
    mean = rows.mean(0)
    return mean, (rows - mean).square().sum(0)


def tolerances(x: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """What rounding may cost a mean and an M2 built from T/8 tiles, merged one after another, per channel.

    Every merge rounds the running sums: over K of them errors of either sign grow like sqrt(K) u (Higham
    and Mary 2019, doi 10.1137/18M1226312). A tile's mean is rounded relative to the size of x, not of its
    deviations, which costs M2 u * kappa, kappa^2 = sum(x^2) / M2: the first power, where the textbook
    formula sum(x^2) - T mean^2 costs the second (Chan, Golub and LeVeque 1983). Where M2 vanishes the
    square of that rounding remains. The factor 4 stands for the hidden constants.
    """
    unit = 4 * FP32_UNIT
    merges = -(-x.shape[0] // TILE_ROWS)
    squares = m2 + x.shape[0] * mean.square()
    mean_error = unit * merges**0.5 * (squares / x.shape[0]).sqrt()
    m2_error = unit * (merges**0.5 * m2 + (m2 * squares).sqrt()) + unit**2 * merges * squares
    return mean_error, m2_error


def assert_moments_match(x: Tensor, mean: Tensor, m2: Tensor) -> None:
    """Compare fp32 mean and M2 [C] with the exact ones of all the rows x [T, C] that went into them."""
    exact_mean, exact_m2 = exact_moments(x)
    mean_error, m2_error = tolerances(x, exact_mean, exact_m2)
    for name, got, want, allowed in (
        ("mean", mean, exact_mean, mean_error),
        ("m2", m2, exact_m2, m2_error),
    ):
        assert got.shape == want.shape
        excess = (got.double() - want).abs() - allowed
        worst = int(excess.nan_to_num(nan=float("inf")).argmax())
        assert excess[worst] <= 0, f"{name}[{worst}] is {got[worst]!r}, exactly {want[worst]!r}, ± {allowed[worst]:.1e}"
