"""pyprune: structured pruning of large language models on one GPU.

`import pyprune` registers the classes of pruned models, so that
`transformers.AutoModelForCausalLM.from_pretrained(folder)` loads what `pyprune prune` wrote. That imports transformers
and its models. PYPRUNE_REGISTER=0 leaves it out, for those who want `pyprune.ops` alone; where transformers is not
installed there is nothing to register with, and `pyprune.ops` works as well.
"""

import importlib.util
import os

from .runtime import stopping

if stopping.is_program():  # importing the libraries takes seconds, in which Ctrl-C should be no traceback
    stopping.guard_start()

from .errors import InputError
from .runtime.streams import reserve_descriptors

if stopping.is_program():
    reserve_descriptors()
if os.environ.get("PYPRUNE_REGISTER", "1") != "0" and importlib.util.find_spec("transformers") is not None:
    from . import modeling as modeling

__version__ = "0.1.0"
__all__ = ["InputError", "modeling"]
