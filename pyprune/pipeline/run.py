"""One run: from a model and a text to a smaller checkpoint folder, or to a smaller model in memory."""

import errno
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import (
    JOURNAL,
    CheckpointWriter,
    LoadedModel,
    changes,
    check_disk_space,
    check_output_free,
    prove_files,
)
from ..checkpoint.memory_writer import MemoryWriter
from ..checkpoint.null_writer import NullWriter
from ..errors import InputError, VerificationError
from ..job.config import PruneConfig
from ..job.job import Job
from ..job.record import FILE, PruneRecord, read_record
from ..passes import make_passes
from ..passes.train_masks import training_file
from ..runtime import distributed
from ..runtime.device import memory_limit, oom_summary
from ..runtime.environment import split
from ..runtime.faults import explain, is_limit
from ..runtime.progress import Progress, silent
from .finalize import finalize, finalize_in_memory

logger = logging.getLogger(__name__)


def prune(options: PruneConfig, progress: Progress = silent, model: LoadedModel | None = None) -> PruneRecord:
    """Prune a checkpoint, or a model in memory; returns the record (what was written to plan.json).

    A model in memory without an output is pruned in memory: nothing is written, and the result is `pruned_model`.

    Raises InputError for anything wrong with the arguments or the input; then nothing is left behind. A run
    that was killed, ran out of disk space or device memory, or met a file that could not be read leaves
    `<output>.partial` with all finished layers, which `resume` finishes; all but the first are InputErrors too. One
    that ends before its first layer is finished leaves nothing.

    Within `distributed.process_group` every process calls it with the same options; the first one writes.
    """
    output = options.output
    finished = output is not None and options.resume and (output / FILE).is_file()
    if output is not None and not finished:
        check_output_free(output)  # before the windows, which may cost a whole model's sampling
    threads = torch.get_num_threads()
    try:
        job = Job(options, progress, model)
        if output is None:
            return _run_in_memory(job)
        return _finished(job, output) if finished else _run(job, output)
    finally:
        torch.set_num_threads(threads)  # a resumed run takes those that it began with


def _run_in_memory(job: Job) -> PruneRecord:
    writer = MemoryWriter()
    with _explained(job, writer):
        passes = make_passes(job, writer)
        with memory_limit(job.device, job.options.device_memory):
            outcome = passes.execute()
        return finalize_in_memory(job, writer, passes, outcome)


def _run(job: Job, output: Path) -> PruneRecord:
    backends = ", ".join(f"{name} {backend}" for name, backend in job.backends.items())
    logger.info("%s at ratio %.6g on %s in %s", job.method.name, job.ratio, job.device, job.dtype)
    logger.info("micro-batches of %d windows; backends: %s", job.memory.batch, backends or "none")
    writer = _writer(job, output)
    fresh = not job.begun
    try:
        with _explained(job, writer):
            passes = make_passes(job, writer)
            writer.begin()
            try:
                with memory_limit(job.device, job.options.device_memory):
                    outcome = passes.execute()
                writer.flush()
            except InputError as error:
                if fresh and not is_limit(error.__cause__):  # this model cannot be pruned so: nothing to resume
                    writer.discard()
                raise
            record = None
            with distributed.main_process_first():
                if distributed.is_main_process():
                    record = finalize(job, writer, passes, outcome)
            written = distributed.broadcast_object(lambda: record)
            assert written is not None
            return written
    except BaseException:
        writer.settle()
        if fresh and not _worth_resuming(writer):
            writer.discard()
        raise
    finally:
        writer.close()


def _worth_resuming(writer: CheckpointWriter) -> bool:
    """Return whether a layer is finished, or masks are trained in part; the statistics of layers are in the cache."""
    training = training_file(writer)
    return any(part > 0 for part in writer.done) or (training is not None and training.exists())


@contextmanager
def _explained(job: Job, writer: CheckpointWriter) -> Iterator[None]:
    """Turn a lack of disk, memory or files into an InputError that says how to continue."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = error.filename if job.options.output is None else writer.partial
            raise InputError(
                f"{place}: no space left on the device; free some and repeat{_resuming(writer)}"
            ) from error
        _raise_limit(error, writer)
        if error.filename is None:
            raise  # a closed terminal, say
        raise InputError(f"{error.filename}: {error.strerror}; {_kept(writer)}repeat{_resuming(writer)}") from error
    except InputError as error:
        if error.__cause__ is not None and is_limit(error.__cause__):
            _raise_limit(error.__cause__, writer)
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{job.device}: out of memory: {oom_summary(error)}; {_kept(writer)}free some and "
            f"repeat{_resuming(writer)}, or start anew with a smaller --device-memory"
        ) from error
    except (MemoryError, RuntimeError) as error:
        _raise_limit(error, writer)
        raise


def _raise_limit(error: BaseException, writer: CheckpointWriter) -> None:
    """InputError if the error is a limit of the system that can be raised."""
    found = explain(error)
    if found is not None and found[1] == 2:
        raise InputError(f"{found[0]}; {_kept(writer)}repeat{_resuming(writer)}") from error


def _kept(writer: CheckpointWriter) -> str:
    writer.settle()
    return f"{writer.partial} keeps the finished layers: " if _worth_resuming(writer) else ""


def _resuming(writer: CheckpointWriter) -> str:
    writer.settle()
    return " with --resume" if _worth_resuming(writer) else ""


def _finished(job: Job, output: Path) -> PruneRecord:
    """Return the record of an output that is whole and equal to the job's."""
    record = read_record(output)
    try:
        asked, _ = split(changes(record.identity, json.loads(json.dumps(job.identity))))
        source, checksums = record.source, record.checksums
        moved = source["files"] != job.source_files
        changed = job.reader.differing(source["digests"]) if moved else None
        if not asked and changed is None:
            prove_files(output, checksums)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{output / FILE}: not a plan of pyprune ({error!r}); name another output") from error
    except VerificationError as error:
        raise InputError(f"{output}: finished, but damaged since ({error}); delete it, and prune anew") from error
    if asked:
        said = "; ".join(asked.values())
        raise InputError(f"{output}: finished already, with other settings: {said}; name another output")
    if changed is not None:
        raise InputError(
            f"{job.reader.origin}: the checkpoint has changed since {output} was made of it (tensor {changed}); name "
            "another output"
        )
    if job.options.evaluation is not None and record.evaluation is None:
        raise InputError(f"{output}: finished already, without an evaluation; use `pyprune evaluate` on it")
    (output / JOURNAL).unlink(missing_ok=True)
    return record


def _writer(job: Job, output: Path) -> CheckpointWriter:
    """Make this process's writer: the first process writes, the others know the parts that were there before."""
    if not distributed.is_main_process():
        return NullWriter(output, distributed.broadcast_object(dict))
    source: dict[str, Any] = {"files": job.source_files, "digests": {}}
    if job.method.training is not None and not job.begun:
        source["digests"] = job.reader.all_digests()  # training sees the whole model, and its state may outlive a kill
    writer = CheckpointWriter(output, job.identity, job.options.resume, source)
    try:
        check_disk_space(writer.output, _bytes_to_write(job, writer))
        _compare_source(job, writer)
        distributed.broadcast_object(lambda: writer.done)
    except BaseException:
        writer.close()
        raise
    return writer


def _compare_source(job: Job, writer: CheckpointWriter) -> None:
    """Refuse to go on with layers of another checkpoint: at once where its files are not those, else as it is read."""
    sources, before = writer.sources(), writer.head["source"]
    changed = job.reader.differing(sources) if before.get("files") != job.source_files else None
    if changed is not None:
        raise InputError(
            f"{job.reader.origin}: the checkpoint has changed since {writer.partial} was begun (tensor {changed}); "
            "delete that folder to start anew"
        )
    before["files"] = job.source_files
    job.reader.content.expect(sources, str(writer.partial))


def _bytes_to_write(job: Job, writer: CheckpointWriter) -> int:
    copied = [*job.reader.outside_layers(), *job.reader.beside]
    outside = sum(job.reader.tensors[n].bytes for n in copied)
    removed = job.ratio * (job.reader.bytes - outside) if job.method.shrinks else 0.0
    return max(0, int(job.reader.bytes - removed) - writer.tensor_bytes)
