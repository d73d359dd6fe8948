"""Identity of a run: everything that the bits of its output and of cached statistics depend on."""

import json
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import changes, digest, partial_of
from ..errors import InputError
from ..forward.fused import OPERATORS as FORWARD_OPERATORS
from ..methods import Method
from ..ops.dispatch import choose_backend
from ..ops.tuning import operator_fingerprint
from ..runtime import distributed
from ..runtime.environment import environment, split

# Operators that read activations, in the compute type; the others work on float32 statistics.
ACTIVATION_OPERATORS = ("channel_moments", "hessian", *FORWARD_OPERATORS)
# Entries of a run's identity that cached statistics follow from too.
_CACHED = (
    *("model", "calibration", "dtype", "device", "allow_nonfinite", "batch", "processes"),
    *("torch", "transformers", "pyprune", "processor", "threads"),
)


def run_identity(device: torch.device, **entries: Any) -> dict[str, Any]:
    """Join a run's entries with those of this process: device, processor, threads, versions, number of processes."""
    identity = entries | {"device": device.type} | environment(device)
    if distributed.world_size() > 1:  # sums over blocks of windows round otherwise than a sum over all
        identity["processes"] = distributed.world_size()
    return identity


def operator_backends(method: Method, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Choose the backend of every operator that the forward and the method use: the last bits follow from it."""
    chosen = {}
    for operator in (*method.operators, *FORWARD_OPERATORS):
        # Which kernel runs may depend on sizes: those of the whole job are named by its shapes and this choice.
        activations = operator in ACTIVATION_OPERATORS
        sample = torch.empty(1, 8, dtype=dtype if activations else torch.float32, device=device)
        chosen[operator] = choose_backend(operator, sample, None if activations else (1, 1))
        tuned = operator_fingerprint(operator, device) if chosen[operator] == "triton" else None
        if tuned is not None:  # another configuration sums in another order
            chosen[operator] += f", tuned {tuned}"
    return chosen


def cache_file(
    folder: Path | None, kind: str, run: dict[str, Any], operators: tuple[str, ...], what: dict[str, Any]
) -> tuple[Path | None, dict[str, Any]]:
    """Name the file of cached statistics, if any, and what their numbers follow from.

    Args:
        folder: of the cache; None: there is none.
        kind: first part of the file's name.
        run: the run's identity.
        operators: those that compute the statistics.
        what: everything else that they depend on.
    """
    identity = {name: run[name] for name in _CACHED if name in run}
    identity |= {"backends": {name: run["backends"][name] for name in (*operators, *FORWARD_OPERATORS)}} | what
    return None if folder is None else folder / f"{kind}-{digest(identity)}.safetensors", identity


def unrepeatable(
    begun: dict[str, Any], identity: dict[str, Any], output: Path | None, allow_other_bits: bool
) -> dict[str, str]:
    """Entries of the environment in which a resumed run differs from its beginning, each in words.

    Empty where other settings differ too: the writer refuses those.

    Raises:
        InputError: there are some, and `allow_other_bits` is not given.
    """
    if not begun or output is None:
        return {}
    asked, other = split(changes(begun["identity"], json.loads(json.dumps(identity))))
    if asked or not other:
        return {}
    if not allow_other_bits:
        raise InputError(
            f"{partial_of(output)}: cannot be finished to the same bits: {'; '.join(other.values())}; resume it where "
            "it began, or add --allow-other-bits"
        )
    return other
