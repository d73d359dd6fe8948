"""Run decoder layers one at a time over hidden states, with transformers' layer classes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..architectures import ATTENTION, Family
from ..checkpoint import ModelSource
from .fused import fuse, fused_rotary, runs_fused
from .hidden_states import HiddenStates

Observe = Callable[[Tensor], object]

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
        self.windows = windows
        length = windows.shape[1]
        self.batch = batch or micro_batch(device, length)
        self.on_device = on_device
        self.config = reader.config
        self.config._attn_implementation = "sdpa"
        self.positions = torch.arange(length, device=device)[None]
        # One row in the compute type tells masks and rotary embeddings their device and type.
        row = torch.empty(1, length, 1, device=device, dtype=dtype)
        self.rotary = self.family.rotary_class(config=self.config).to(device)(row, self.positions)
        self._row = row
        self._masks: dict[bool, Tensor | None] = {}

    def embed(self) -> HiddenStates:
        """Hidden states before the first layer."""
        count, length = self.windows.shape
        size = (count, length, self.config.hidden_size)
        hidden = HiddenStates.empty(size, self.dtype, self.device, self.batch, self.on_device > 0)
        for k in range(count):
            hidden.data[k] = self.reader.embed(self.windows[k]).to(self.dtype)
        return hidden

    def copy(self, hidden: HiddenStates) -> HiddenStates:
        """A second set of hidden states with the same values."""
        return hidden.copy(self.on_device > 1)

    def build(self, tensors: Iterable[tuple[str, Tensor]], layer: int, config: Any = None) -> nn.Module:
        """Build the layer as a module on the device in the compute type; `config` is the dense one unless given."""
        with torch.device("meta"):
            block = self.family.build_layer(config or self.config, layer)
        state = {}
        for name, tensor in tensors:
            state[name] = tensor.to(self.device, self.dtype)
            del tensor  # the next one is read after this one is gone
        block.load_state_dict(state, assign=True)
        if self.fused:
            fuse(block, self.family, self.config.hidden_act)
        return block.eval()

    @torch.no_grad()
    def run(
        self, block: nn.Module, layer: int, hidden: HiddenStates, observe: dict[str, Observe], advance: bool = True
    ) -> None:
        """Run the layer over `hidden`; the input of each linear named in `observe` goes there.

        With `advance`, `hidden` is overwritten by the layer's output.
        """
        mask = self._mask(layer)
        with self.observed(block, observe), self._kernels():
            for part in hidden.micro_batches():
                output = block(
                    part.value,
                    attention_mask=mask,
                    position_ids=self.positions,
                    position_embeddings=self.rotary,
                )
                if advance:
                    if self.allow_nonfinite:
                        output = torch.nan_to_num(output, nan=0.0, posinf=0.0, neginf=0.0)
                    part.write_back(output)

    @contextmanager
    def observed(self, block: nn.Module, observe: dict[str, Observe]) -> Iterator[None]:
        """Pass the input of each linear, named as within the layer, to `observe[name]` within the context."""

        def make_hook(see: Observe) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def pass_on(linear: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                see(arguments[0])  # what a hook returns would replace the input

            return pass_on

        hooks = [block.get_submodule(name).register_forward_pre_hook(make_hook(see)) for name, see in observe.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run_sublayer(self, block: nn.Module, layer: int, sublayer: str, part: Tensor) -> Tensor:
        """The residual stream right after one sublayer of the layer: part + sublayer(norm(part)).

        part: [windows, tokens, hidden_size], hidden states before the sublayer, on the device. The two halves of a
        layer, one after the other, are the layer.
        """
        normed = block.get_submodule(self.family.norm(sublayer))(part)
        owner = block.get_submodule(self.family.output_proj(sublayer).split(".")[0])
        if sublayer == ATTENTION:
            with self._kernels():
                output, _ = owner(
                    hidden_states=normed,
                    attention_mask=self._mask(layer),
                    position_ids=self.positions,
                    position_embeddings=self.rotary,
                )
        else:
            output = owner(normed)
        result = part + output
        return torch.nan_to_num(result, nan=0.0, posinf=0.0, neginf=0.0) if self.allow_nonfinite else result

    def _kernels(self) -> AbstractContextManager[None]:
        return fused_rotary(self.family) if self.fused else nullcontext()

    def _mask(self, layer: int) -> Tensor | None:
        """transformers' mask of the layer: None where sdpa is causal by itself, a sliding window where shorter."""
        sliding = self.family.sliding(self.config, layer)
        if sliding not in self._masks:
            make = create_sliding_window_causal_mask if sliding else create_causal_mask
            # By position: the name of the fourth, the cache, differs between versions.
            self._masks[sliding] = make(self.config, self._row, None, None, self.positions)
        return self._masks[sliding]


def layer_name(family: Family, layer: int, sublayer: str) -> str:
    """Name an output projection for errors and reports: layer 3 (self_attn.o_proj)."""
    return f"layer {layer} ({family.output_proj(sublayer)})"
