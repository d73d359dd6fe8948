"""The compiled core's panels of an elimination: launches of csrc/include/pyprune/eliminate.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .moments import multiprocessors_of
from .requirements import required_core

if TYPE_CHECKING:
    from .eliminate import EliminationState, Panel


def core_arguments(
    a: Tensor, g: Tensor, selection: EliminationState, first: int, lower: Tensor, products: Tensor
) -> tuple[int, ...]:
    """Prepare the arguments of both launches of the compiled core."""
    state = (selection.a_diagonal, selection.g_diagonal, selection.floor, selection.removed)
    addresses = (a, g, *state, selection.order, selection.errors)
    return (
        len(a),
        *(x.data_ptr() for x in addresses),
        first,
        lower.shape[1],
        lower.data_ptr(),
        lower.stride(0),
        products.data_ptr(),
        products.shape[1] // 2,
    )


def core_panel_cpu() -> Panel:
    """`eliminate_panel_reference` in C++, on PyTorch's number of threads."""
    core = required_core()

    def panel(a: Tensor, g: Tensor, selection: EliminationState, first: int, lower: Tensor, products: Tensor) -> None:
        arguments = core_arguments(a, g, selection, first, lower, products)
        core.eliminate_panel_cpu(*arguments, threads=torch.get_num_threads())

    return panel


def core_panel_cuda(a: Tensor) -> tuple[Panel, int]:
    """`eliminate_panel_reference` in CUDA, on `a`'s device, and the removals that it takes at a time."""
    core = required_core()
    multiprocessors = multiprocessors_of(a.device)
    plan = core.eliminate_cuda_plan(len(a), multiprocessors)
    workspace = torch.zeros(plan["workspace_bytes"], dtype=torch.uint8, device=a.device)

    def panel(a: Tensor, g: Tensor, selection: EliminationState, first: int, lower: Tensor, products: Tensor) -> None:
        core.eliminate_panel_cuda(
            *core_arguments(a, g, selection, first, lower, products),
            workspace_ptr=workspace.data_ptr(),
            workspace_bytes=len(workspace),
            multiprocessors=multiprocessors,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    return panel, plan["panel"]
