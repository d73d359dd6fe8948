"""Qwen2 and Qwen2.5: biases on q, k, v; the sliding window differs by layer (`layer_types`)."""

from .declaration import by_layer_type
from .family import Family

QWEN2 = Family(name="qwen2", prefix="Qwen2", kind=by_layer_type, gguf=("qwen2", "deci"), remote_code=True, vllm=True)
