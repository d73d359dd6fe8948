"""The token windows of a run. Those sampled from the model are cached: another ratio need not load it whole."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..calibration.mixture import interleaved, parts_of
from ..calibration.source import SELF, ReadWindows, TokenSource, described, is_self
from ..calibration.text import load_tokenizer
from ..calibration.windows import checked_windows, fingerprint, fit_length
from ..checkpoint import ModelInMemory, ModelSource, digest, load_cached, save_cached
from ..errors import InputError
from ..methods import Method
from ..runtime import distributed
from ..runtime.environment import environment
from ..runtime.progress import Progress
from .config import PruneConfig
from .record import CalibrationSource

T = TypeVar("T")


class TextJob(Protocol):
    """The part of a job that windows are made from."""

    options: PruneConfig
    method: Method
    reader: ModelSource
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    warnings: list[str]
    begun: dict[str, Any]
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
                f"method {job.method.name} looks at activations: give --calibration TEXT (a file, a data set of the "
                f"hub, builtin), or --calibration {SELF} for text sampled from the model itself"
            )
        texts += [part.text for part in parts_of(config.calibration, config.samples)]
    if config.evaluation is not None:
        texts.append(config.evaluation.text)
    origin = job.reader.origin
    if isinstance(origin, ModelInMemory) and not all(isinstance(text, Tensor) or is_self(text) for text in texts):
        load_tokenizer(origin)


@dataclass(frozen=True)
class CalibrationText:
    """Windows to calibrate on, int64 [windows, sequence_length], and an entry of plan.json for each text."""

    windows: Tensor
    sources: list[CalibrationSource]


def run_calibration_windows(job: TextJob) -> CalibrationText:
    """Windows of the calibration texts. InputError: one cannot be read or is too short."""
    config = job.options
    assert config.calibration is not None
    distributed.check_windows(config.samples)
    length, seed = config.sequence_length, config.seed
    windows: list[Tensor] = []
    sources: list[CalibrationSource] = []
    for part in parts_of(config.calibration, config.samples):
        read = _read(job, part.text, part.windows, length, seed)
        name = described(part.text)
        entry: CalibrationSource = {
            "text": name,
            "share": part.share,
            "windows": len(read.ids),
            "fingerprint": read.fingerprint,
        }
        if read.revision is not None:
            entry["revision"] = read.revision
        sources.append(entry)
        windows.append(read.ids)
        if len(read.ids) < part.windows:
            job.warnings.append(
                f"{len(read.ids)} calibration windows of {length} tokens, not {part.windows}: {name} has no more text"
            )
    distributed.check_windows(sum(map(len, windows)))
    _check_unchanged(job, sources)
    return CalibrationText(interleaved(windows), sources)


def _check_unchanged(job: TextJob, sources: list[CalibrationSource]) -> None:
    """InputError: a resumed run began with another text of that place among as many."""
    begun = job.begun.get("identity", {}).get("sources")
    if isinstance(begun, list) and len(begun) == len(sources):
        for entry, fingerprint in zip(sources, begun, strict=True):
            if entry["fingerprint"] != fingerprint:
                raise InputError(
                    f"{entry['text']}: not the text that this run began with, or read to another length: restore it "
                    "and repeat the first command, or start anew without --resume"
                )


def run_evaluation_windows(job: TextJob) -> Tensor | None:
    """Windows of the evaluation text, int64 [windows, sequence_length]; None without an evaluation."""
    evaluation = job.options.evaluation
    if evaluation is None:
        return None
    seed = job.options.seed + 1  # sampled text must not be the text of the calibration
    source, progress = _source(job, evaluation.text), _progress(job)
    most, length = evaluation.max_windows, evaluation.sequence_length
    if source.sampled:
        return _cached(job, (most, length, seed), lambda: source.evaluation(length, most, seed, progress))
    return _by_main_process(lambda: source.evaluation(length, most, seed))


def _read(job: TextJob, text: Any, samples: int, length: int, seed: int) -> ReadWindows:
    """Windows of one calibration text: sampled ones from the cache, others as the first of several processes reads."""
    source, progress = _source(job, text), _progress(job)
    if source.sampled:
        windows = _cached(job, (samples, length, seed), lambda: source.calibration(samples, length, seed, progress))
        return ReadWindows(windows, fingerprint(windows))
    return _by_main_process(lambda: source.read_calibration(samples, length, seed))


def _by_main_process(read: Callable[[], T]) -> T:
    """Read in the first of several processes for all: a pipe is read once, a data set of the hub fetched once."""
    box: list[T] = []
    with distributed.main_process_first():  # however long the reading takes
        if distributed.is_main_process():
            box.append(read())
    return distributed.broadcast_object(lambda: box[0])


def fitted_length(job: TextJob, length: int, typed: bool) -> int:
    """A window's length within the model's positions; that a default was cut becomes a warning of the job."""
    length, note = fit_length(length, typed, job.reader.config)
    if note is not None:
        job.warnings.append(note)
    return length


def _source(job: TextJob, text: Any) -> TokenSource:
    reader = job.reader
    options = job.options
    return TokenSource(
        text,
        reader.origin,
        reader.config,
        job.device,
        job.dtype,
        options.trust_remote_code,
        options.packing,
        options.text_column,
    )


def _progress(job: TextJob) -> Callable[[int, int], None]:
    return lambda done, total: job.progress("sampling text", done, total)


def _cached(job: TextJob, sizes: tuple[int | None, int, int], make: Callable[[], Tensor]) -> Tensor:
    if job.cache is None:
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
