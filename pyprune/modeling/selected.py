"""transformers classes of DISP models: each block reads and adds to its selection of the residual stream's channels.

Checkpoints keep the tensor names of their family, with narrower matrices, and hold the indices of each layer's
selections as int32 buffers. `config.selections` says by layer how many channels each selection has.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..architectures import ATTENTION, BIAS_FLAGS, FFN, SELECTED_PREFIX, Family, without_layers
from ..architectures.channel_selection import SELECTIONS, slices
from ..ops import rms_norm_gather, scatter_add_, scatter_add_rms_norm_gather_
from .config import layered_fields
from .indices import CheckedLayer, CheckedModel

# Family → its configuration, body and causal language model.
SELECTED_CLASSES: dict[str, tuple[Any, Any, Any]] = {}


def selected_classes(family: Family) -> tuple[Any, Any, Any]:
    """Configuration, body and causal language model of the family's DISP models: PyPruneSelectedLlamaConfig and so on.

    They become attributes of this module, where pickle looks for a class.
    """

    own_config: Any = family.config_class
    own_layer: Any = family.layer_class
    own_model: Any = family.model_class
    own_causal_lm: Any = family.causal_lm_class
    norms = {sublayer: family.wiring.norm_before(sublayer) for sublayer in (ATTENTION, FFN)}

    @strict
    class Config(own_config):
        model_type = SELECTED_PREFIX + family.name
        selections: list | None = None
        o_proj_bias: bool = False
        down_proj_bias: bool = False

        def validate_architecture(self) -> None:
            """Accept any sizes: with `head_dim` written out, the hidden size need not be a multiple of the heads."""

    class Layer(CheckedLayer, own_layer):
        """The family's attention and FFN with narrower matrices, between gathers from and additions to the stream."""

        def __init__(self, config: Any, layer: int) -> None:
            super().__init__(config.per_layer_config[layer], layer)
            self.self_attn.config = config  # the one that `set_attn_implementation` changes
            self.eps = config.rms_norm_eps
            counts = config.selections[layer]
            for name, cut in slices(family).items():
                _narrow(self, name, dict(cut), counts, self._flagged(config, name))
            self.register_indices(counts, config.hidden_size, f"{family.layers}.{layer}")

        @staticmethod
        def _flagged(config: Any, name: str) -> bool:
            return any(
                name == family.output_proj(sublayer) and getattr(config, flag) for sublayer, flag in BIAS_FLAGS.items()
            )

        def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
            """Run the layer: hidden_states [batch, tokens, hidden_size]; `context` goes to the attention."""
            if not torch.compiler.is_compiling():  # the indices of a compiled model were checked on loading
                self.check_indices()
            first, second = (self.get_submodule(norms[sublayer]) for sublayer in (ATTENTION, FFN))
            x = rms_norm_gather(hidden_states, first.weight, self.eps, self.attention_in)
            update, _ = self.self_attn(hidden_states=x, **context)
            stream = hidden_states.dtype  # under autocast the updates come in a narrower type
            update = update.to(stream)
            if self._trained(hidden_states, update):
                hidden = hidden_states.index_add(-1, self.attention_out, update)
                x = rms_norm_gather(hidden, second.weight, self.eps, self.ffn_in)
                return hidden.index_add(-1, self.ffn_out, self.mlp(x).to(stream))
            # A copy: what the layer was given may be an embedding, or a hidden state that a caller keeps.
            hidden = hidden_states.clone(memory_format=torch.contiguous_format)
            x = scatter_add_rms_norm_gather_(hidden, update, self.attention_out, second.weight, self.eps, self.ffn_in)
            scatter_add_(hidden, self.mlp(x).to(stream), self.ffn_out)
            return hidden

        def _trained(self, *inputs: Tensor) -> bool:
            """Return whether a gradient may be asked for: the operators that change the stream in place have none."""
            return torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.parameters()))

    class Model(CheckedModel, own_model):
        """The family's body over layers with selections."""

        config: Config
        # A device map must keep the layer on one device: it reads its norms' weights itself.
        _no_split_modules = (f"PyPruneSelected{family.prefix}Layer",)

        def __init__(self, config: Any) -> None:
            with without_layers(config):
                super().__init__(config)
            self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
            self.post_init()

    class ForCausalLM(CheckedModel, own_causal_lm):
        """The family's causal language model over that body."""

        config: Config

        def __init__(self, config: Any) -> None:
            with without_layers(config):
                super().__init__(config)
            self.model = Model(config)
            self.post_init()

    classes = (Config, Model, ForCausalLM)
    for made in (*classes, Layer):
        made.__name__ = made.__qualname__ = f"PyPruneSelected{family.prefix}{made.__name__}"
        globals()[made.__name__] = made
    return classes


def _narrow(block: Any, name: str, cut: dict[int, str], counts: dict[str, int], biased: bool) -> None:
    """Put a linear of the selections' sizes in the place of a layer's; `cut`: dimension -> selection."""
    parent, own = name.rsplit(".", 1)
    linear = block.get_submodule(name)
    rows, columns = (counts[cut[d]] if d in cut else linear.weight.shape[d] for d in (0, 1))
    narrower = nn.Linear(
        columns,
        rows,
        bias=biased or linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    setattr(block.get_submodule(parent), own, narrower)


def selected_config(
    family: Family, config: Any, counts: list[dict[str, int]], o_proj_bias: bool, down_proj_bias: bool
) -> Any:
    """Configuration of the DISP model of a dense (or pruned) one; `counts`: channels of each layer's selections."""
    config_class, _, causal_lm_class = SELECTED_CLASSES[family.name]
    return config_class(
        **layered_fields(family, config, family.shapes(config)),
        architectures=[causal_lm_class.__name__],
        selections=[{name: own[name] for name in SELECTIONS} for own in counts],
        o_proj_bias=o_proj_bias,
        down_proj_bias=down_proj_bias,
    )
