"""pyprune: structured pruning of large language models on one GPU.

    record = pyprune.prune("models/llama-6m-gqa", "smaller", ratio=0.3, calibration="self")

`import pyprune` imports neither torch nor transformers: the functions load what they need. When transformers is
imported, before or after, the classes of pruned models are registered with it, so that
`transformers.AutoModelForCausalLM.from_pretrained(folder)` loads what pyprune wrote. PYPRUNE_REGISTER=0 leaves that
out, for those who want `pyprune.ops` alone.
"""

import os
from typing import TYPE_CHECKING, Any

from .runtime import registration, stopping
from .runtime.streams import reserve_descriptors

if stopping.is_program():  # importing the libraries takes seconds, in which Ctrl-C should be no traceback
    stopping.guard_start()
    reserve_descriptors()

from .errors import InputError, VerificationError

if TYPE_CHECKING:
    from .api import estimate, evaluate, export, list_families, list_methods, prune
    from .estimation.estimate import Estimate
    from .job.record import PruneRecord

    __version__: str

if os.environ.get("PYPRUNE_REGISTER", "1") != "0":
    registration.register_with_transformers()

__all__ = [
    "Estimate",
    "InputError",
    "PruneRecord",
    "VerificationError",
    "__version__",
    "estimate",
    "evaluate",
    "export",
    "list_families",
    "list_methods",
    "prune",
]


def __getattr__(name: str) -> Any:
    """Load a public function on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("pyprune")
    elif name in __all__:
        from . import api

        value = getattr(api, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
