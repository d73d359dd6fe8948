"""Configuration of a pruning run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..calibration import CONCATENATE
from ..calibration.source import Text
from ..checkpoint import SHARD_SIZE
from ..errors import InputError
from ..estimation.target import Target
from ..runtime import distributed


@dataclass(frozen=True)
class EvaluationConfig:
    """Perplexity before and after, for the report: a text (or `self`) in consecutive windows."""

    text: Text
    sequence_length: int = 1024
    max_windows: int | None = None
    fits: bool = False  # cut the windows to the model's positions where those are fewer, with a warning


@dataclass(frozen=True)
class PruneConfig:
    """Settings of `pyprune prune`. Sizes in windows and tokens; `ratio` of the decoder linears' parameters.

    model: a folder or a hub id; the name of a model in memory, which alone needs no output.
    """

    model: str
    output: Path | None
    method: str
    ratio: float | None  # None: the one that `target` or the method's pattern says
    method_options: dict[str, Any] = field(default_factory=dict)
    calibration: Text | None = None  # one text, or several as pairs (text, share)
    samples: int = 128
    sequence_length: int = 2048
    fits: bool = False  # cut the windows to the model's positions where those are fewer, with a warning
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    cache: Path | None = None
    resume: bool = False
    allow_other_bits: bool = False  # resume where threads, processor or versions differ from the run's beginning
    allow_nonfinite: bool = False
    trust_remote_code: bool = False
    evaluation: EvaluationConfig | None = None
    device_memory: int | None = None  # bytes of a CUDA device that the run stays below
    target: Target | None = None  # size of the output, in place of a ratio
    shard_size: int = SHARD_SIZE  # bytes of tensors in a file of the output, unless it is a single tensor
    verify: bool | None = False  # load the output anew and compare its logits; None: unless it is large
    packing: str = CONCATENATE
    text_column: str | None = None  # of rows; None: `text`, else `messages` or `conversations`


def check_same_config(config: PruneConfig) -> None:
    """Raise InputError where this process of several was started with other options than the first."""
    if distributed.world_size() == 1:
        return
    own = _comparable(config)
    first = distributed.broadcast_object(lambda: own)
    for name, value in own.items():
        if value != first[name]:
            raise InputError(
                f"process {distributed.rank()} was started with other options than process 0: {name} is {value}, not "
                f"{first[name]}"
            )


def _comparable(config: PruneConfig) -> dict[str, str]:
    """Options by name as texts. Of tensors and documents that are given in Python only the type is compared."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values |= {f"method option {name}": value for name, value in values.pop("method_options").items()}
    if config.evaluation is not None:
        values["evaluation"] = config.evaluation.text
    return {name: repr(value) if _is_plain(value) else type(value).__name__ for name, value in values.items()}


def _is_plain(value: Any) -> bool:
    """Whether a value, or all of a list or mapping, is a number, a text, a path, or None."""
    if isinstance(value, Mapping):
        return all(_is_plain(own) for pair in value.items() for own in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | Path)
