"""The round-trip proof: what was written, loaded anew by its target's loader, gives the logits of its source."""

import importlib.util
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import CheckpointReader, ModelSource
from ..errors import InputError, VerificationError
from ..forward.layer_forward import LayerForward
from ..runtime.device import free_memory
from ..runtime.progress import Progress, silent
from .logits_worker import PARENT

TOKENS = 64
_CPU, _FLOAT32 = torch.device("cpu"), torch.float32
_WORKER = Path(__file__).with_name("logits_worker.py")


class Verification(TypedDict):
    """What a round trip showed, or the reason why there was none.

    max_difference, tolerance: of logits, the largest of which in size is max_logit, on `tokens` tokens.
    """

    verified: bool
    reason: NotRequired[str]
    loader: NotRequired[str]
    tokens: NotRequired[int]
    max_difference: NotRequired[float]
    max_logit: NotRequired[float]
    tolerance: NotRequired[float]


Rounding = Callable[[Tensor], Tensor]
Change = Callable[[int, nn.Module], None]


# Largest |Δlogit| allowed, as a share of the largest |logit|. Both sides have the same weights and compute in float32,
# but may add in another order: each of a layer's sums of d products then differs by about 2^-24 √d of its size, which
# is 8e-6 at d = 16384, and over the 160 such sums of an 80-layer model, of independent signs, 1e-4.
TOLERANCE = 1e-4
# Two roundings of a model differ from it by as much, each in its own way. Measured on four models of 6 and 12 layers in
# f16, bf16 and q8_0 (llama-cpp-python 0.3.36, 64 tokens): llama.cpp's was 0.93 to 1.33 times the one computed here.
ROUNDING_FACTOR = 4


def verify_roundtrip(
    source: Path | ModelSource,
    output: Path,
    loader: str,
    progress: Progress = silent,
    rounding: Rounding | None = None,
    tokens: int = TOKENS,
    change: Change | None = None,
) -> Verification:
    """Compare the logits of `output`, loaded by `loader` in a fresh process, with those of the model `source`.

    loader: `transformers`, `remote-code` (both without pyprune), `pyprune` or `gguf`. On `tokens` random tokens, in
    float32 on the CPU, the source layer by layer; `change(layer, block)` makes each of its layers what the output's
    should be, where they are not the same. `rounding` is what the format does to matrices, and its engine to
    what they are multiplied by: the effect of that on the source's own logits widens the tolerance.

    Returns `verified` and either `reason` (why not), or `loader`, `tokens`, `max_difference`, `max_logit`, `tolerance`
    (of the difference). VerificationError: it does not load, or the difference is beyond the tolerance. InputError:
    the source's own logits are not finite.
    """
    reader = source if isinstance(source, ModelSource) else CheckpointReader(source)
    reason = _obstacle(output, loader, reader.dtype)
    if reason is not None:
        return {"verified": False, "reason": reason}
    length = min(tokens, reader.config.max_position_embeddings)
    ids = usable_ids(reader, length)
    expected = layered_logits(reader, ids, None, progress, change)  # [tokens, vocabulary]
    largest = expected.abs().max().item()
    if not math.isfinite(largest):
        raise InputError(f"{reader.origin}: its logits are not finite: the weights are damaged, or overflow")
    tolerance = TOLERANCE * largest
    if rounding is not None:
        tolerance += ROUNDING_FACTOR * (layered_logits(reader, ids, rounding, progress) - expected).abs().max().item()
    try:
        found = fresh_logits(output, ids, loader)
    except MemoryError:
        return {"verified": False, "reason": "the process that loaded it was killed, as when memory runs out"}
    if found.shape != expected.shape:
        shapes = f"{list(found.shape)} instead of {list(expected.shape)}"
        raise VerificationError(f"{reader.origin} as it was written, loaded by {loader}: logits of shape {shapes}")
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance:  # neither is it if NaN
        raise VerificationError(
            f"{reader.origin} as it was written, loaded by {loader}: its logits differ by up to {difference:.3g}, of "
            f"which at most {tolerance:.3g} can be rounding (the largest is {largest:.3g}); please report it"
        )
    return {
        "verified": True,
        "loader": loader,
        "tokens": length,
        "max_difference": difference,
        "max_logit": largest,
        "tolerance": tolerance,
    }


def usable_ids(reader: ModelSource, length: int) -> Tensor:
    """Random token ids, int64 [1, length], of those whose embeddings are finite: padding of a vocabulary may be NaN."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(reader.config.vocab_size, (1, length), generator=generator)
    usable = torch.isfinite(reader.embed(drawn)).all(-1)
    if bool(usable.all()):
        return drawn
    finite = torch.isfinite(reader.embed(torch.arange(reader.config.vocab_size))).all(-1).nonzero().flatten()
    if not len(finite):
        raise InputError(f"{reader.origin}: no row of its embeddings is finite: the weights are damaged")
    replacements = finite[torch.randint(len(finite), (1, length), generator=generator)]
    return torch.where(usable, drawn, replacements)


@torch.inference_mode()
def layered_logits(
    reader: ModelSource,
    ids: Tensor,
    rounding: Rounding | None = None,
    progress: Progress = silent,
    change: Change | None = None,
) -> Tensor:
    """Logits of a checkpoint in float32 on the CPU, one layer in memory at a time: [1, tokens] -> [tokens, vocabulary].

    `rounding` is applied to every matrix (not to norms and biases) and to the inputs that it multiplies; `change`: as
    in `verify_roundtrip`.
    """

    def stored(tensor: Tensor) -> Tensor:
        tensor = tensor.to(_FLOAT32)
        return rounding(tensor) if rounding is not None and tensor.dim() > 1 else tensor

    family, config = reader.family, reader.config
    forward = LayerForward(reader, ids, _CPU, _FLOAT32)
    hidden = forward.embed()
    if rounding is not None:
        hidden.data.copy_(rounding(hidden.data))
    for layer in range(reader.layers):
        progress("verify", layer, reader.layers)
        block = forward.build(((name, stored(t)) for name, t in reader.stream_layer(layer)), layer)
        if rounding is not None:
            for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
                linear.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]),))
        if change is not None:
            change(layer, block)
        forward.run(block, layer, hidden, {})
        del block  # before the next one is built
    progress("verify", reader.layers, reader.layers)
    outside = reader.read([name for name in reader.outside_layers() if name not in (family.embeddings, family.head)])
    norm = family.build_final_norm(config, {name: tensor.to(_FLOAT32) for name, tensor in outside.items()})
    name = family.embeddings if reader.tied else family.head
    rows = reader.read([name])[name].split(8192)  # of the head: what is in float32 at a time
    last = norm(hidden.data[0])
    last = last if rounding is None else rounding(last)
    logits = torch.cat([F.linear(last, stored(part)) for part in rows], dim=-1)
    bias = outside.get(family.head.removesuffix("weight") + "bias")
    return family.scales.logits(config, logits if bias is None else logits + bias.to(_FLOAT32))


def fresh_logits(model: Path, ids: Tensor, loader: str) -> Tensor:
    """Logits of a model loaded by `loader` in a fresh process: [1, tokens] -> [tokens, vocabulary] float32.

    VerificationError: it does not load. MemoryError: the process was killed from outside (SIGKILL).
    """
    with tempfile.TemporaryDirectory(prefix="pyprune-verify-") as scratch:
        given, target = Path(scratch, "ids"), Path(scratch, "logits")
        save_file({"ids": ids}, given)
        # The code of a model is copied into a cache before it is imported: not into the user's.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch, "modules"))}
        if loader in ("pyprune", "gguf"):
            path = [str(_WORKER.parents[2]), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        environment[PARENT] = str(os.getpid())
        # -P: the folder of the script has modules whose names others' packages have too.
        command = [sys.executable, "-P", str(_WORKER), loader, str(model), str(given), str(target)]
        # Whatever is raised meanwhile, a signal's Stopped as well, first kills the process and waits for its end.
        process = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if process.returncode == -signal.SIGKILL:
            raise MemoryError
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"status {process.returncode}"]
            raise VerificationError(f"{loader} does not load what was written: {lines[-1]}")
        return load_file(target)["logits"]


def _obstacle(output: Path, loader: str, stored: torch.dtype) -> str | None:
    """Why the output cannot be loaded here, if so."""
    if loader == "gguf":
        if importlib.util.find_spec("llama_cpp") is None:
            return "llama-cpp-python is not installed"
        needed = output.stat().st_size
    else:
        needed = sum(file.stat().st_size for file in output.glob("*.safetensors")) * 4 // stored.itemsize
    available = available_memory()
    if needed > available:
        return f"loading it takes {needed / 1e9:.2f} GB of memory, {available / 1e9:.2f} GB are available"
    return None


def available_memory() -> int:
    """Bytes of host memory to be had without swapping; on Linux those of cached files are."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return free_memory(_CPU)
