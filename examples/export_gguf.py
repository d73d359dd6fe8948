"""Prune the built-in model and write it as smaller.gguf for llama.cpp and Ollama.

Needs `pip install 'pyprune[gguf]'`; llama.cpp then loads the file and its logits are compared."""

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

import pyprune

MODEL = Path(__file__).parent.parent / "models" / "llama-6m-gqa"

if importlib.util.find_spec("gguf") is None:
    raise SystemExit("this example needs the package gguf: pip install 'pyprune[gguf]'")

with TemporaryDirectory() as folder:
    smaller = Path(folder, "smaller")
    pyprune.prune(MODEL, smaller, "obs", 0.3, calibration="self", samples=32, sequence_length=64)
    result = pyprune.export(smaller, "smaller.gguf", "gguf", dtype="q8_0")

before, after = result["bytes"]
print(f"smaller.gguf: {after / 1e6:.1f} MB from {before / 1e6:.1f} MB; verification: {result['verification']}")
