"""llm-compressor's GPTQ and SparseGPT with the Hessian and the factor of its inverse computed here.

What is replaced, each where the modifiers look it up, and nothing else of their algorithms:

- `accumulate_hessian` of both: products alone, one triangle; open_sums.py says when H is complete. GPTQ's H is 2·Σ x xᵀ
  and divided by the number of samples in `prepare_batch`, SparseGPT's is the running mean 2/N·Σ x xᵀ. Samples are
  counted as they count them, batch items and not tokens.
- `factorize_hessian` of GPTQ, by its contract: dead columns (H_jj = 0) get 1 and lose their weights, damping is a share
  of the mean diagonal, and what cannot be factorised becomes the identity and is flagged.
- the three factorisations inside SparseGPT's `sparsify_weight`, which runs with another `torch` among its globals
  (factor_chain.py); dead columns, damping and the fallback to the identity remain its own.

Reductions between processes go over the open sums: they are linear, and the upper triangle is filled afterwards. So
every process of a distributed run has to be in a block, or none.
Layers that are no torch.nn.Linear are left to the tool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.gauss_jordan import uses_gauss_jordan
from .cholesky_shim import FactorisingTorch, checked_factor
from .deferred_hessians import OpenSums
from .llm_compressor_checks import check_gptq, check_sparsegpt
from .patching import Acceleration, Calls, PatchPoint, installed_release, original_functions, patched, with_names

TOOL = "llm-compressor"

# Number of matrices from which llm-compressor factorises all in one batched call: faster for small ones.
BATCHED_FROM = 16


def accelerated() -> Acceleration:
    """`with accelerated() as calls: oneshot(...)`; calls counts what ran here.

    Raises InputError on entering where llm-compressor is missing, its functions are not the tested ones, or it is
    accelerated already. On leaving, also by an exception, llm-compressor has its own functions back.
    """
    return Acceleration(TOOL, kernels_replaced)


def patch_points() -> tuple[list[PatchPoint], list[PatchPoint]]:
    """Name the functions of GPTQ and of SparseGPT that a block replaces."""
    gptq = import_module("llmcompressor.modifiers.gptq.base")
    quantize = import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    sparsegpt = import_module("llmcompressor.modifiers.pruning.sparsegpt.base")
    return [
        PatchPoint(gptq, "make_empty_hessian"),
        PatchPoint(gptq, "accumulate_hessian"),
        PatchPoint(gptq, "prepare_batch"),
        PatchPoint(quantize, "factorize_hessian"),
    ], [
        PatchPoint(sparsegpt, "make_empty_hessian"),
        PatchPoint(sparsegpt, "accumulate_hessian"),
        PatchPoint(sparsegpt, "sparsify_weight"),
        PatchPoint(sparsegpt.SparseGPTModifier, "_maybe_onload_hessian"),
    ]


@contextmanager
def kernels_replaced() -> Iterator[Calls]:
    installed_release(TOOL)
    gptq_points, sparsegpt_points = patch_points()
    calls = Calls()
    sums = OpenSums(calls)
    originals = original_functions(TOOL, gptq_points)
    check_gptq(TOOL, *originals)
    quantising = GptqKernels(sums, calls, *originals)
    originals = original_functions(TOOL, sparsegpt_points)
    check_sparsegpt(TOOL, *originals[:3])
    pruning = SparseGptKernels(sums, calls, *originals)
    with patched(gptq_points + sparsegpt_points, quantising.replacements() + pruning.replacements()):
        try:
            yield calls
        finally:
            sums.complete_all()


def sample_count(x: Tensor) -> int:
    """Calibration samples in the input of a layer: rows [T, d] are one sample."""
    return 1 if x.dim() == 2 else len(x)


class Kernels:
    """Common part of both algorithms: H starts as an open sum where it is a Linear's."""

    def __init__(self, sums: OpenSums, calls: Calls, make: FunctionType, accumulate: FunctionType) -> None:
        self._sums, self._calls, self._make, self._accumulate = sums, calls, make, accumulate

    def make_empty_hessian(self, module: nn.Module, device: torch.device | None = None) -> Tensor:
        hessian: Tensor = self._make(module, device)
        if isinstance(module, nn.Linear):
            self._sums.open(hessian)
        return hessian


class GptqKernels(Kernels):
    """The replacements for GPTQ, from the originals."""

    def __init__(
        self,
        sums: OpenSums,
        calls: Calls,
        make: FunctionType,
        accumulate: FunctionType,
        prepare: FunctionType,
        factorize: FunctionType,
    ) -> None:
        super().__init__(sums, calls, make, accumulate)
        self._prepare, self._factorize = prepare, factorize

    def replacements(self) -> list[Any]:
        return [self.make_empty_hessian, self.accumulate_hessian, self.prepare_batch, self.factorize_hessian]

    def accumulate_hessian(self, inp: Tensor, module: nn.Module, hessian: Tensor, num_samples: Tensor) -> Any:
        if not isinstance(module, nn.Linear):
            return self._accumulate(inp, module, hessian, num_samples)
        self._sums.add(inp, hessian, 2.0, 2.0)
        num_samples += sample_count(inp)
        return hessian, num_samples

    def prepare_batch(
        self,
        batch: list[nn.Module],
        batch_qparams: list[dict[str, Tensor]],
        hessians_by_module: dict[nn.Module, Tensor],
        num_samples_by_module: dict[nn.Module, Tensor],
    ) -> Any:
        for module in batch:
            self._sums.complete(hessians_by_module[module])
        return self._prepare(batch, batch_qparams, hessians_by_module, num_samples_by_module)

    def factorize_hessian(self, weights: Tensor, hessians: Tensor, percdamp: float, used_rtn_fallback: Tensor) -> Any:
        """The factors [b, d, d] in the place of hessians; weights [b, out, d] and the flags [b] change as well."""
        if len(hessians) >= BATCHED_FROM and not uses_gauss_jordan(hessians[0]):
            return self._factorize(weights, hessians, percdamp, used_rtn_fallback)
        for weight, hessian, fallback in zip(weights, hessians, used_rtn_fallback, strict=True):
            diagonal = hessian.diagonal()
            dead = diagonal == 0
            weight.masked_fill_(dead, 0)
            diagonal.masked_fill_(dead, 1)
            diagonal.add_(percdamp * diagonal.mean())
            factor, failed = checked_factor(hessian)
            self._calls.count(inverse_factors=1)
            # The identity where it failed, without waiting for the device to say so.
            hessian.copy_(factor.masked_fill_(failed, 0))
            diagonal.masked_fill_(failed, 1)
            fallback.logical_or_(failed)
        return hessians


class SparseGptKernels(Kernels):
    """The replacements for SparseGPT, from the originals."""

    def __init__(
        self,
        sums: OpenSums,
        calls: Calls,
        make: FunctionType,
        accumulate: FunctionType,
        sparsify: FunctionType,
        onload: FunctionType,
    ) -> None:
        super().__init__(sums, calls, make, accumulate)
        self._sparsify = with_names(sparsify, torch=FactorisingTorch(calls))
        self._onload = onload

    def replacements(self) -> list[Any]:
        return [self.make_empty_hessian, self.accumulate_hessian, self.sparsify_weight, self.completing_onload()]

    def accumulate_hessian(self, inp: Tensor, module: nn.Module, H: Tensor, num_samples: int) -> Any:
        if not isinstance(module, nn.Linear):
            return self._accumulate(inp, module, H, num_samples)
        count = num_samples + sample_count(inp)
        self._sums.add(inp, H, 2 / count, 2 / num_samples if num_samples else 1.0)
        return H, count

    def sparsify_weight(
        self, module: nn.Module, hessians_dict: dict[nn.Module, Tensor], *rest: Any, **named: Any
    ) -> Any:
        self._sums.complete(hessians_dict[module])
        return self._sparsify(module, hessians_dict, *rest, **named)

    def completing_onload(self) -> Any:
        sums, original = self._sums, self._onload

        @contextmanager
        def onload(self: Any, module: nn.Module) -> Iterator[None]:
            # With offload_hessians H travels as copies that only the modifier knows: each has to be complete.
            if self.offload_hessians:
                sums.complete(self._hessians[module])
            with original(self, module):
                yield

        return onload
