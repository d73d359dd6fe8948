"""The last step of a DISP pruning, where asked for: the drivers are fitted to what the whole modules put out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..architectures import ATTENTION, FFN, MODULES
from ..architectures.channel_selection import ATTENTION_OUT, FFN_MIDDLE, FFN_OUT, Selection
from ..calibration.second_moments import add_product
from ..forward.hidden_states import HiddenStates
from ..forward.layer_forward import LayerForward, layer_name
from ..mask_training.masked_model import masking_hooks, selection_masks
from ..ops import Hessian, damped_inverse

DAMPING = 0.01  # of H's mean diagonal, as in the methods of second order
OUTPUTS = {ATTENTION: ATTENTION_OUT, FFN: FFN_OUT}


class Refit:
    """Least squares of the drivers' kept rows and columns, layer by layer on the pruned prefix's hidden states.

    The kept rows of W' s come nearest to those of W f: s the driver's selected inputs, f the inputs that the module has
    on the same hidden states when it reads and keeps everything. W' = W_s + W D A, D = Σ (f - s) sᵀ with s in f's
    places, A the damped inverse of Σ s sᵀ: damping draws towards the weights as they are, not towards zero.
    """

    def __init__(self, forward: LayerForward) -> None:
        self.forward = forward
        self.hidden: HiddenStates = forward.embed()

    @torch.no_grad()
    def layer(self, block: nn.Module, layer: int, selection: Selection) -> dict[str, Tensor]:
        """New weights of both drivers, float32 [kept rows, kept columns] by name; `hidden` becomes the layer's output.

        block: the dense layer on the device; its drivers are overwritten.
        """
        forward, family = self.forward, self.forward.family
        shape = forward.reader.shapes[layer]
        masks = selection_masks(shape, selection, forward.device, forward.dtype)
        fitted = {}
        for module in MODULES:
            weight = block.get_parameter(family.driver(module) + ".weight")
            rows = selection[OUTPUTS[module]].to(forward.device)
            columns = torch.arange(weight.shape[1], device=forward.device)
            if module == FFN:
                columns = selection[FFN_MIDDLE].to(forward.device)
            new = self._fit(block, layer, module, masks, weight.data, rows, columns)
            fitted[family.driver(module) + ".weight"] = new
            weight.data[rows[:, None], columns] = new.to(weight.dtype)
            with masking_hooks(block, family, masks):
                for part in self.hidden.parts():
                    part.replace(forward.half(block, layer, module, part.value))
        return fitted

    def _fit(
        self,
        block: nn.Module,
        layer: int,
        module: str,
        masks: dict[str, Tensor],
        weight: Tensor,
        rows: Tensor,
        columns: Tensor,
    ) -> Tensor:
        forward, family = self.forward, self.forward.family
        hessian = Hessian.zeros(len(columns), forward.device)
        shortfall = torch.zeros(weight.shape[1], len(columns), device=forward.device)
        for part in self.hidden.parts():
            whole = self._inputs(block, layer, module, part.value)
            with masking_hooks(block, family, masks):
                selected = self._inputs(block, layer, module, part.value)[:, columns].contiguous()
            hessian.update(selected)
            whole[:, columns] -= selected
            add_product(shortfall, whole, selected)
        where = layer_name(family, layer, module)
        inverse = damped_inverse(hessian.finish(), DAMPING, where).inverse
        kept = weight[rows].float()
        return kept[:, columns] + kept @ shortfall @ inverse

    def _inputs(self, block: nn.Module, layer: int, module: str, hidden: Tensor) -> Tensor:
        """Inputs of the module's driver, [tokens, channels]."""
        seen: list[Tensor] = []
        see: Callable[[Tensor], None] = seen.append
        with self.forward.observed(block, {self.forward.family.driver(module): see}):
            self.forward.half(block, layer, module, hidden)
        return seen[0].flatten(0, -2)
