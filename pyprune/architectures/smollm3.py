"""SmolLM3: Llama's layers, of which some have no rotary embeddings, and biases and a sliding window where asked for."""

from .declaration import by_layer_type
from .family import Family

SMOLLM3 = Family(
    name="smollm3",
    prefix="SmolLM3",
    kind=by_layer_type,
    computes_llama=lambda config: all(config.no_rope_layers),
    gguf=("llama", "deci"),
    remote_code=True,
    vllm=True,
)
