"""Registers the classes of pruned models with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..architectures import FAMILIES
from .config import pruned_config
from .heads import register_heads
from .indices import CheckedModel
from .pruned import PRUNED_CLASSES
from .selected import SELECTED_CLASSES, selected_config

for _classes, _bases in ((PRUNED_CLASSES, ()), (SELECTED_CLASSES, (CheckedModel,))):
    for _name, (_config, _model, _causal_lm) in _classes.items():
        AutoConfig.register(_config.model_type, _config, exist_ok=True)
        AutoModel.register(_config, _model, exist_ok=True)
        AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
        register_heads(FAMILIES[_name], _config, *_bases)

__all__ = ["PRUNED_CLASSES", "SELECTED_CLASSES", "pruned_config", "selected_config"]
