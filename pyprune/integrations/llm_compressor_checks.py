"""Check that llm-compressor's functions compute what their replacements assume, on a few channels."""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor, nn

from .cholesky_shim import FactorisingTorch
from .patching import Calls, check_agreement, refusal, with_names


def example(*shape: int) -> Tensor:
    """Random normal float32 on the CPU, the same ones each time; nobody's generator is touched."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_gptq(
    tool: str, make: FunctionType, accumulate: FunctionType, prepare: FunctionType, factorize: FunctionType
) -> None:
    """InputError unless H = 2·Σ x xᵀ over N batch items and the factor has UᵀU = (H + damping)^-1.

    `prepare` is called as it is, after the Hessians have been completed, so there is nothing to compare.
    """
    module, x = nn.utils.skip_init(nn.Linear, 4, 2, device="cpu"), example(3, 5, 4)
    hessian, count = make(module, torch.device("cpu")), torch.zeros(())
    for inputs in (x[:2], x[2]):  # [2, 5, 4] are two samples, [5, 4] is one
        hessian, count = accumulate(inputs, module, hessian, count)
    rows = x.flatten(0, 1)
    check_agreement(tool, "accumulate_hessian", [hessian, count], [2 * rows.T @ rows, torch.tensor(3.0)])

    # One with a dead column, one that is not positive definite.
    sound = rows.T @ rows
    dead = sound.clone()
    dead[0], dead[:, 0] = 0, 0
    hessians, weights, failed = torch.stack([dead, -sound]), torch.ones(2, 2, 4), torch.zeros(2, dtype=torch.bool)
    factors = factorize(weights, hessians, 0.1, failed)
    dead[0, 0] = 1
    damped = dead + 0.1 * dead.diagonal().mean() * torch.eye(4)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    kept = torch.ones(2, 2, 4)
    kept[0, :, 0] = 0
    check_agreement(
        tool,
        "factorize_hessian",
        [factors, weights, failed],
        [torch.stack([expected, torch.eye(4)]), kept, torch.tensor([False, True])],
    )


@torch.no_grad()
def check_sparsegpt(tool: str, make: FunctionType, accumulate: FunctionType, sparsify: FunctionType) -> None:
    """InputError unless H = 2/N·Σ x xᵀ over N batch items, and one chain of factorisations leads to the weights."""
    module, x = nn.utils.skip_init(nn.Linear, 8, 4, device="cpu"), example(3, 9, 8)
    module.weight.copy_(example(4, 8))
    hessian, count = make(module, torch.device("cpu")), 0
    for inputs in (x[:2], x[2]):
        hessian, count = accumulate(inputs, module, hessian, count)
    rows = x.flatten(0, 1)
    mean = 2 / 3 * rows.T @ rows
    check_agreement(tool, "accumulate_hessian", [hessian, torch.tensor(count)], [mean, torch.tensor(3)])

    calls = Calls()
    results = []
    for function in (sparsify, with_names(sparsify, torch=FactorisingTorch(calls))):
        # Sparsity, N and M, block size, damping, whether zeros are kept.
        _, weight = function(module, {module: mean.clone()}, 0.5, 2, 4, 8, 0.01, False)
        results.append(weight)
    if calls.inverse_factors != 1:
        raise refusal(tool, f"sparsify_weight factorises {calls.inverse_factors} Hessians for one layer")
    check_agreement(tool, "sparsify_weight", results[:1], results[1:])
