"""Device bytes of inverting a Hessian and of choosing units by it, and how far a choice goes."""

from ...allocation.common_size import common_sizes
from ...allocation.residual import deepest_cut
from ...methods import SecondOrderMethod
from ..sizes import Sizes


def deepest(sizes: Sizes[SecondOrderMethod]) -> float:
    """Share of an FFN that goes at most."""
    method = sizes.method
    share = deepest_cut(method.ratio_within(sizes.shapes, sizes.ratio)) / 10
    if method.uniform:  # layers of several sizes are cut to one
        common = common_sizes(sizes.shapes, sizes.ratio, method.round_to)
        share = max(share, 1 - min(s.channels for s in common) / sizes.shape.intermediate_channels)
    return share


def inverting(sizes: Sizes, sublayer: str) -> int:
    """H, its inverse, and the panels of the sweep."""
    d = sizes.width(sublayer)
    return 2 * d * d * 4 + 6 * 256 * d * 4


def choosing(sizes: Sizes, sublayer: str, removed: float) -> int:
    """The inverse, WᵀW, the panels of the elimination, the factor of what goes, and W in float32 before and after."""
    d = sizes.width(sublayer)
    return 2 * d * d * 4 + 20 * 128 * d * 4 + int(removed * d) * d * 4 + 2 * sizes.shape.hidden_size * d * 4


def curve(sizes: Sizes, sublayer: str) -> int:
    """As choosing for an error curve: no factor and no new W, but H is kept until the curve is known to be enough."""
    d = sizes.width(sublayer)
    return 3 * d * d * 4 + 20 * 128 * d * 4 + sizes.shape.hidden_size * d * sizes.compute_bytes
