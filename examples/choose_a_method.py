"""List the methods, estimate their cost, and compare the perplexity of two of them at the same ratio.

Change TEXT to a .txt of your domain; "self" samples text from the model."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pyprune

MODEL, TEXT = Path(__file__).parent.parent / "models" / "llama-6m-gqa", "self"
SIZES = {"samples": 32, "sequence_length": 64}

for name, method in pyprune.list_methods().items():
    print(f"{name:10} {method['summary']}")

with TemporaryDirectory() as folder:
    for name in ("flap", "obs"):
        estimate = pyprune.estimate(MODEL, name, 0.3, **SIZES)
        output = Path(folder, name)
        pyprune.prune(MODEL, output, name, 0.3, calibration=TEXT, **SIZES)
        result = pyprune.evaluate(output, TEXT, reference=MODEL, sequence_length=64, max_windows=16)
        print(f"{name}: about {estimate.seconds:.1f} s estimated, perplexity {result['perplexity']:.2f}")
