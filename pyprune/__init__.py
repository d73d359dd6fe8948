"""pyprune: structured pruning of large language models on one GPU.

`import pyprune` registers the classes of pruned models, so that
`transformers.AutoModelForCausalLM.from_pretrained(folder)` loads what `pyprune prune` wrote.
"""

from . import modeling as modeling
from .errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "modeling"]
