"""Optional last step of DISP: fit the output projections to the outputs of the dense sublayers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..architectures import ATTENTION, FFN, SUBLAYERS
from ..architectures.channel_selection import ATTENTION_OUT, FFN_MIDDLE, FFN_OUT, ChannelSelection
from ..calibration.second_moments import add_product
from ..forward.hidden_states import HiddenStates
from ..forward.layer_forward import LayerForward, layer_name
from ..mask_training.masked_model import masking_hooks, selection_masks
from ..ops import Hessian, damped_inverse

DAMPING = 0.01  # of H's mean diagonal, as in the methods of second order
OUTPUTS = {ATTENTION: ATTENTION_OUT, FFN: FFN_OUT}


class Refit:
    """Least squares of the output projections' kept entries, layer by layer on the pruned prefix's hidden states.

    The kept rows of W' s come nearest to those of W f: s the output projection's selected inputs, f the inputs that the
    sublayer has on the same hidden states when it reads and keeps everything. W' = W_s + W D A, D = Σ (f - s) sᵀ with s
    in f's places, A the damped inverse of Σ s sᵀ: damping draws towards the weights as they are, not towards zero.
    """

    def __init__(self, forward: LayerForward) -> None:
        self.forward = forward
        self.hidden: HiddenStates = forward.embed()

    @torch.no_grad()
    def layer(self, block: nn.Module, layer: int, selection: ChannelSelection) -> dict[str, Tensor]:
        """Fit both output projections: float32 [kept rows, kept columns] by name. `hidden` becomes the layer's output.

        block: the dense layer on the device; its output projections are overwritten.
        """
        forward, family = self.forward, self.forward.family
        shape = forward.reader.shapes[layer]
        masks = selection_masks(shape, selection, forward.device, forward.dtype)
        fitted = {}
        for sublayer in SUBLAYERS:
            weight = block.get_parameter(family.output_proj(sublayer) + ".weight")
            rows = selection[OUTPUTS[sublayer]].to(forward.device)
            columns = torch.arange(weight.shape[1], device=forward.device)
            if sublayer == FFN:
                columns = selection[FFN_MIDDLE].to(forward.device)
            new = self._fit(block, layer, sublayer, masks, weight.data, rows, columns)
            fitted[family.output_proj(sublayer) + ".weight"] = new
            weight.data[rows[:, None], columns] = new.to(weight.dtype)
            with masking_hooks(block, family, masks):
                for part in self.hidden.micro_batches():
                    forward.step(block, layer, sublayer, part)
        return fitted

    def _fit(
        self,
        block: nn.Module,
        layer: int,
        sublayer: str,
        masks: dict[str, Tensor],
        weight: Tensor,
        rows: Tensor,
        columns: Tensor,
    ) -> Tensor:
        forward, family = self.forward, self.forward.family
        hessian = Hessian.zeros(len(columns), forward.device)
        stream_error = torch.zeros(weight.shape[1], len(columns), device=forward.device)
        for part in self.hidden.micro_batches():
            whole = self._inputs(block, layer, sublayer, part.value)
            with masking_hooks(block, family, masks):
                selected = self._inputs(block, layer, sublayer, part.value)[:, columns].contiguous()
            hessian.update(selected)
            whole[:, columns] -= selected
            add_product(stream_error, whole, selected)
        where = layer_name(family, layer, sublayer)
        inverse = damped_inverse(hessian.finish(), DAMPING, where).inverse
        kept = weight[rows].float()
        return kept[:, columns] + kept @ stream_error @ inverse

    def _inputs(self, block: nn.Module, layer: int, sublayer: str, hidden: Tensor) -> Tensor:
        """Inputs of the sublayer's output projection, [tokens, channels]."""
        seen: list[Tensor] = []
        see: Callable[[Tensor], None] = seen.append
        with self.forward.observed(block, {self.forward.family.output_proj(sublayer): see}):
            self.forward.run_sublayer(block, layer, sublayer, hidden)
        return seen[0].flatten(0, -2)
