"""Registers the classes of pruned models with transformers' Auto classes."""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..architectures import Family, for_every_family
from ..errors import InputError
from .config import pruned_config
from .heads import register_heads
from .indices import CheckedModel
from .pruned import PRUNED_CLASSES, pruned_classes
from .selected import SELECTED_CLASSES, selected_classes, selected_config


def _register(family: Family) -> None:
    """Make the family's two kinds of classes and register them. InputError: this transformers lacks the family."""
    try:
        PRUNED_CLASSES[family.name] = pruned_classes(family)
        if family.selects_channels:
            SELECTED_CLASSES[family.name] = selected_classes(family)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"family {family.name}: transformers {transformers.__version__} has no such classes ({error}); "
            "upgrade it, or uninstall the package that registers the family"
        ) from error
    for classes, bases in ((PRUNED_CLASSES, ()), (SELECTED_CLASSES, (CheckedModel,))):
        if family.name not in classes:
            continue
        config, model, causal_lm = classes[family.name]
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
        register_heads(family, config, *bases)


for_every_family(_register)

__all__ = ["PRUNED_CLASSES", "SELECTED_CLASSES", "pruned_config", "selected_config"]
