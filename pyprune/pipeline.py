"""Survey, plan, prune: from a checkpoint folder and a text to a smaller checkpoint folder."""

import errno
import json
from typing import Any

import torch

from . import distributed
from .bystander import BystanderWriter
from .checkpoint import JOURNAL, CheckpointWriter, check_free, check_space, differences
from .device import memory_limit, what_ran_out
from .errors import InputError
from .finish import finish
from .job import Job
from .options import Progress, PruneOptions, silent
from .passes import make_passes
from .plan import FILE, read_plan


def prune(options: PruneOptions, progress: Progress = silent) -> dict[str, Any]:
    """Prune a checkpoint; returns the plan (what was written to plan.json).

    Raises InputError for anything wrong with the arguments or the input; then nothing is left behind. A run
    that was killed, ran out of disk space or device memory, or met a file that could not be read leaves
    `<output>.partial` with all finished layers, which `resume` finishes; all but the first are InputErrors too.

    Within `distributed.process_group` every process calls it with the same options; the first one writes.
    """
    finished = options.resume and (options.output / FILE).is_file()
    if not finished:
        check_free(options.output)  # before the windows, which may cost a whole model's sampling
    job = Job(options, progress)
    if finished:
        return _finished(job)
    writer = _writer(job)
    fresh = not writer.done
    passes = make_passes(job, writer)
    try:
        writer.begin()
        try:
            with memory_limit(job.device, options.device_memory):
                outcome = passes.execute()
            writer.flush()
        except InputError:
            if fresh:  # this model cannot be pruned so: nothing to resume
                writer.discard()
            raise
        plan: dict[str, Any] = {}
        with distributed.first_ahead():
            if distributed.is_first():
                plan = finish(job, writer, passes, outcome)
        return distributed.from_first(lambda: plan)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{writer.partial}: no space left on the device; free some and repeat with --resume"
            ) from error
        if error.filename is None:  # not a file's: a closed terminal, say
            raise
        raise InputError(
            f"{error.filename}: {error.strerror}; {writer.partial} keeps the finished layers: repeat with --resume"
        ) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{job.device}: out of memory: {what_ran_out(error)}; {writer.partial} keeps the finished layers: free "
            "some and repeat with --resume, or start anew with a smaller --device-memory"
        ) from error
    finally:
        writer.close()


def _finished(job: Job) -> dict[str, Any]:
    """The plan of an output that is already there, if it is what the job would make."""
    output = job.options.output
    try:
        plan = read_plan(output)
        changed = differences(plan["identity"], json.loads(json.dumps(job.identity)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{output / FILE}: not a plan of pyprune ({error!r}); name another output") from error
    if changed:
        raise InputError(f"{output}: finished already, with other settings: {changed}; name another output")
    if job.options.evaluation is not None and "evaluation" not in plan:
        raise InputError(f"{output}: finished already, without an evaluation; use `pyprune evaluate` on it")
    (output / JOURNAL).unlink(missing_ok=True)
    return plan


def _writer(job: Job) -> CheckpointWriter:
    """The writer of this process: of several the first one's writes, and the others know what was there before."""
    output = job.options.output
    # The first shard holds the embeddings, the last the final norm and the head, one each a layer.
    shards = job.reader.layers + 2
    if not distributed.is_first():
        return BystanderWriter(output, shards, distributed.from_first(dict))
    writer = CheckpointWriter(output, shards, job.identity, job.options.resume)
    check_space(writer.output, _bytes_to_write(job, writer))
    distributed.from_first(lambda: writer.done)
    return writer


def _bytes_to_write(job: Job, writer: CheckpointWriter) -> int:
    outside = sum(job.reader.tensors[n].bytes for n in job.reader.outside_layers())
    removed = job.ratio * (job.reader.bytes - outside) if job.method.shrinks else 0.0
    return max(0, int(job.reader.bytes - removed) - sum(entry["bytes"] for entry in writer.done.values()))
