"""GPTQModel with the Hessian and the factor of its inverse computed here.

What is replaced on its class `GPTQ`, and nothing else of its algorithm:

- `add_batch`: a partial sum of a device takes products only, one triangle, where GPTQModel converts the inputs to
  float32, multiplies, and adds. Tokens, forwards and readiness are kept as it keeps them.
- `materialize_global_hessian`: it adds the partials of all devices and scales by 2 / tokens, all of it linear; the
  upper triangle is filled afterwards.
- the three factorisations in `hessian_inverse`, which runs with another `torch` among its globals (factor_chain.py).
  Damping, its recovery and the floor under the diagonal remain its own.

Layers that are no torch.nn.Linear, inputs padded for tensor parallelism, and subclasses with an accumulation of their
own (GPTAQ, FOEM) are left to the tool, and so is a batch whose sum finds no GPU memory, which it takes to the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..ops.hessian import hessian_finish, hessian_update
from ..ops.moments import row_count
from .cholesky_shim import FactorisingTorch
from .patching import (
    Acceleration,
    Calls,
    PatchPoint,
    check_agreement,
    installed_release,
    original_functions,
    patched,
    refusal,
    with_names,
)

TOOL = "gptqmodel"


def accelerated() -> Acceleration:
    """`with accelerated() as calls: model.quantize(...)`; calls counts what ran here.

    Raises InputError on entering where GPTQModel is missing, its functions are not the tested ones, or it is
    accelerated already. On leaving, also by an exception, GPTQModel has its own functions back.
    """
    return Acceleration(TOOL, kernels_replaced)


def patch_points() -> list[PatchPoint]:
    """Name the functions that a block replaces, the first three, and those that the replacements rely on."""
    gptq = import_module("gptqmodel.quantization.gptq")
    replaced = ("add_batch", "materialize_global_hessian", "hessian_inverse")
    relied_on = ("process_batch", "_wait_partial_ready", "_record_partial_ready", "_record_hessian_ready")
    return [PatchPoint(gptq.GPTQ, name) for name in (*replaced, *relied_on)]


@contextmanager
def kernels_replaced() -> Iterator[Calls]:
    installed_release(TOOL)
    gptq = import_module("gptqmodel.quantization.gptq")
    points = patch_points()
    calls = Calls()
    kernels = Kernels(calls, *original_functions(TOOL, points)[:4])
    check_contract(gptq, kernels, calls)
    calls.inverse_factors = 0
    with patched(points[:3], kernels.replacements()):
        try:
            yield calls
        finally:
            kernels.complete_all()


class Kernels:
    """The replacements, from the originals."""

    def __init__(
        self,
        calls: Calls,
        add_batch: FunctionType,
        materialize: FunctionType,
        hessian_inverse: FunctionType,
        process_batch: FunctionType,
    ) -> None:
        self._calls = calls
        self.original_add_batch, self.original_materialize = add_batch, materialize
        self.original_hessian_inverse, self._process_batch = hessian_inverse, process_batch
        self.hessian_inverse = with_names(hessian_inverse, torch=FactorisingTorch(calls))
        # The GPTQ objects with partial sums that lack their upper triangle. GPTQModel works on several at once, in
        # threads, and its locks are one for each object.
        self._open: WeakSet[Any] = WeakSet()
        self._open_lock = threading.Lock()

    def replacements(self) -> list[Any]:
        # A class binds functions to its objects, and nothing else.
        def add_batch(self: Any, inp: Tensor, out: Tensor, batch_index: int | None = None) -> None:
            kernels.add_batch(self, inp, out, batch_index)

        def materialize_global_hessian(self: Any, target_device: torch.device | None = None) -> None:
            kernels.materialize(self, target_device)

        kernels = self
        return [add_batch, materialize_global_hessian, self.hessian_inverse]

    def takes(self, task: Any) -> bool:
        """Return whether the task's Hessian is the plain sum over the rows of a Linear's inputs."""
        own = getattr(type(task), "process_batch", None) is not self._process_batch
        return isinstance(task.module, nn.Linear) and not own and not task._tp_pad_cols

    def add_batch(self, task: Any, inp: Tensor, out: Tensor, batch_index: int | None) -> None:
        if not self.takes(task):
            self.original_add_batch(task, inp, out, batch_index)
            return
        rows, device = row_count(inp), inp.device
        if rows == 0:
            return
        with task.lock:
            try:
                self.update_partial(task, inp.detach(), device)
            except torch.OutOfMemoryError:
                # Nothing was added: both the sum and the kernel's workspace are allocated before the first product.
                self.original_add_batch(task, inp, out, batch_index)
                return
            task._record_partial_ready(device)
            task.fwd_counter += 1
            task._device_sample_counts[device] = task._device_sample_counts.get(device, 0) + rows
            task.nsamples += rows
            task._hessian_dirty = True

    def update_partial(self, task: Any, x: Tensor, device: torch.device) -> None:
        partial = task._device_hessian_partials.get(device)
        if partial is None:
            partial = torch.zeros(task.columns, task.columns, dtype=torch.float32, device=device)
            hessian_update(x, partial, None)
            task._device_hessian_partials[device] = partial
        else:
            task._wait_partial_ready(device)
            hessian_update(x, partial, None)
        with self._open_lock:
            self._open.add(task)
        self._calls.count(hessian_updates=1)

    def materialize(self, task: Any, target_device: torch.device | None) -> None:
        with task.lock:
            self.original_materialize(task, target_device)
            with self._open_lock:
                completes = task in self._open and not task._device_hessian_partials
                if completes:
                    self._open.discard(task)
            if completes:
                hessian_finish(task.H, None, 0, 1.0)
                task._record_hessian_ready(task.H.device)

    def complete_all(self) -> None:
        """Complete all at the end of the block: the tool may read those that are still alive."""
        # Calibration may have run in inference mode, whose tensors change in it only; in it, every tensor may.
        with self._open_lock:
            tasks = list(self._open)
            self._open.clear()
        for task in tasks:
            with task.lock, torch.inference_mode():
                for device, partial in task._device_hessian_partials.items():
                    task._wait_partial_ready(device)
                    hessian_finish(partial, None, 0, 1.0)
                    task._record_partial_ready(device)


@torch.no_grad()
def check_contract(gptq: ModuleType, kernels: Kernels, calls: Calls) -> None:
    """InputError unless H = 2/T·Σ x xᵀ over T tokens, and one chain of three factorisations leads to the factor."""
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    settings = gptq.QuantizeConfig(group_size=8, offload_to_disk=False)
    task = gptq.GPTQ(nn.utils.skip_init(nn.Linear, 8, 4, device="cpu"), settings)
    if not kernels.takes(task):
        raise refusal(TOOL, "GPTQ.process_batch is not its own")
    for inputs in x:
        kernels.original_add_batch(task, inputs, None)
    kernels.original_materialize(task, None)
    rows = x.flatten(0, 1)
    expected = [2 / len(rows) * rows.T @ rows, torch.tensor(len(rows))]
    check_agreement(TOOL, "GPTQ.add_batch", [task.H, torch.tensor(task.nsamples)], expected)

    factors = []
    for hessian_inverse in (kernels.original_hessian_inverse, kernels.hessian_inverse):
        factor, damping = hessian_inverse(task, task.H.clone())
        factors.append([factor, torch.tensor(damping)])
    if calls.inverse_factors != 1:
        raise refusal(TOOL, f"GPTQ.hessian_inverse factorises {calls.inverse_factors} times for a sound Hessian")
    check_agreement(TOOL, "GPTQ.hessian_inverse", *factors)
