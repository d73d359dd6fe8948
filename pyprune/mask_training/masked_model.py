"""A frozen language model with masks on its layers; weights and code stay as they are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..architectures import ATTENTION, FFN, Family, LayerShape
from ..architectures.channel_selection import (
    ATTENTION_IN,
    ATTENTION_OUT,
    FFN_IN,
    FFN_MIDDLE,
    FFN_OUT,
    ChannelSelection,
    width,
)

ATTENTION_MIDDLE = "attention_middle"  # the heads' outputs, which o reads: where KV groups are masked
Masks = list[dict[str, Tensor]]  # by layer: place -> mask [channels], or [rows, 1, channels] for each row of a batch

# By sublayer: what its norm puts out, what its output projection reads, what its output projection puts out.
_PLACES = {
    ATTENTION: (ATTENTION_IN, ATTENTION_MIDDLE, ATTENTION_OUT),
    FFN: (FFN_IN, FFN_MIDDLE, FFN_OUT),
}
See = Callable[[int, str, Tensor], None]


class MaskedModel:
    """A model with hooks that multiply by `masks`. A caller sets them before a forward; other hook points stay whole.

    model: a causal language model of the family, frozen. With `checkpointing` a layer's activations are computed again
    in the backward pass. Masks are multiplied in the type of the activations.
    """

    def __init__(self, model: Any, family: Family, checkpointing: bool = False) -> None:
        self.model, self.family = model, family
        self.blocks: nn.ModuleList = model.get_submodule(family.layers)
        self.masks: Masks = [{} for _ in self.blocks]
        self._see: See | None = None
        for layer, block in enumerate(self.blocks):
            hook_points(block, family, partial(self._masked, layer))
            if checkpointing:
                block.forward = partial(_recomputed, block.forward)

    def _masked(self, layer: int, hook_point: str, value: Tensor) -> Tensor:
        if self._see is not None:
            self._see(layer, hook_point, value)
        mask = self.masks[layer].get(hook_point)
        return value if mask is None else value * mask.to(value.dtype)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Mask nothing within the context."""
        masks, self.masks = self.masks, [{} for _ in self.masks]
        try:
            yield
        finally:
            self.masks = masks

    @contextmanager
    def observed(self, see: See) -> Iterator[None]:
        """Call `see(layer, hook_point, value)` with every value [rows, tokens, channels] that a mask may multiply."""
        self._see = see
        try:
            yield
        finally:
            self._see = None

    def losses(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the predicted tokens of each row, ids int64 [rows, tokens]; float32 or wider [rows]."""
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[:, :-1])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(ids.shape[0], -1).mean(1)


def hook_points(
    block: nn.Module, family: Family, change: Callable[[str, Tensor], Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Have every value of a layer that a mask may multiply replaced by `change(place, value)`."""

    def after(hook_point: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, arguments, output: change(hook_point, output)

    def before(hook_point: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda module, arguments: (change(hook_point, arguments[0]), *arguments[1:])

    handles = []
    for sublayer, (norm, middle, output) in _PLACES.items():
        output_proj = block.get_submodule(family.output_proj(sublayer))
        if family.selects_channels:
            read = block.get_submodule(str(family.wiring.norm_before(sublayer)))
            handles.append(read.register_forward_hook(after(norm)))
        handles += [
            output_proj.register_forward_pre_hook(before(middle)),
            output_proj.register_forward_hook(after(output)),
        ]
    return handles


def selection_masks(
    shape: LayerShape, selection: ChannelSelection, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A layer's selections as masks of 0 and 1 [channels]."""
    masks = {}
    for name, kept in selection.items():
        masks[name] = torch.zeros(width(shape, name), device=device, dtype=dtype)
        masks[name][kept.to(device)] = 1
    return masks


@contextmanager
def masking_hooks(block: nn.Module, family: Family, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply one layer's values by `masks`, hook point -> mask [channels], within the context."""
    handles = hook_points(
        block, family, lambda hook_point, value: value * masks[hook_point] if hook_point in masks else value
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)
