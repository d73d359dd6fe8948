"""Greedy elimination: whole eliminations in short panels over odd sizes and grids, from NaN-filled memory."""

from collections.abc import Iterator

import pyprune._core as core
import torch
from torch import Tensor

from pyprune.ops.eliminate import EliminationState, eliminate_channels, eliminate_panel_reference
from pyprune.ops.eliminate_core import core_arguments

PANEL = 16  # short, so that a few removals already cross panels


def elimination_is_right(channels: int, count: int, multiprocessors: int, keep_factor: bool) -> bool:
    """Order, errors and factor as the reference's in float64 on the CPU."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2 * channels, channels, dtype=torch.float64, generator=generator)
    weight = torch.randn(16, channels, dtype=torch.float64, generator=generator)
    a, g = torch.linalg.inv(x.T @ x).T.contiguous(), weight.T @ weight
    above = torch.ones(channels, channels, dtype=torch.bool).triu(1)
    on_device = [matrix.float().masked_fill(above, float("nan")).cuda() for matrix in (a, g)]
    plan = core.eliminate_cuda_plan(channels, multiprocessors)
    workspace = torch.zeros(plan["workspace_bytes"], dtype=torch.uint8, device="cuda")

    def panel(a: Tensor, g: Tensor, selection: EliminationState, first: int, lower: Tensor, products: Tensor) -> None:
        lower.fill_(float("nan"))
        products.fill_(float("nan"))
        core.eliminate_panel_cuda(
            *core_arguments(a, g, selection, first, lower, products),
            workspace_ptr=workspace.data_ptr(),
            workspace_bytes=len(workspace),
            multiprocessors=multiprocessors,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    order, errors, factor = eliminate_channels(*on_device, count, keep_factor, False, panel, PANEL)
    exact_order, exact_errors, exact_factor = eliminate_channels(
        a, g, count, True, False, eliminate_panel_reference, PANEL
    )
    right = torch.equal(order.cpu(), exact_order) and torch.allclose(errors.cpu().double(), exact_errors, rtol=1e-3)
    if keep_factor:
        tolerance = 1e-3 * exact_factor.abs().max().item()
        right &= torch.allclose(factor.cpu().double(), exact_factor, rtol=0, atol=tolerance)
    return right


def cases() -> Iterator[tuple[str, bool]]:
    for channels, count in ((2, 1), (33, 32), (130, 17), (257, 40)):
        for multiprocessors in (1, 3, 8):
            case = (channels, count, multiprocessors, channels != 130)
            yield f"eliminate {case}", elimination_is_right(*case)
