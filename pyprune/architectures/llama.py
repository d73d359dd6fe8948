"""Llama 1 to 3 and everything saved as `model_type: llama`."""

from .family import Family

LLAMA = Family(name="llama", prefix="Llama", gguf=("llama", "deci"), remote_code=True, vllm=True)
