"""The pass of methods that zero single weights: layer by layer, each on the sparse ones before it."""

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .. import distributed
from ..checkpoint import CheckpointWriter
from ..curvature import CurvatureObserver
from ..device import Meter
from ..forward import LayerForward, Observe
from ..hidden_states import HiddenStates
from ..job import Job
from ..methods.semi_structured import LinearInputs, SemiStructuredMethod, inputs_of, linears_of
from ..outcome import Outcome, SparseOutcome
from ..plan import sparse_entry
from ..statistics import DriverObserver, column_norms
from .base import Passes, build_dense, stored_layers


class SparsifyingPasses(Passes):
    """Statistics of a layer's every input in one forward, zeros in all its linears, and a forward of the result."""

    def __init__(self, job: Job, writer: CheckpointWriter, method: SemiStructuredMethod) -> None:
        super().__init__(job, writer)
        self.method = method

    @torch.no_grad()
    def execute(self) -> Outcome:
        self.meter = self.meters["prune"] = Meter(self.device)
        self.copy_embeddings()
        forward, last = self.job.forward(), self.reader.layers - 1
        hidden = forward.embed()
        entries = []
        for layer, source in stored_layers(self.job, "prune", self.meter):
            if layer + 1 in self.writer.done:
                tensors, entry = self._written(layer)
            else:
                tensors, entry = self._sparse(forward, layer, source, hidden)
                self.write_layer(layer, tensors, entry)
            entries.append(entry)
            if layer < last:
                with self.meter.stage("second forward"):
                    forward.run(forward.build(tensors.items(), layer), layer, hidden, {})
            del tensors  # before the next ones are made
        self.copy_head()
        return SparseOutcome(entries)

    def _written(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a killed run wrote of a layer."""
        prefix = self.reader.layer_prefix(layer)
        with safe_open(self.writer.file(layer + 1), framework="pt") as f:
            tensors = {name.removeprefix(prefix): f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        return tensors, self.writer.record(layer + 1)

    def _sparse(
        self, forward: LayerForward, layer: int, source: dict[str, Tensor], hidden: HiddenStates
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The layer's tensors with its linears' zeros, and the plan's entry."""
        family, where = self.reader.family, f"layer {layer}"
        with self.meter.stage("forward"):
            inputs = self._observe(forward, build_dense(self.job, forward, source, layer), layer, hidden)
        with self.meter.stage("choice"):
            weights = {name: source[name + ".weight"].to(self.device) for name in linears_of(family)}
            for name, weight in weights.items():
                column_norms(weight, f"{where} ({name})")  # names NaN and Inf
            found = self.method.sparsify(family, inputs, weights, self.job.ratio, where)
            # Devices of two kinds would round, and in a close call choose, in their own ways.
            distributed.broadcast_from_first(*(own.weight for own in found.values()))
            tensors = {name: t.clone() if t.device.type == "cpu" else t for name, t in source.items()}
            for name, own in found.items():
                stored = source[name + ".weight"]
                tensors[name + ".weight"] = own.weight.to(stored.device, stored.dtype)
        zeros = {name: int((tensors[name + ".weight"] == 0).sum()) for name in found}
        return tensors, sparse_entry(
            {name: (tensors[name + ".weight"].numel(), zeros[name], own.loss) for name, own in found.items()}
        )

    def _observe(self, forward: LayerForward, block: nn.Module, layer: int, hidden: HiddenStates) -> list[LinearInputs]:
        """Statistics of all inputs of a layer from one forward, which does not advance the hidden states."""
        observers = {}
        for names in inputs_of(self.reader.family):
            weight, where = block.get_parameter(names[0] + ".weight").data, f"layer {layer} ({names[0]})"
            observers[names] = (
                CurvatureObserver(weight.shape[1], self.device, where, False, forward.allow_nonfinite)
                if self.method.from_hessian
                else DriverObserver(weight, where, False, forward.allow_nonfinite)
            )
        observe: dict[str, Observe] = {names[0]: observer.observe for names, observer in observers.items()}
        forward.run(block, layer, hidden, observe, advance=False)
        return [self._finished(names, observer) for names, observer in observers.items()]

    def _finished(self, names: tuple[str, ...], observer: CurvatureObserver | DriverObserver) -> LinearInputs:
        if isinstance(observer, CurvatureObserver):
            assert self.job.windows is not None
            inputs = LinearInputs(names, hessian=observer.finish().hessian.mul_(2 / len(self.job.windows)))
        else:
            norms = observer.finish().input_squares().sqrt()
            inputs = LinearInputs(names, norms=norms.to(self.device, torch.float32))
        if observer.nonfinite:
            self.nonfinite[observer.where] = observer.nonfinite
        return inputs
