"""Collect the Hessian and the channel moments of every decoder linear of any transformers model.

Hooks only read the inputs: the model and its output stay as they are."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune.integrations import CalibrationStatistics

MODEL = Path(__file__).parent.parent / "models" / "llama-6m-gqa"
TEXT = "The old house stood at the end of the lane, and nobody had lived there for many years. " * 20

model = AutoModelForCausalLM.from_pretrained(MODEL)
ids = AutoTokenizer.from_pretrained(MODEL)(TEXT, return_tensors="pt").input_ids[:, :256]


def is_decoder_linear(name: str, layer: torch.nn.Linear) -> bool:
    return ".layers." in name


# Layers that read the same tensor (q, k, v; gate, up) share one Hessian.
with torch.no_grad(), CalibrationStatistics(model, is_decoder_linear, moments=True, share_inputs=True) as statistics:
    model(ids)

for name, layer in statistics.items():
    variance, factor = layer.moments.variance(), layer.inverse_factor(damping=0.01).factor
    print(f"{name}: {layer.rows} rows, mean variance {variance.mean():.4f}, factor {tuple(factor.shape)}")
