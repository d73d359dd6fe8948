"""Mistral 7B and its relatives: Llama's layers, with one sliding window over all layers where the config has one."""

from .declaration import FULL, SLIDING
from .family import Family

MISTRAL = Family(
    name="mistral",
    prefix="Mistral",
    kind=lambda config, layer: FULL if config.sliding_window is None else SLIDING,
    gguf=("llama", "deci"),
    remote_code=True,
    vllm=True,
)
