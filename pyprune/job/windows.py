"""The token windows of a run. Those sampled from the model are cached: another ratio need not load it whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..calibration.source import SELF, Text, TokenSource
from ..calibration.text import load_tokenizer
from ..calibration.windows import checked_windows, fit_length
from ..checkpoint import ModelInMemory, ModelSource, digest, load_cached, save_cached
from ..errors import InputError
from ..methods import Method
from ..runtime import distributed
from ..runtime.environment import environment
from ..runtime.progress import Progress
from .config import PruneConfig


class TextJob(Protocol):
    """The part of a job that windows are made from."""

    options: PruneConfig
    method: Method
    reader: ModelSource
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    warnings: list[str]
    cache: Path | None
    model_fingerprint: str

    def accepts(self, path: Path, metadata: dict[str, str]) -> bool: ...

    def source(self, digests: dict[str, str] | None = None) -> dict[str, str]: ...


def check_texts(job: TextJob) -> None:
    """InputError: there is no text where the method needs one, or no tokenizer where a text needs it."""
    config, texts = job.options, []
    if job.method.needs_text:
        if config.calibration is None:
            raise InputError(
                f"method {job.method.name} looks at activations: give --calibration FILE (.txt or .jsonl), "
                f"or --calibration {SELF} for text sampled from the model itself"
            )
        texts.append(config.calibration)
    if config.evaluation is not None:
        texts.append(config.evaluation.text)
    origin = job.reader.origin
    if isinstance(origin, ModelInMemory) and not all(isinstance(text, Tensor) or _sampled(text) for text in texts):
        load_tokenizer(origin)


def run_calibration_windows(job: TextJob) -> Tensor:
    """Windows of the calibration text, int64 [samples, sequence_length]."""
    config = job.options
    assert config.calibration is not None
    distributed.check_windows(config.samples)
    source, progress = _source(job, config.calibration), _progress(job)
    samples, length, seed = config.samples, config.sequence_length, config.seed
    return _cached(job, source, (samples, length, seed), lambda: source.calibration(samples, length, seed, progress))


def run_evaluation_windows(job: TextJob) -> Tensor | None:
    """Windows of the evaluation text, int64 [windows, sequence_length]; None without an evaluation."""
    evaluation = job.options.evaluation
    if evaluation is None:
        return None
    seed = job.options.seed + 1  # sampled text must not be the text of the calibration
    source, progress = _source(job, evaluation.text), _progress(job)
    most, length = evaluation.max_windows, evaluation.sequence_length
    return _cached(job, source, (most, length, seed), lambda: source.evaluation(length, most, seed, progress))


def fitted_length(job: TextJob, length: int, typed: bool) -> int:
    """A window's length within the model's positions; that a default was cut becomes a warning of the job."""
    length, note = fit_length(length, typed, job.reader.config)
    if note is not None:
        job.warnings.append(note)
    return length


def _sampled(text: Text) -> bool:
    return isinstance(text, str) and text == SELF


def _source(job: TextJob, text: Any) -> TokenSource:
    reader = job.reader
    return TokenSource(text, reader.origin, reader.config, job.device, job.dtype, job.options.trust_remote_code)


def _progress(job: TextJob) -> Callable[[int, int], None]:
    return lambda done, total: job.progress("sampling text", done, total)


def _cached(
    job: TextJob, source: TokenSource, sizes: tuple[int | None, int, int], make: Callable[[], Tensor]
) -> Tensor:
    if not source.sampled or job.cache is None:
        return make()
    samples, length, _ = sizes
    key = {
        "model": job.model_fingerprint,
        "windows": list(sizes),
        "dtype": str(job.dtype),
        "device": job.device.type,
        "environment": environment(job.device),
    }
    path = job.cache / f"text-{digest(key)}.safetensors"
    with distributed.main_process_first():  # the other processes then find the file
        if path.is_file():
            tensors, metadata = load_cached(path, "sampled text", key)
            if job.accepts(path, metadata):
                return checked_windows(path, tensors, samples, length, job.reader.config.vocab_size)
        windows = make()
        # The whole model was read for it, so its digests cost no disk.
        digests = job.reader.all_digests()
        job.reader.content.expect(digests, str(path))
        save_cached({"windows": windows}, path, job.source(digests), key)
        return windows
