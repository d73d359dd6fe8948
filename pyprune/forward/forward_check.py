"""Check that a family's layers are wired as our forward assumes, against transformers' own model.

A family whose layers scale, norm or add in another way would otherwise be pruned to the end, with a wrong result.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import SUBLAYERS, without_layers
from ..checkpoint import ModelSource, layer_loader
from ..errors import InputError
from .fused import activation_of, fuse, runs_fused
from .layer_forward import LayerForward

TOKENS = 128

# Largest norm of the difference of a token's hidden states, averaged over the tokens, in roundings of the summands: the
# layer's output, and its change of the input. One rounding is the unit roundoff u of the compute type, at least
# u(float32)·√(widest sum): by that much float32 sums differ where their order does.
#
# Unfused, both sides run the same sublayers on the same numbers: their bits are equal, and one rounding is left for a
# backend of attention that is chosen by how the mask is given. Fused, a dozen results in a row are rounded (norm,
# queries and keys turned, probabilities, values, o_proj, the sum; norm, gate, up, silu, product, down_proj, the sum).
# Each rounding is off by at most u of its result, u/√3 in the mean square, so that two independent runs differ by
# about √(2·13/3) u = 3 u; logits of attention that are large amplify those before the softmax, hence eight.
UNFUSED, FUSED = 1, 8


class _Pass(nn.Module):
    """Stand-in for a layer: returns its input."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


@torch.no_grad()
def check_forward(reader: ModelSource, windows: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """InputError unless embeddings, and attention half and FFN half of a layer, are what transformers' model computes.

    On the beginning of the first of `windows` [windows, tokens], for one stored layer of each kind that the model has.
    With kernels in the forward (`fused.py`) they are compared too.
    """
    ids = windows[:1, :TOKENS]
    forward = LayerForward(reader, ids, device, dtype, batch=1)
    forward.config, forward.fused = _narrow_windows(reader.config, ids.shape[1]), False
    given = forward.embed().data
    for layer in layer_kinds(reader):
        block = _stored_layer(forward, layer)
        entered, left = _own_result(forward, block, layer, ids)
        changed = left.float() - entered.float()
        _compare(given, entered, torch.zeros_like(changed), UNFUSED, forward, "the embeddings differ from")
        what = f"attention and FFN of layer {layer}, one after the other, differ from"
        _compare(_halves(forward, block, layer, entered), left, changed, UNFUSED, forward, what)
        if runs_fused(device, dtype):
            forward.fused = True
            fuse(block, reader.family, activation_of(reader.config))
            what = f"layer {layer} with pyprune's kernels differs from"
            _compare(_halves(forward, block, layer, entered), left, changed, FUSED, forward, what)
            forward.fused = False
        del block  # freed before the next one is built


def layer_kinds(reader: ModelSource) -> list[int]:
    """The first layer of each kind: layers differ in kind where a list of the configuration has another value for
    each, where their tensors have other names, or where one sees a sliding window and the other does not."""
    config, count = reader.config, reader.layers
    lists = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == count]
    first: dict[str, int] = {}
    for layer in range(count):
        names = sorted(reader.layer_state_shapes[layer])
        kind = [reader.family.kind(config, layer), [own[layer] for own in lists], names]
        first.setdefault(repr(kind), layer)
    return list(first.values())


def _narrow_windows(config: Any, tokens: int) -> Any:
    """Copy the configuration; a sliding window becomes shorter than `tokens`, so that masks matter."""
    narrow = copy.deepcopy(config)
    narrow._attn_implementation = config._attn_implementation
    window = getattr(config, "sliding_window", None)
    if window is not None and tokens > 1:
        narrow.sliding_window = min(window, max(1, tokens // 2))
    return narrow


def _stored_layer(forward: LayerForward, layer: int) -> nn.Module:
    reader, mapped = forward.reader, forward.device.type == "cpu"
    # The loader has read the tensors that it yields: a file that cannot be read fails there, also if it is mapped here.
    [block] = [
        forward.build(reader.stream_layer(layer) if mapped else stored.items(), layer, forward.config)
        for stored in layer_loader(reader, forward.device).layers(layer, layer + 1)
    ]
    return block


def _own_result(forward: LayerForward, block: nn.Module, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of the layer when transformers' model runs with it as its only layer."""
    config = copy.deepcopy(forward.config)
    config._attn_implementation = forward.config._attn_implementation
    tokens, own_ids = ids.unique(return_inverse=True)
    config.vocab_size, config.pad_token_id = len(tokens), None  # of the table only the rows that occur
    with torch.random.fork_rng(devices=[]), without_layers(config):
        body = forward.family.model_class(config)
    table = body.get_input_embeddings()
    table.weight.data = forward.reader.embed(tokens).to(forward.dtype)
    if forward.family.positions is not None:
        name, _ = forward.family.positions
        within = name.removeprefix(forward.family.body + ".")
        body.get_parameter(within).data = forward.reader.read([name])[name].to(forward.dtype)
    layers = [_Pass() for _ in range(config.num_hidden_layers)]
    forward.family.put_layers(body, nn.ModuleList([*layers[:layer], block, *layers[layer + 1 :]]))
    seen: list[Tensor] = []
    hook = block.register_forward_hook(lambda _, given, result: seen.extend((given[0], result)))
    body.to(forward.device).eval()(input_ids=own_ids.to(forward.device), use_cache=False)
    hook.remove()
    entered, left = seen
    return entered, left


def _halves(forward: LayerForward, block: nn.Module, layer: int, hidden: Tensor) -> Tensor:
    for sublayer in SUBLAYERS:
        result = forward.run_sublayer(block, layer, sublayer, hidden)
        hidden = result if forward.advances(sublayer) else hidden
    return result


def _compare(ours: Tensor, own: Tensor, changed: Tensor, roundings: int, forward: LayerForward, what: str) -> None:
    """InputError if the tokens' hidden states differ by more than `roundings`, on average.

    Tokens that are not finite on either side are left out: the passes name the weights that make them so.
    """
    ours, own = ours.float(), own.float()
    finite = ours.isfinite().all(-1) & own.isfinite().all(-1)  # [windows, tokens]
    if not finite.any():
        return
    size = own.norm(dim=-1) + changed.norm(dim=-1)
    relative = ((ours - own).norm(dim=-1) / size.clamp_min(torch.finfo(torch.float32).tiny))[finite].mean().item()
    if relative > roundings * _rounding(forward):
        raise InputError(
            f"{forward.reader.origin}: {what} transformers' {forward.family.model_class.__name__} "
            f"by {relative:.2g} of their size: model type {forward.reader.config.model_type!r} as this config.json "
            "describes it has layers that pyprune does not know how to run; start from a model without them"
        )


def _rounding(forward: LayerForward) -> float:
    widest = max(max(shape.input_widths) for shape in forward.reader.shapes)
    own = torch.finfo(forward.dtype).eps / 2
    return max(own, torch.finfo(torch.float32).eps / 2 * widest**0.5)
