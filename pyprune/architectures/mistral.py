"""Mistral 7B and its relatives: Llama's layers, with one sliding window over all layers where the config has one."""

from .family import Family

MISTRAL = Family(name="mistral", prefix="Mistral", sliding=lambda config, layer: config.sliding_window is not None)
