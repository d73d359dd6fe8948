"""Registers the classes of pruned models with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .config import pruned_config
from .pruned import PRUNED_CLASSES
from .selected import SELECTED_CLASSES, selected_config

for _config, _model, _causal_lm in (*PRUNED_CLASSES.values(), *SELECTED_CLASSES.values()):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)

__all__ = ["PRUNED_CLASSES", "SELECTED_CLASSES", "pruned_config", "selected_config"]
