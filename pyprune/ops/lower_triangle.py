"""Updates of lower triangles by the products of a panel: between the panels of an elimination."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import tf32_products
from .split_tf32 import high_and_low, split_factors, split_panel, subtract_product, triangle_updates

# A lower triangle is updated as this many block columns, none narrower than TRAILING_WIDTH: 54 % of the square,
# in products that are still large.
TRAILING_BLOCKS = 12
TRAILING_WIDTH = 512
TRAILING_STEP = 128  # widths are multiples: tensor cores are fed from addresses that 16 divides


def update_lower_triangle(matrix: Tensor, factors: list[tuple[Tensor, Tensor]], blocks: int = TRAILING_BLOCKS) -> None:
    """matrix [d, d] −= Σ left rightᵀ over the pairs, [d, n] each, whose sum is symmetric: all below its diagonal."""
    for update in lower_updates(matrix, factors, blocks):
        subtract_product(*update)


def lower_updates(
    matrix: Tensor, factors: list[tuple[Tensor, Tensor]], blocks: int = TRAILING_BLOCKS
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The products of update_lower_triangle, each c −= left right, all of them views."""
    width = max(TRAILING_WIDTH, -(-len(matrix) // (blocks * TRAILING_STEP)) * TRAILING_STEP)
    return triangle_updates(matrix, factors, width)


class SplitUpdates:
    """Both updates after a whole panel as split products on tensor cores. The parts keep their place, and so do all
    views of them: the host makes these once."""

    # Places in [Uh Rh Ul Rl], h and l the high and low parts, of the factors of U Rᵀ + R Uᵀ without low times low,
    # the small terms first (`split_panel` says why): Uh·Rlᵀ + Ul·Rhᵀ + Rh·Ulᵀ + Rl·Uhᵀ + Uh·Rhᵀ + Rh·Uhᵀ.
    LEFT, RIGHT = (0, 2, 1, 3, 0, 1), (3, 1, 2, 0, 1, 0)

    def __init__(self, a: Tensor, g: Tensor, size: int) -> None:
        channels = len(a)
        self.lower = a.new_empty(1, channels, 4 * size)
        self.parts = a.new_empty(channels, 4, size)
        self.sides = [a.new_empty(channels, 6, size) for _ in range(2)]
        self.places = [torch.tensor(side, device=a.device) for side in (self.LEFT, self.RIGHT)]
        left, right = (side.flatten(1) for side in self.sides)
        self.updates = lower_updates(a, split_factors(size, self.lower)) + lower_updates(g, [(left, right)])

    def apply(self, lower: Tensor, products: Tensor) -> None:
        """A −= L Lᵀ, G −= U Rᵀ + R Uᵀ; lower: L [d, size]; products: [d, U | R]."""
        split_panel(lower, self.lower)
        high_and_low(products.unflatten(1, (2, -1)), self.parts[:, :2], self.parts[:, 2:])
        for places, side in zip(self.places, self.sides, strict=True):
            torch.index_select(self.parts, 1, places, out=side)
        with tf32_products():
            for update in self.updates:
                subtract_product(*update)
