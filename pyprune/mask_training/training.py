"""Loop that trains masks on a text: order, progress, and resuming a killed one."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from ..checkpoint import load_cached, metadata_of, save_cached
from ..errors import InputError

History = list[tuple[float, float]]  # by step: loss in nats a token, share of the decoder linears kept

FILE = "training.safetensors"  # in the unfinished output
SAVE_SECONDS = 60.0  # between two checkpoints: the state of a 7B model's hypernetwork is 1.3 GB
SHOWN_STEPS = 20  # over which the loss that is shown is averaged


class Learner(ABC):
    """Learner of masks: their parameters and the optimiser's state. `windows`: int64 [windows, tokens]."""

    windows: Tensor

    @abstractmethod
    def step(self, chosen: Tensor, number: int) -> tuple[float, float]:
        """Learn from the windows of the indices `chosen` [rows], int64; returns the loss and the share kept.

        `number` counts steps from 0: whatever is drawn follows from it and the seed, so that no state of a random
        generator has to be kept.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Tensors that later steps depend on, by name."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the learner that `state` was taken from."""


def train(
    learner: Learner,
    steps: int,
    rows: int,
    seed: int,
    file: Path | None,
    progress: Callable[[str, int, int], None],
) -> History:
    """Train `steps` steps over the learner's windows, `rows` each; every epoch is shuffled anew.

    The state is kept in `file` about once a minute and at the end, and read from there if it exists, after which the
    steps that it has not seen give the same result; None keeps none. InputError: a damaged file, or a loss that is not
    finite.
    """
    history: History = []
    if file is not None and file.is_file():
        history = _resume(learner, file)
    saved = monotonic()
    for number in range(len(history), steps):
        history.append(learner.step(window_indices(number * rows, rows, len(learner.windows), seed), number))
        if not math.isfinite(history[-1][0]):
            raise InputError(
                f"the loss is {history[-1][0]} at step {number + 1}: the weights are damaged, or the dtype overflows"
            )
        loss = math.fsum(one for one, _ in history[-SHOWN_STEPS:]) / min(SHOWN_STEPS, len(history))
        progress(f"train: loss {loss:.3f}, kept {history[-1][1]:.3f}", number + 1, steps)
        if file is not None and (monotonic() - saved >= SAVE_SECONDS or number + 1 == steps):
            save_cached(learner.state(), file, {"history": json.dumps(history)})
            saved = monotonic()
    return history


def _resume(learner: Learner, file: Path) -> History:
    state, metadata = load_cached(file, "training state", finite=False)
    try:
        history = [(float(loss), float(kept)) for loss, kept in metadata_of(metadata, "history", file)]
        learner.restore(state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{file}: a damaged training state ({error}); delete it") from error
    return history


def window_indices(first: int, count: int, windows: int, seed: int) -> Tensor:
    """Windows of draws `first` to `first + count - 1` of an endless series: a permutation for each epoch."""
    chosen = []
    for draw in range(first, first + count):
        epoch, place = divmod(draw, windows)
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(step_seed(seed, epoch)))
        chosen.append(int(order[place]))
    return torch.tensor(chosen)


def step_seed(seed: int, number: int) -> int:
    """A seed for one step: those of neighbouring steps and seeds share nothing (Knuth's multiplicative hash)."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 1) % 2**63


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser whose state is tensors, by `<parameter>.<name>`."""
    return {
        f"{number}.{name}": value.detach().clone()
        for number, own in optimizer.state_dict()["state"].items()
        for name, value in own.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser, made anew with the same options, the state that `optimizer_tensors` took."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**whole, "state": state})
