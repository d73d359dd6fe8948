"""The pass of methods that zero single weights: layer by layer, each on the sparse ones before it."""

import torch
from torch import Tensor, nn

from ..calibration.channel_statistics import ChannelObserver, column_norms
from ..calibration.second_moments import HessianObserver
from ..checkpoint import CheckpointWriter
from ..checkpoint.headers import on_meta
from ..forward.hidden_states import HiddenStates
from ..forward.layer_forward import LayerForward, Observe
from ..job.entries import SparseEntry, sparse_entry
from ..job.job import Job
from ..job.result import PruneResult, SparseResult, config_of
from ..methods.weight_sparsity import LinearInputs, SemiStructuredMethod, inputs_of, linears_of
from ..runtime import distributed
from ..runtime.device import Meter
from .base import Passes, build_dense, stored_layers, widest_output_proj


class SparsifyingPasses(Passes):
    """Statistics of a layer's every input in one forward, zeros in all its linears, and a forward of the result."""

    def __init__(self, job: Job, writer: CheckpointWriter, method: SemiStructuredMethod) -> None:
        super().__init__(job, writer)
        self.method = method

    @torch.no_grad()
    def decide(self) -> PruneResult:
        if self.method.from_hessian:
            hidden_size = max(shape.hidden_size for shape in self.reader.shapes)
            self.warn_of_few_tokens(max(hidden_size, widest_output_proj(self.reader.shapes)), "a linear layer's input")
        self.meter = self.meters["prune"] = Meter(self.device)
        stored = [on_meta(self.reader.layer_tensors(layer)) for layer in range(self.reader.layers)]
        self.lay_out(stored, config_of(self.reader, self.reader.shapes, self.job.biases)[1])
        self.copy_embeddings()
        forward, last = self.job.forward(), self.reader.layers - 1
        hidden = forward.embed()
        entries: list[SparseEntry] = []
        for layer, source in stored_layers(self.job, "prune", self.meter):
            if layer + 1 in self.writer.done:
                entry, tensors = self.written(layer)
            else:
                tensors, entry = self._sparse(forward, layer, source, hidden)
                self.write_layer(layer, tensors, entry)
            entries.append(entry)
            if layer < last:
                with self.meter.stage("second forward"):
                    forward.run(forward.build(tensors.items(), layer), layer, hidden, {})
            del tensors  # before the next ones are made
        self.copy_head()
        return SparseResult(entries)

    def _sparse(
        self, forward: LayerForward, layer: int, source: dict[str, Tensor], hidden: HiddenStates
    ) -> tuple[dict[str, Tensor], SparseEntry]:
        """The layer's tensors with its linears' zeros, and the record's entry."""
        family, where = self.reader.family, f"layer {layer}"
        with self.meter.stage("forward"):
            inputs = self._observe(forward, build_dense(self.job, forward, source, layer), layer, hidden)
        with self.meter.stage("choice"):
            weights = {name: source[name + ".weight"].to(self.device) for name in linears_of(family)}
            for name, weight in weights.items():
                column_norms(weight, f"{where} ({name})")  # names NaN and Inf
            found = self.method.sparsify(family, inputs, weights, self.job.ratio, where)
            # Devices of two kinds would round, and in a close call choose, in their own ways.
            distributed.broadcast_(*(own.weight for own in found.values()))
            new = {name + ".weight": own.weight for name, own in found.items()}
            tensors = {}
            for name, stored in source.items():
                if name in new:
                    tensors[name] = new[name].to(stored.device, stored.dtype)
                else:
                    tensors[name] = stored.clone() if stored.device.type == "cpu" else stored
        zeros = {name: int((tensors[name + ".weight"] == 0).sum()) for name in found}
        return tensors, sparse_entry(
            {name: (tensors[name + ".weight"].numel(), zeros[name], own.loss) for name, own in found.items()}
        )

    def _observe(self, forward: LayerForward, block: nn.Module, layer: int, hidden: HiddenStates) -> list[LinearInputs]:
        """Collect statistics of all inputs of a layer in one forward; the hidden states do not advance."""
        observers = {}
        for names in inputs_of(self.reader.family):
            weight, where = block.get_parameter(names[0] + ".weight").data, f"layer {layer} ({names[0]})"
            observers[names] = (
                HessianObserver(weight.shape[1], self.device, where, False, forward.allow_nonfinite)
                if self.method.from_hessian
                else ChannelObserver(weight, where, False, forward.allow_nonfinite)
            )
        observe: dict[str, Observe] = {names[0]: observer.observe for names, observer in observers.items()}
        forward.run(block, layer, hidden, observe, advance=False)
        return [self._finished(names, observer) for names, observer in observers.items()]

    def _finished(self, names: tuple[str, ...], observer: HessianObserver | ChannelObserver) -> LinearInputs:
        if isinstance(observer, HessianObserver):
            assert self.job.windows is not None
            inputs = LinearInputs(names, hessian=observer.result().hessian.mul_(2 / len(self.job.windows)))
        else:
            norms = observer.result().input_squares().sqrt()
            inputs = LinearInputs(names, norms=norms.to(self.device, torch.float32))
        if observer.nonfinite:
            self.nonfinite[observer.where] = observer.nonfinite
        return inputs
