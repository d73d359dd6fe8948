"""The last step of a run: configuration, tokenizer, index, evaluation, plan and report; then the rename."""

import shutil
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .allocation import Choice, UnitScores
from .architectures import LayerShape
from .evaluate import evaluate
from .modeling import pruned_config
from .plan import (
    FORMAT,
    dense_summary,
    kept_shapes,
    layer_entry,
    parameter_counts,
    ratio_summary,
    versions,
    write_plan,
)

if TYPE_CHECKING:
    from .pipeline import Run

# What else of a checkpoint folder goes along.
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def finish(run: "Run", choice: Choice, scores: list[UnitScores]) -> dict[str, Any]:
    """Complete the partial folder of a run whose shards are all written, and make it the output."""
    partial = run.writer.partial
    shapes = kept_shapes(run.reader.shapes, choice)
    biased = run.method.biased
    own = run.reader.config
    config = pruned_config(
        run.reader.family,
        own,
        shapes,
        biased or getattr(own, "o_proj_bias", False),
        biased or getattr(own, "down_proj_bias", False),
    )
    config.save_pretrained(partial)
    for pattern in _COPIED:
        for file in run.reader.folder.glob(pattern):
            shutil.copyfile(file, partial / file.name)
    run.writer.write_index()
    plan = _plan(run, choice, scores, shapes)
    if run.evaluation_windows is not None:
        plan["evaluation"] = _evaluate(run, run.evaluation_windows)
    plan["seconds"] = round(perf_counter() - run.start, 3)
    write_plan(plan, partial)
    from .report import write_report  # here: matplotlib would take 25 MB all through the passes

    write_report(plan, partial / "report.html")
    run.writer.finish()
    return plan


def _plan(run: "Run", choice: Choice, scores: list[UnitScores], shapes: list[LayerShape]) -> dict[str, Any]:
    o = run.options
    parameters = parameter_counts(run.reader, shapes)
    passes = {name: meter.summary() | {"cached": name == "survey" and run.cached} for name, meter in run.meters.items()}
    return {
        "format": FORMAT,
        "model": o.model,
        "model_fingerprint": run.model_fingerprint,
        "method": run.method.name,
        "options": run.method.options,
        "seed": o.seed,
        "calibration": None
        if run.windows is None
        else {
            "text": o.calibration,
            "samples": o.samples,
            "sequence_length": o.sequence_length,
            "fingerprint": run.text_fingerprint,
        },
        "ratio": ratio_summary(o.ratio, parameters, run.reader.shapes),
        "parameters": {name: list(counts) for name, counts in parameters.items()},
        "bytes": [run.reader.bytes, run.writer.tensor_bytes],
        "dense": dense_summary(run.reader.shapes),
        "layers": [layer_entry(k, s) for k, s in zip(choice.layers, scores, strict=True)],
        "threshold": choice.threshold,
        "passes": passes,
        "peak_memory_bytes": max(meter.peak_memory_bytes for meter in run.meters.values()),
        "versions": versions(),
        "device": _device_name(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "backends": {"channel_moments": run.backend()} if run.windows is not None else {},
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _evaluate(run: "Run", windows: Tensor) -> dict[str, Any]:
    """Perplexity of the dense and of the pruned model, read back from what was written."""
    assert run.options.evaluation is not None
    result = evaluate(
        run.writer.partial,
        windows,
        reference_folder=run.reader.folder,
        device=run.device,
        dtype=run.dtype,
        progress=lambda done, total: run.progress("evaluate", done, total),
    )
    same = {name: result[name] for name in ("windows", "sequence_length")}
    return {
        "text": run.options.evaluation.text,
        "dense": {"perplexity": result["reference_perplexity"], **same},
        "pruned": result,
    }
