"""Importance of each gate before training, for a warm start: second moments of values or gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..architectures import ATTENTION, FFN, LayerShape
from ..architectures.channel_selection import (
    ATTENTION_IN,
    ATTENTION_OUT,
    FFN_IN,
    FFN_MIDDLE,
    FFN_OUT,
    SELECTIONS,
    width,
)
from .budget import kept_share, shift_to_budget
from .masked_model import MaskedModel, Masks

# Standard deviation of the prior's logits over the model: two of them are probabilities of 2 % and 98 %.
SPREAD = 2.0


def gradient_importance(
    masked: MaskedModel, shapes: list[LayerShape], windows: Tensor, progress: Callable[[int, int], None]
) -> list[dict[str, Tensor]]:
    """Mean over windows of (∂ loss / ∂ gate)², all gates open: the diagonal Fisher information of the gates.

    Half of it is the second-order estimate of what closing a gate costs (Molchanov et al. 2019, arXiv 1906.10771,
    eq. 8, on gates). windows: int64 [windows, tokens] on the device. Returns float64 [width] by layer and selection.
    """
    device = windows.device
    gates: Masks = [
        {name: torch.ones(width(shape, name), device=device, requires_grad=True) for name in SELECTIONS}
        for shape in shapes
    ]
    total = [{name: torch.zeros_like(gate, dtype=torch.float64) for name, gate in own.items()} for own in gates]
    flat = [gate for own in gates for gate in own.values()]
    sums = [sums for own in total for sums in own.values()]
    masked.masks = gates
    for number, window in enumerate(windows):
        gradients = torch.autograd.grad(masked.losses(window[None]).sum(), flat)
        for own, gradient in zip(sums, gradients, strict=True):
            own += gradient.double().square()
        progress(number + 1, len(windows))
    return [{name: own[name] / len(windows) for name in own} for own in total]


@torch.no_grad()
def moment_importance(
    masked: MaskedModel, shapes: list[LayerShape], windows: Tensor, progress: Callable[[int, int], None]
) -> list[dict[str, Tensor]]:
    """Second moments of the gated values; where matrices read them, times their columns' squares (as WIFV, Wanda).

    E[v_c²] Σ_o W_oc² for attention_in, ffn_in and ffn_middle, E[v_c²] for the two outputs, over all tokens: scales
    differ between selections. Arguments and result: as in `gradient_importance`.
    """
    squares = [
        {name: torch.zeros(width(shape, name), dtype=torch.float64, device=windows.device) for name in SELECTIONS}
        for shape in shapes
    ]

    def see(layer: int, hook_point: str, value: Tensor) -> None:
        if hook_point in squares[layer]:
            squares[layer][hook_point] += value.flatten(0, -2).double().square().sum(0)

    with masked.whole(), masked.observed(see):
        for number, window in enumerate(windows):
            masked.losses(window[None])
            progress(number + 1, len(windows))
    family = masked.family
    readers = {
        ATTENTION_IN: family.input_projs(ATTENTION),
        FFN_IN: family.input_projs(FFN),
        FFN_MIDDLE: (family.output_proj(FFN),),
    }
    for block, own in zip(masked.blocks, squares, strict=True):
        for name, matrices in readers.items():
            weights = [block.get_parameter(matrix + ".weight").double() for matrix in matrices]
            own[name] *= torch.stack([weight.square().sum(0) for weight in weights]).sum(0)
    return squares


def prior_logits(
    shapes: list[LayerShape], importance: list[dict[str, Tensor]], ratio: float, by_selection: bool
) -> list[dict[str, Tensor]]:
    """Logits whose expected model has the size asked for: standardised logarithms of importance for each parameter.

    The parameters that a channel costs are those of the model with every other channel at the kept share.
    `by_selection`: standardised within each selection of a layer, for importance whose scale differs between them;
    else over the model. Returns float32 [width] on the CPU by layer and selection.
    """
    logarithms = []
    for shape, own in zip(shapes, importance, strict=True):
        costs = channel_costs(shape, 1 - ratio)
        worth = {name: own[name].double().cpu() / costs[name] for name in SELECTIONS}
        logarithms.append(
            {name: value.clamp_min(torch.finfo(torch.float64).tiny).log() for name, value in worth.items()}
        )
    pool = torch.cat([own[name] for own in logarithms for name in SELECTIONS])
    scaled = [
        {
            name: SPREAD * (value - (value if by_selection else pool).mean()) / _spread(value if by_selection else pool)
            for name, value in own.items()
        }
        for own in logarithms
    ]

    def kept(shift: float) -> float:
        counts = [{name: float((value + shift).sigmoid().sum()) for name, value in own.items()} for own in scaled]
        return kept_share(shapes, counts)

    shift = shift_to_budget(kept, 1 - ratio)
    return [{name: (value + shift).float() for name, value in own.items()} for own in scaled]


def _spread(values: Tensor) -> float:
    return max(float(values.std()), 1e-6) if len(values) > 1 else 1.0


def channel_costs(shape: LayerShape, kept: float) -> dict[str, float]:
    """Parameters that go with one channel of each selection, where `kept` of the channels of the others stay."""
    query, key_value = shape.kv_groups * shape.group_width, shape.kv_groups * shape.head_dim
    middle, hidden = kept * shape.intermediate_channels, kept * shape.hidden_size
    return {
        ATTENTION_IN: query + 2 * key_value,
        ATTENTION_OUT: query,
        FFN_IN: 2 * middle,
        FFN_MIDDLE: 3 * hidden,
        FFN_OUT: middle,
    }
