"""Cost of a method on one published shape: what `pyprune methods NAME` says of time and memory."""

from typing import Any

from ..architectures import LayerShape
from ..methods import Method
from ..runtime.device import FREE_SHARE
from .memory import plan_memory
from .procedures import TrainCost, costs_of
from .sizes import Sizes
from .time import GPU_RATES, MEMORY
from .training_memory import OVERHEAD_BYTES, memory_of

# Llama-2-7B in bfloat16 on the GPU that most measurements name, with the default text.
MODEL, GPU, RATIO, SAMPLES, LENGTH = "Llama-2-7B", "h100", 0.3, 128, 2048
SHAPES = [LayerShape(4096, 128, 32, 1, 11008)] * 32
VOCABULARY = 32000


def typical_cost(method: Method) -> dict[str, Any]:
    """Estimate a run of the method: `seconds` by pass and `peak_memory_bytes`, with the `model`, `gpu` and text."""
    ratio = RATIO if method.implied_ratio is None else method.implied_ratio
    sizes = Sizes(SHAPES, method.fitted(SHAPES), ratio, SAMPLES, LENGTH, 2, 2)
    budget = int(FREE_SHARE * MEMORY[GPU])
    seconds = {name: cost.seconds(GPU_RATES[GPU]) for name, cost in costs_of(sizes).items() if cost.flops()}
    peak = plan_memory(sizes, budget).peak
    if method.training is not None:
        parameters = sum(shape.parameters for shape in SHAPES) + 2 * VOCABULARY * SHAPES[0].hidden_size
        memory = memory_of(SHAPES, parameters, VOCABULARY, method.training, LENGTH, 2)
        train = TrainCost(SHAPES, method.training, LENGTH, memory, memory.peak(False) + OVERHEAD_BYTES > budget)
        seconds["train"] = train.seconds(GPU_RATES[GPU])
        peak = max(peak, train.device_bytes())
    return {
        "model": MODEL,
        "gpu": GPU,
        "ratio": ratio,
        "samples": SAMPLES,
        "sequence_length": LENGTH,
        "seconds": {name: round(own, 1) for name, own in seconds.items() if own},
        "peak_memory_bytes": peak,
    }
