"""vLLM plugin: pruned checkpoints load in vLLM wherever pyprune is installed beside it.

vLLM calls `register` through the entry point group `vllm.general_plugins` in each of its processes, before it reads
a model's config.json.
"""

from ...architectures import BUILT_IN
from ...modeling import PRUNED_CLASSES

# `architectures` in config.json -> the class that vLLM builds. A string, which vLLM imports when such a model is
# loaded: importing the class here would initialize the device in every process. A family of another package may
# compute what that class does not.
MODELS = {
    causal_lm_class.__name__: f"{__name__}.model:PrunedForCausalLM"
    for _, _, causal_lm_class in (PRUNED_CLASSES[family.name] for family in BUILT_IN if family.vllm)
}


def register() -> None:
    """Make vLLM know the architectures of pruned models; any number of calls are as good as one.

    The configurations are registered with transformers' AutoConfig, which vLLM reads config.json with, by the import
    of pyprune. ImportError: there is no vLLM.
    """
    from vllm import ModelRegistry

    for architecture, model_class in MODELS.items():
        ModelRegistry.register_model(architecture, model_class)
