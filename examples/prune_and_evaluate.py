"""Prune the built-in model by 30 % and compare its perplexity with the dense model's.

Writes the folder `smaller`, which transformers loads after `import pyprune`."""

from pathlib import Path

from transformers import AutoModelForCausalLM

import pyprune

DENSE = Path(__file__).parent.parent / "models" / "llama-6m-gqa"

record = pyprune.prune(DENSE, "smaller", "obs", 0.3, calibration="self", samples=32, sequence_length=64)
print(f"removed {record.ratio_met:.1%} of the decoder linears; warnings: {record.warnings or 'none'}")

result = pyprune.evaluate("smaller", "self", reference=DENSE, sequence_length=64, max_windows=16)
print(f"perplexity {result['reference_perplexity']:.2f} -> {result['perplexity']:.2f}")

model = AutoModelForCausalLM.from_pretrained("smaller")
print(f"{type(model).__name__}, {model.num_parameters():,} parameters")
