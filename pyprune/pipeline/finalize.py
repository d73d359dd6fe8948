"""Finalize a run: configuration, tokenizer, index, evaluation, record and report; then the rename."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import AutoConfig

from ..architectures import PRUNED_PREFIX
from ..calibration.source import described, is_self
from ..calibration.text import load_tokenizer
from ..calibration.tokenizer_check import NOT_COMPARED, check_tokenizer
from ..checkpoint import CheckpointWriter, Digests, ModelInMemory
from ..checkpoint.load_model import load_model
from ..checkpoint.memory_writer import MemoryWriter
from ..errors import InputError, VerificationError
from ..estimation.target import SIZE
from ..evaluation.continuations import sample_continuations
from ..evaluation.perplexity import evaluate_models, load_models
from ..evaluation.roundtrip import Verification, verify_roundtrip
from ..exporters.state_dict import check_state_dict
from ..job.job import Job
from ..job.record import (
    FORMAT,
    Calibration,
    Evaluation,
    MetTarget,
    Parameters,
    Pass,
    PruneRecord,
    TrainingHistory,
    dense_summary,
    error_curves_entry,
    parameter_counts,
    ratio_summary,
    versions,
    write_record,
)
from ..job.result import PruneResult
from ..job.run_file import write_run_file
from ..mask_training.training import FILE as TRAINING
from ..modeling.saving import save_config
from ..passes import Passes
from ..publishing.card import write_card
from ..runtime import distributed
from ..runtime.device import oom_summary

# Above, a pruning does not by itself load what it wrote: on a CPU that takes minutes.
VERIFIED_BYTES = 8 << 30


def finalize(job: Job, writer: CheckpointWriter, passes: Passes, outcome: PruneResult) -> PruneRecord:
    """Complete the partial folder, whose weights are all written, and make it the output."""
    partial = writer.partial
    config, more = outcome.config(job.reader, job.biases)
    if job.reader.wrapping is None:
        save_config(config, partial)
    else:
        job.reader.wrapping.write_config(job.reader.family, config, partial)
    part = len(writer.plan.parts) - 1  # after embeddings, layers and head
    if more and part not in writer.done:
        writer.write(part, more)
    passes.warnings += job.reader.write_companions(partial)
    writer.write_index()
    check_state_dict(partial, writer.prove(), job.reader.wrapping)
    tokenizer = check_tokenizer(job.reader.origin, partial, job.options.trust_remote_code)
    record = _record(job, passes, outcome, writer.tensor_bytes, tokenizer, writer.checksums())
    record.verification = _verify(job, partial, writer.tensor_bytes, outcome)
    if job.evaluation_windows is not None:
        try:
            with_text = tokenizer is not None and not tokenizer.startswith(NOT_COMPARED)
            record.evaluation = _evaluate(job, partial, job.evaluation_windows, with_text)
        except (InputError, torch.OutOfMemoryError) as error:
            reason = oom_summary(error) if isinstance(error, torch.OutOfMemoryError) else str(error)
            raise InputError(
                f"{reason}; the pruned model is complete all the same: repeat with --resume and without --evaluate"
            ) from error
    output = job.options.output
    assert output is not None
    origin = job.reader.origin
    source = origin if isinstance(origin, Path) else None
    record.warnings += write_card(record.to_json(), source, partial, output.absolute().name)
    record.seconds = round(perf_counter() - job.start, 3)
    write_record(record, partial)
    write_run_file(job, partial)
    from ..report.page import write_report  # here: matplotlib would take 25 MB all through the passes

    write_report(record.to_json(), partial / "report.html", str(output))
    (partial / TRAINING).unlink(missing_ok=True)
    writer.finish()
    record.output = output
    return record


def finalize_in_memory(job: Job, writer: MemoryWriter, passes: Passes, outcome: PruneResult) -> PruneRecord:
    """Make a model of the tensors that the writer was given; it becomes the record's `pruned_model`."""
    config, more = outcome.config(job.reader, job.biases)
    writer.write(job.reader.layers + 2, more)
    given = job.reader.origin
    assert isinstance(given, ModelInMemory)
    pruned = dataclasses.replace(given, name=f"{given.name}, pruned", config=config, state=writer.tensors)
    record = _record(job, passes, outcome, writer.tensor_bytes, None, {})
    if job.evaluation_windows is not None:
        record.evaluation = _evaluate(job, pruned, job.evaluation_windows, given.tokenizer is not None)
    record.pruned_model = load_model(pruned, given.device, given.dtype)
    record.seconds = round(perf_counter() - job.start, 3)
    return record


def _record(
    job: Job,
    passes: Passes,
    outcome: PruneResult,
    bytes_after: int,
    tokenizer: str | None,
    checksums: Mapping[str, Digests],
) -> PruneRecord:
    """The record of a run, not verified, before its evaluation."""
    o = job.options
    parameters = parameter_counts(job.reader, outcome.parameters(job.reader.shapes))
    layers = outcome.layers()
    return PruneRecord(
        format=FORMAT,
        identity=job.identity,
        model=o.model,
        method=job.method.name,
        options=job.method.options,
        seed=o.seed,
        calibration=_calibration(job),
        ratio=ratio_summary(job.ratio, parameters, job.method.prunable(job.reader.shapes)),
        parameters=parameters,
        dense=dense_summary(job.reader.shapes),
        layers=layers,
        threshold=outcome.threshold,
        versions=versions(),
        device=_device_name(job.device),
        dtype=str(job.dtype).removeprefix("torch."),
        backends=job.backends,
        bytes=[job.reader.bytes, bytes_after],
        passes={
            name: Pass(**meter.summary(), cached=name == "calibration" and passes.cached)
            for name, meter in passes.meters.items()
        },
        peak_memory_bytes=max(meter.peak_memory_bytes for meter in passes.meters.values()),
        nonfinite=passes.nonfinite,
        warnings=passes.warnings,
        tokenizer=tokenizer,
        unused_tensors=job.reader.unused,
        source={"files": job.source_files, "digests": job.reader.content.digests},
        checksums=dict(checksums),
        verification={"verified": False, "reason": "nothing was written"},
        seconds=0.0,
        training=_training(passes),
        target=_target(job, parameters, bytes_after),
        error_curves=error_curves_entry(passes.curves, layers) if passes.curves else None,
    )


def _calibration(job: Job) -> Calibration | None:
    o = job.options
    if job.windows is None or job.text_fingerprint is None:
        return None
    calibration: Calibration = {
        "text": described(o.calibration),
        "samples": len(job.windows),
        "sequence_length": o.sequence_length,
        "fingerprint": job.text_fingerprint,
        "packing": o.packing,
        "sources": job.sources or [],
    }
    return calibration if o.text_column is None else calibration | {"text_column": o.text_column}


def _training(passes: Passes) -> TrainingHistory | None:
    history = passes.history
    return {"loss": [loss for loss, _ in history], "kept": [kept for _, kept in history]} if history else None


def _target(job: Job, parameters: Parameters, bytes_after: int) -> MetTarget | None:
    """The size that was asked for in place of a ratio, and the one met."""
    target = job.options.target
    if target is None:
        return None
    met = bytes_after if target.kind == SIZE else parameters["model"][1]
    return {"kind": target.kind, "asked": target.amount, "met": met}


def _verify(job: Job, partial: Path, stored_bytes: int, outcome: PruneResult) -> Verification:
    """Load the output in a fresh process (plain transformers if its class is stock) and compare logits."""
    if job.options.verify is False:
        return {"verified": False, "reason": "--no-verify"}
    loaded = stored_bytes * 4 // job.reader.dtype.itemsize  # in float32
    if job.options.verify is None and loaded > VERIFIED_BYTES:
        return {"verified": False, "reason": f"loading it takes {loaded / 1e9:.1f} GB of memory; --verify insists"}
    source, change = outcome.proof(job.reader, partial)
    stock = not AutoConfig.from_pretrained(partial).model_type.startswith(PRUNED_PREFIX)
    try:
        return verify_roundtrip(source, partial, "transformers" if stock else "pyprune", job.progress, change=change)
    except VerificationError as error:
        raise VerificationError(f"{error}; {partial} keeps what was written") from error


def _device_name(device: torch.device) -> str:
    name = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    processes = distributed.world_size()
    return name if processes == 1 else f"{name}, in each of {processes} processes"


def _evaluate(job: Job, pruned: Path | ModelInMemory, windows: Tensor, with_text: bool) -> Evaluation:
    """Perplexity of the dense and of the pruned model, read back from what was written, and continuations by both.

    with_text: the model has a tokenizer that loads; token ids that a caller gives need none.
    """
    assert job.options.evaluation is not None
    origin = job.reader.origin
    models = load_models(pruned, origin, job.device, job.dtype)
    result = evaluate_models(models, windows, progress=lambda done, total: job.progress("evaluate", done, total))
    dense = {
        "perplexity": result["reference_perplexity"],
        "perplexity_standard_error": result["reference_perplexity_standard_error"],
    }
    text = job.options.evaluation.text
    evaluation: Evaluation = {
        "text": described(text),
        "self_judged": is_self(text),
        "dense": dense | {name: result[name] for name in ("windows", "sequence_length")},
        "pruned": result,
    }
    if with_text:
        tokenizer = load_tokenizer(origin, job.options.trust_remote_code)
        evaluation["continuations"] = sample_continuations(models, windows, tokenizer, job.options.seed)
    return evaluation
