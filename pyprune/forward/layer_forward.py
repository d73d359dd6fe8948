"""Run decoder layers one at a time over hidden states, with transformers' layer classes."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..architectures import ATTENTION, FFN, Family
from ..architectures.declaration import LINEAR, NO_ROTARY, SLIDING
from ..checkpoint import ModelSource
from .fused import activation_of, fuse, fused_rotary, runs_fused, unfused
from .hidden_states import HiddenStates, MicroBatch
from .token_weights import norm_gain, token_weights

# Gets the input of a linear [..., in]; where a norm follows it, also what its tokens weigh.
Observe = Callable[..., object]

logger = logging.getLogger(__name__)

# Tokens in one micro-batch. On a GPU 16384 fill it; on a CPU 512 keep the FFN's temporaries (tokens x intermediate
# x 4, float32) small beside a layer's weights, and GEMMs there gain nothing from more.
_MICRO_BATCH_TOKENS = {"cuda": 16384, "cpu": 512}


def micro_batch(device: torch.device, sequence_length: int) -> int:
    """Windows in one micro-batch."""
    return max(1, _MICRO_BATCH_TOKENS[device.type] // sequence_length)


class LayerForward:
    """Forward passes of single layers over all calibration windows, in micro-batches of `batch` windows.

    batch: None for `micro_batch`'s. on_device: how many sets of hidden states may live on the device; further ones
    live in host memory. `allow_nonfinite` sets NaN and Inf in them to zero after each layer.
    """

    def __init__(
        self,
        reader: ModelSource,
        windows: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        allow_nonfinite: bool = False,
        batch: int | None = None,
        on_device: int = 2,
    ) -> None:
        self.reader, self.family = reader, reader.family
        self.device, self.dtype = device, dtype
        self.allow_nonfinite = allow_nonfinite
        self.fused = runs_fused(device, dtype)
        left = unfused(self.family, reader.config) if self.fused else []
        if left:
            logger.info("PyTorch computes %s of %s layers; kernels the rest", " and ".join(left), self.family.name)
        self.windows = windows
        length = windows.shape[1]
        self.batch = batch or micro_batch(device, length)
        self.on_device = on_device
        self.config = reader.config
        self.wiring = self.family.wiring_of(self.config)
        self.config._attn_implementation = self.family.attention_backend
        self.positions = torch.arange(length, device=device)[None]
        # One row in the compute type tells masks and rotary embeddings their device and type.
        row = torch.empty(1, length, 1, device=device, dtype=dtype)
        self._row = row
        self._rotary = self._rotary_embeddings()
        self._masks: dict[str, Tensor | None] = {}

    def _rotary_embeddings(self) -> dict[str, Any]:
        """Cosines and sines by kind of layer."""
        kinds = {self.family.kind(self.config, layer) for layer in range(self.config.num_hidden_layers)}
        if self.family.rotary == NO_ROTARY:
            return dict.fromkeys(kinds)
        rotary = self.family.rotary_class(config=self.config).to(self.device)
        axes, positions = self.family.position_axes, self.positions
        positions = positions if axes == 1 else positions.expand(axes, *positions.shape)
        if self.family.rotary_by_kind:
            return {kind: rotary(self._row, positions, kind) for kind in kinds}
        return dict.fromkeys(kinds, rotary(self._row, positions))

    def embed(self) -> HiddenStates:
        """Hidden states before the first layer."""
        count, length = self.windows.shape
        size = (count, length, self.config.hidden_size)
        hidden = HiddenStates.empty(size, self.dtype, self.device, self.batch, self.on_device > 0)
        positions = self._learned_positions(length)
        for k in range(count):
            rows = self.reader.embed(self.windows[k]).to(self.dtype)
            rows = self.family.scales.embed(self.config, rows)
            hidden.data[k] = rows if positions is None else rows + positions
        return hidden

    def _learned_positions(self, length: int) -> Tensor | None:
        """Rows [length, hidden_size] that embeddings are added to; None without learned positions."""
        if self.family.positions is None:
            return None
        name, first = self.family.positions
        return self.reader.read([name])[name][first : first + length].to(self.dtype)

    def copy(self, hidden: HiddenStates) -> HiddenStates:
        """A second set of hidden states with the same values."""
        return hidden.copy(self.on_device > 1)

    def build(self, tensors: Iterable[tuple[str, Tensor]], layer: int, config: Any = None) -> nn.Module:
        """Build the layer as a module on the device in the compute type; `config` is the dense one unless given."""
        with torch.device("meta"):
            block = self.family.build_layer(config or self.config, layer, self.reader.shapes[layer].head_dim)
        state = {}
        for name, tensor in tensors:
            state[name] = tensor.to(self.device, self.dtype)
            del tensor  # the next one is read after this one is gone
        block.load_state_dict(state, assign=True)
        if self.fused:
            fuse(block, self.family, activation_of(self.config))
        return block.eval()

    @torch.no_grad()
    def run(
        self, block: nn.Module, layer: int, hidden: HiddenStates, observe: dict[str, Observe], advance: bool = True
    ) -> None:
        """Run the layer over `hidden`; the input of each linear named in `observe` goes there.

        With `advance`, `hidden` is overwritten by the layer's output.
        """
        context = self._context(layer)
        with self.observed(block, observe), self._kernels():
            for part in hidden.micro_batches():
                output = block(part.value, **context)
                if advance:
                    if self.allow_nonfinite:
                        output = torch.nan_to_num(output, nan=0.0, posinf=0.0, neginf=0.0)
                    part.write_back(output)

    @contextmanager
    def observed(self, block: nn.Module, observe: dict[str, Observe]) -> Iterator[None]:
        """Pass the input of each linear, named as within the layer, to `observe[name]` within the context.

        Where a norm follows the linear, `observe[name]` also gets the weights of its tokens.
        """
        after = {self.family.output_proj(m): self.wiring.norm_after(m) for m in (ATTENTION, FFN)}

        def make_hook(name: str, see: Observe) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            norm = after.get(name)
            module = None if norm is None else block.get_submodule(norm)

            def pass_on(linear: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                # What a hook returns would replace the output.
                if module is None:
                    see(arguments[0])
                else:
                    see(arguments[0], token_weights(module, output))

            return pass_on

        hooks = [block.get_submodule(name).register_forward_hook(make_hook(name, see)) for name, see in observe.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run_sublayer(self, block: nn.Module, layer: int, sublayer: str, part: Tensor) -> Tensor:
        """The residual stream right after one sublayer of the layer: part + scale · after(sublayer(before(part))).

        part: [windows, tokens, hidden_size], hidden states before the sublayer, on the device; of an FFN that is
        parallel to the attention, those before the layer, and the result then has the attention's output too. The two
        halves of a layer, each given what `step` leaves, are the layer.
        """
        result = part
        if sublayer == FFN and self.wiring.parallel:
            result = part + self._update(block, layer, ATTENTION, part)
        result = result + self._update(block, layer, sublayer, part)
        return torch.nan_to_num(result, nan=0.0, posinf=0.0, neginf=0.0) if self.allow_nonfinite else result

    def step(self, block: nn.Module, layer: int, sublayer: str, part: MicroBatch) -> Tensor:
        """`run_sublayer` on a micro-batch, which becomes what the next sublayer is given."""
        result = self.run_sublayer(block, layer, sublayer, part.value)
        if self.advances(sublayer):
            part.write_back(result)
        return result

    def advances(self, sublayer: str) -> bool:
        """Whether the next sublayer reads the stream after this one: not after an attention parallel to its FFN."""
        return sublayer == FFN or not self.wiring.parallel

    def _update(self, block: nn.Module, layer: int, sublayer: str, part: Tensor) -> Tensor:
        """What a sublayer adds to the stream."""
        family = self.family
        before, after = self.wiring.norm_before(sublayer), self.wiring.norm_after(sublayer)
        normed = part if before is None else block.get_submodule(before)(part)
        if sublayer == ATTENTION:
            with self._kernels():
                output = family.attention_of(block)(hidden_states=normed, **self._context(layer))
            output = output[0] if isinstance(output, tuple) else output
        else:
            output = family.run_ffn(block, normed)
        if after is not None:
            output = block.get_submodule(after)(output)
        scale = family.scales.residual(self.config)
        return output if scale == 1 else output * scale

    def gain(self, block: nn.Module, sublayer: str) -> Tensor | None:
        """Factors [hidden_size] of the norm behind a sublayer's output projection; None where there is none."""
        after = self.wiring.norm_after(sublayer)
        return None if after is None else norm_gain(block.get_submodule(after), self.family.norm)

    def _context(self, layer: int) -> dict[str, Any]:
        """What a layer, or its attention, is given beside hidden states."""
        kind = self.family.kind(self.config, layer)
        context = {"attention_mask": self._mask(layer), "position_ids": self.positions}
        return context if self._rotary[kind] is None else context | {"position_embeddings": self._rotary[kind]}

    def _kernels(self) -> AbstractContextManager[None]:
        return fused_rotary(self.family) if self.fused else nullcontext()

    def _mask(self, layer: int) -> Tensor | None:
        """transformers' mask of the layer: None where sdpa is causal by itself, a sliding window where shorter."""
        kind = self.family.kind(self.config, layer)
        if kind == LINEAR:  # without padding it needs none
            return None
        if kind not in self._masks:
            make = create_sliding_window_causal_mask if kind == SLIDING else create_causal_mask
            # By position: the name of the fourth, the cache, differs between versions.
            self._masks[kind] = make(self.config, self._row, None, None, self.positions)
        return self._masks[kind]


def layer_name(family: Family, layer: int, sublayer: str) -> str:
    """Name an output projection for errors and reports: layer 3 (self_attn.o_proj)."""
    return f"layer {layer} ({family.output_proj(sublayer)})"
