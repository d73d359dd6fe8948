"""transformers classes of pruned models: every layer is built from its own entry of `per_layer_config`.

Checkpoints keep the tensor names of their family; `config.json` carries transformers' own schema for models whose
layers differ. `o_proj_bias` and `down_proj_bias` say that the output projections have a (compensation) bias.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn

from ..architectures import PRUNED_PREFIX, Family, without_layers

# Family → its configuration, body and causal language model.
PRUNED_CLASSES: dict[str, tuple[Any, Any, Any]] = {}


def pruned_classes(family: Family) -> tuple[Any, Any, Any]:
    """Configuration, body and causal language model of the family's pruned models: PyPruneLlamaConfig and so on.

    They become attributes of this module, where pickle looks for a class.
    """

    own_config: Any = family.config_class
    own_model: Any = family.model_class
    own_causal_lm: Any = family.causal_lm_class

    @strict
    class Config(own_config):
        model_type = PRUNED_PREFIX + family.name
        o_proj_bias: bool = False
        down_proj_bias: bool = False

        def validate_architecture(self) -> None:
            """Accept any sizes: with `head_dim` written out, the hidden size need not be a multiple of the heads."""

    class Model(own_model):
        """The family's body with layers of different sizes."""

        config: Config

        def __init__(self, config: Any) -> None:
            with without_layers(config):
                super().__init__(config)
            layers = (family.build_layer(config, layer) for layer in range(config.num_hidden_layers))
            family.put_layers(self, nn.ModuleList(layers))
            self.post_init()

    class ForCausalLM(own_causal_lm):
        """The family's causal language model over the pruned body."""

        config: Config

        def __init__(self, config: Any) -> None:
            with without_layers(config):
                super().__init__(config)
            setattr(self, family.body, Model(config))
            self.post_init()

    classes = (Config, Model, ForCausalLM)
    for made in classes:
        made.__name__ = made.__qualname__ = f"PyPrune{family.prefix}{made.__name__}"
        globals()[made.__name__] = made
    return classes
