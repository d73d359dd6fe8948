"""Our kernels for other compression tools: statistics of any model's linear layers, and tools that run on them.

Nothing here imports a tool before its block is entered.
"""

from ..errors import InputError
from . import gptqmodel, llm_compressor
from .calibration_statistics import CalibrationStatistics, LinearStatistics
from .patching import SUPPORTED, Acceleration, Calls, Releases

__all__ = [
    "SUPPORTED",
    "Acceleration",
    "CalibrationStatistics",
    "Calls",
    "LinearStatistics",
    "Releases",
    "accelerate",
    "gptqmodel",
    "llm_compressor",
]

TOOLS = {llm_compressor.TOOL: llm_compressor.accelerated, gptqmodel.TOOL: gptqmodel.accelerated}


def accelerate(tool: str) -> Acceleration:
    """`with accelerate("llm-compressor"): oneshot(...)` or `with accelerate("gptqmodel"): model.quantize(...)`.

    Inside the block the tool's Hessians and the factors of their inverses are computed here; outside it has its own
    functions. `with ... as calls` counts what ran. Raises InputError for another tool, and on entering for a missing
    one, for one whose functions are not those of the releases in SUPPORTED, and for a second block inside.
    """
    if tool not in TOOLS:
        raise InputError(f"there is no integration for {tool!r}; there are {', '.join(TOOLS)}")
    return TOOLS[tool]()
