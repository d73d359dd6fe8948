"""Perplexity of a model by transformers alone: `python -P stock_perplexity.py MODEL WINDOWS [--import MODULE]`.

For benchmarks/loaders.py: nothing of pyprune is imported unless MODULE says so. WINDOWS is a safetensors file with
`ids`, int64 [windows, tokens]. Prints exp of the mean over windows of each window's mean cross-entropy, and the class.
"""

import argparse
import importlib
import json
import sys

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

BATCH = 4  # windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("windows")
    parser.add_argument("--import", dest="module", help="a module to import first")
    arguments = parser.parse_args()
    if arguments.module:
        importlib.import_module(arguments.module)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, local_files_only=True).eval()
    if not arguments.module and "pyprune" in sys.modules:
        sys.exit("pyprune was imported")
    losses = []
    with torch.inference_mode():
        for ids in load_file(arguments.windows)["ids"].split(BATCH):
            logits = model(input_ids=ids, use_cache=False).logits
            for window, own in zip(ids, logits, strict=True):
                losses.append(F.cross_entropy(own[:-1].float(), window[1:]).double())
    print(json.dumps({"class": type(model).__name__, "perplexity": torch.stack(losses).mean().exp().item()}))


if __name__ == "__main__":
    main()
