"""Device bytes of inverting a Hessian and of choosing units by it, and the largest share that is removed."""

from ...allocation.common_size import common_sizes
from ...allocation.residual import deepest_cut
from ...methods import SecondOrderMethod
from ..sizes import Sizes


def deepest(sizes: Sizes[SecondOrderMethod]) -> float:
    """Largest share of an FFN that is removed."""
    method = sizes.method
    share = deepest_cut(method.ratio_within(sizes.shapes, sizes.ratio)) / 10
    if method.uniform:  # layers of several sizes are cut to one
        common = common_sizes(sizes.shapes, sizes.ratio, method.multiple)
        share = max(share, 1 - min(s.channels for s in common) / sizes.shape.intermediate_channels)
    return share


def inverting(sizes: Sizes, sublayer: str) -> int:
    """Bytes of H, its inverse, and the panels of the sweep."""
    d = sizes.width(sublayer)
    return 2 * d * d * 4 + 6 * 256 * d * 4


def choosing(sizes: Sizes, sublayer: str, removed: float) -> int:
    """Bytes of the inverse, WᵀW, the elimination's panels, the factor of the removed, and W in float32 twice."""
    d = sizes.width(sublayer)
    return 2 * d * d * 4 + 20 * 128 * d * 4 + int(removed * d) * d * 4 + 2 * sizes.shape.hidden_size * d * 4


def curve(sizes: Sizes, sublayer: str) -> int:
    """Bytes of an error curve: as `choosing` without factor and new W, but H stays until the curve is long enough."""
    d = sizes.width(sublayer)
    return 3 * d * d * 4 + 20 * 128 * d * 4 + sizes.shape.hidden_size * d * sizes.compute_bytes
