"""Finalize a run: configuration, tokenizer, index, evaluation, plan and report; then the rename."""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..architectures import PRUNED_PREFIX
from ..calibration.source import SELF, described
from ..calibration.text import load_tokenizer
from ..calibration.tokenizer_check import NOT_COMPARED, check_tokenizer
from ..checkpoint import CheckpointWriter
from ..checkpoint.auxiliary_files import copy_companions
from ..errors import InputError, VerificationError
from ..evaluation.continuations import sample_continuations
from ..evaluation.perplexity import evaluate_models, load_models
from ..evaluation.roundtrip import verify_roundtrip
from ..exporters.state_dict import check_state_dict
from ..job.job import Job
from ..job.record import FORMAT, curves_entry, dense_summary, parameter_counts, ratio_summary, versions, write_plan
from ..job.result import PruneResult
from ..mask_training.training import FILE as TRAINING
from ..passes import Passes
from ..publishing.card import write_card
from ..runtime import distributed
from ..runtime.device import oom_summary

# Above, a pruning does not by itself load what it wrote: on a CPU that takes minutes.
VERIFIED_BYTES = 8 << 30


def finalize(
    job: Job,
    writer: CheckpointWriter,
    passes: Passes,
    outcome: PruneResult,
) -> dict[str, Any]:
    """Complete the partial folder, whose shards are all written, and make it the output. Returns the plan."""
    partial = writer.partial
    outcome.write_config(job.reader, writer, job.biases)
    passes.warnings += copy_companions(job.reader.folder, partial)
    writer.write_index()
    check_state_dict(partial, writer.prove())
    tokenizer = check_tokenizer(job.reader.folder, partial, job.options.trust_remote_code)
    plan = _plan(job, outcome) | {
        "bytes": [job.reader.bytes, writer.tensor_bytes],
        "passes": {
            name: meter.summary() | {"cached": name == "calibration" and passes.cached}
            for name, meter in passes.meters.items()
        },
        "peak_memory_bytes": max(meter.peak_memory_bytes for meter in passes.meters.values()),
        "nonfinite": passes.nonfinite,
        "warnings": passes.warnings,
        "tokenizer": tokenizer,
        "unused_tensors": job.reader.unused,
        "source": {"files": job.source_files, "digests": job.reader.content.digests},
        "checksums": writer.checksums(),
    }
    if passes.curves:
        plan["error_curves"] = curves_entry(passes.curves, plan["layers"])
    if passes.history:
        plan["training"] = {"loss": [loss for loss, _ in passes.history], "kept": [kept for _, kept in passes.history]}
    plan["verification"] = _verify(job, partial, writer.tensor_bytes, outcome)
    if job.evaluation_windows is not None:
        try:
            with_text = tokenizer is not None and not tokenizer.startswith(NOT_COMPARED)
            plan["evaluation"] = _evaluate(job, partial, job.evaluation_windows, with_text)
        except (InputError, torch.OutOfMemoryError) as error:
            reason = oom_summary(error) if isinstance(error, torch.OutOfMemoryError) else str(error)
            raise InputError(
                f"{reason}; the pruned model is complete all the same: repeat with --resume and without --evaluate"
            ) from error
    name = job.options.output.absolute().name
    passes.warnings += write_card(plan, job.reader.folder, partial, name)
    plan["seconds"] = round(perf_counter() - job.start, 3)
    write_plan(plan, partial)
    from ..report.page import write_report  # here: matplotlib would take 25 MB all through the passes

    write_report(plan, partial / "report.html", str(job.options.output))
    (partial / TRAINING).unlink(missing_ok=True)
    writer.finish()
    return plan


def _verify(job: Job, partial: Path, stored_bytes: int, outcome: PruneResult) -> dict[str, Any]:
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


def _plan(job: Job, outcome: PruneResult) -> dict[str, Any]:
    o = job.options
    parameters = parameter_counts(job.reader, outcome.parameters(job.reader.shapes))
    return {
        "format": FORMAT,
        "identity": job.identity,
        "model": o.name or o.model,
        "method": job.method.name,
        "options": job.method.options,
        "seed": o.seed,
        "calibration": None
        if job.windows is None
        else {
            "text": described(SELF if o.calibration is None else o.calibration),
            "samples": o.samples,
            "sequence_length": o.sequence_length,
            "fingerprint": job.text_fingerprint,
        },
        "ratio": ratio_summary(job.ratio, parameters, job.reader.shapes),
        "parameters": {name: list(counts) for name, counts in parameters.items()},
        "dense": dense_summary(job.reader.shapes),
        "layers": outcome.layers(),
        "threshold": outcome.threshold,
        "versions": versions(),
        "device": _device_name(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "backends": job.backends,
    }


def _device_name(device: torch.device) -> str:
    name = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    processes = distributed.world_size()
    return name if processes == 1 else f"{name}, in each of {processes} processes"


def _evaluate(job: Job, pruned: Path, windows: Tensor, with_text: bool) -> dict[str, Any]:
    """Perplexity of the dense and of the pruned model, read back from what was written, and continuations by both.

    with_text: the model has a tokenizer that loads; token ids that a caller gives need none.
    """
    assert job.options.evaluation is not None
    folder = job.reader.folder
    models = load_models(pruned, folder, job.device, job.dtype)
    result = evaluate_models(models, windows, progress=lambda done, total: job.progress("evaluate", done, total))
    dense = {
        "perplexity": result["reference_perplexity"],
        "perplexity_standard_error": result["reference_perplexity_standard_error"],
    }
    text = job.options.evaluation.text
    evaluation = {
        "text": described(text),
        "self_judged": isinstance(text, str) and text == SELF,
        "dense": dense | {name: result[name] for name in ("windows", "sequence_length")},
        "pruned": result,
    }
    if with_text:
        tokenizer = load_tokenizer(folder, job.options.trust_remote_code)
        evaluation["continuations"] = sample_continuations(models, windows, tokenizer, job.options.seed)
    return evaluation
