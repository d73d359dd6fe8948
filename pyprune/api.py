"""The functions of `import pyprune`. The command line calls these, and adds only parsing and printing."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architectures import list_families
from .calibration import CONCATENATE
from .calibration.mixture import parts_of
from .calibration.source import Text, TokenSource, is_self
from .calibration.text import load_tokenizer
from .calibration.windows import fit_length
from .checkpoint import SHARD_SIZE, CheckpointReader, LoadedModel, checkpoint_folder
from .checkpoint.hub import at_revision
from .checkpoint.load_model import evaluation_model, load_model
from .errors import InputError
from .estimation.estimate import Estimate
from .estimation.estimate import estimate as estimate_run
from .estimation.target import ratio_of, target_of
from .estimation.time import gpu_named
from .evaluation.perplexity import evaluate_models, load_models
from .evaluation.tasks import evaluate_tasks
from .exporters import export as export_checkpoint
from .job.config import EvaluationConfig, PruneConfig
from .job.record import PruneRecord
from .methods import list_methods, make_method, resolve_ratio
from .pipeline.run import prune as prune_checkpoint
from .runtime import distributed
from .runtime.device import select_device, select_dtype
from .runtime.progress import Progress, silent

# Tokens in a window, cut to the model's positions where those are fewer.
CALIBRATION_LENGTH, EVALUATION_LENGTH, PERPLEXITY_LENGTH = 2048, 1024, 2048


def prune(
    model: Any,
    output: str | Path | None = None,
    method: str = "obs",
    ratio: float | None = None,
    *,
    revision: str | None = None,
    target_size: int | None = None,
    parameters: int | None = None,
    calibration: Text | None = None,
    packing: str = CONCATENATE,
    text_column: str | None = None,
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    device_memory: int | None = None,
    shard_size: int | None = None,
    cache: str | Path | None = None,
    resume: bool = False,
    allow_other_bits: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    evaluate_on: Text | None = None,
    evaluation_length: int | None = None,
    max_windows: int | None = None,
    verify: bool | None = False,
    tokenizer: Any = None,
    progress: Progress = silent,
    **options: Any,
) -> PruneRecord:
    """Prune a model into a new folder, which holds a checkpoint, plan.json and report.html.

    Args:
        model: a checkpoint folder, a hub id, or a transformers model in memory. One in memory is left as it is; the
            pruned one is the record's `pruned_model`, on the same device and in the same type.
        output: the folder to make; it appears whole or not at all. A model in memory needs none.
        method: a name from `list_methods()`.
        ratio: share of the decoder linears' parameters to remove, in (0, 1). None: the method's pattern says it,
            or one of the next two.
        revision: branch, tag or commit of a model of the hub; "org/name@revision" says the same.
        target_size, parameters: bytes of the pruned weights as stored, or their number, in place of a ratio.
        calibration: a text: the name of a file (.txt, .jsonl, .json, .csv, .parquet, each also .gz), of a data set of
            the hub (name[:config[:split]]), "builtin" (comes with the package) or "self" (sampled from the model); a
            list of documents, a `datasets.Dataset`, or token ids, int64 [windows, tokens]. Several are pairs (text,
            share) or a dictionary of shares by text; shares sum to 1. Methods that look at no activations need none.
        packing: "concatenate" (windows start anywhere in the joined documents) or "separate" (each at a document).
        text_column: column of rows with the text or the conversation. None: text, else messages or conversations.
        samples: calibration windows. Token ids that are given are all taken.
        sequence_length: tokens in a calibration window. None: 2048, or as many as the model has positions for.
        seed: of windows and of sampled text.
        device: "auto", "cpu", "cuda" or "cuda:N". dtype: "auto", "float32", "bfloat16" or "float16".
        device_memory: bytes of the GPU that the run stays below.
        shard_size: bytes of tensors in a file of the output at most; a larger tensor has its own file. None: 5 GB.
        cache: folder of statistics of the dense model. None: `.pyprune-cache` beside the output.
        resume: finish a run that was stopped, to the same bits. allow_other_bits: on another processor or other
            versions too.
        allow_nonfinite: count NaN and Inf activations as zero.
        trust_remote_code: run a tokenizer's or model's own Python code.
        evaluate_on: a text, as `calibration`, for perplexity before and after. evaluation_length: tokens in its
            windows (None: 1024 or fewer). max_windows: windows at most.
        verify: load the output in a fresh process and compare its logits. None: unless it is large.
        tokenizer: of a model in memory; saved beside it. None: the one in the folder that the model came from.
        progress: called with (step, units done, units in total).
        options: the method's own, as `list_methods()` names them.

    Returns:
        The record of the run, which is also in plan.json.

    Raises:
        InputError: the arguments or the input are wrong; nothing is left behind.
        VerificationError: what was written is not what was meant.
    """
    sequence_length = _window_length(calibration, sequence_length)
    if isinstance(calibration, Tensor):
        samples = len(calibration)
    evaluation = None
    if evaluate_on is not None:
        evaluation_length = _window_length(evaluate_on, evaluation_length)
        fits = evaluation_length is None
        evaluation = EvaluationConfig(evaluate_on, evaluation_length or EVALUATION_LENGTH, max_windows, fits)
    config = PruneConfig(
        model="" if isinstance(model, torch.nn.Module) else at_revision(str(model), revision),
        output=None if output is None else Path(output),
        method=method,
        ratio=ratio,
        target=target_of(ratio, target_size, parameters),
        method_options=options,
        calibration=calibration,
        packing=packing,
        text_column=text_column,
        samples=samples,
        sequence_length=sequence_length or CALIBRATION_LENGTH,
        fits=sequence_length is None,
        seed=seed,
        device=device,
        dtype=dtype,
        cache=None if cache is None else Path(cache),
        resume=resume,
        allow_other_bits=allow_other_bits,
        allow_nonfinite=allow_nonfinite,
        trust_remote_code=trust_remote_code,
        evaluation=evaluation,
        device_memory=device_memory,
        shard_size=SHARD_SIZE if shard_size is None else shard_size,
        verify=verify,
    )
    if isinstance(model, torch.nn.Module):
        return _prune_in_memory(model, config, tokenizer, progress)
    if output is None:
        raise InputError("no output: name the folder to write the pruned checkpoint to")
    return prune_checkpoint(config, progress)


def _window_length(text: Text | None, length: int | None) -> int | None:
    """Tokens in a window: those of token ids that are given as windows, else `length`."""
    return text.shape[1] if isinstance(text, Tensor) and text.dim() == 2 else length


def _prune_in_memory(model: torch.nn.Module, config: PruneConfig, tokenizer: Any, progress: Progress) -> PruneRecord:
    """Prune a transformers model as it is, layer by layer; only an output that is named is written."""
    if config.output is None:
        if config.resume:
            raise InputError("resume=True needs an output: a pruning in memory leaves nothing to go on from")
        if config.verify:
            raise InputError("verify=True needs an output: it loads what was written in a fresh process")
    if distributed.world_size() > 1:
        raise InputError("a model in memory is pruned by one process: save it, and name its folder")
    make_method(config.method, config.method_options)  # what is wrong with them is said before the tokenizer loads
    loaded = LoadedModel(model, tokenizer or _tokenizer_of(model, config.trust_remote_code))
    given = loaded.memory
    record = prune_checkpoint(dataclasses.replace(config, model=str(given)), progress, loaded)
    if config.output is not None:
        record.pruned_model = load_model(config.output, given.device, given.dtype)
    return record


def _tokenizer_of(model: torch.nn.Module, trust_remote_code: bool) -> Any:
    """The tokenizer in the folder that a model was loaded from; None where there is none."""
    name = getattr(model, "name_or_path", "")
    there = bool(name) and any(Path(name).glob("tokenizer*"))
    return load_tokenizer(Path(name), trust_remote_code) if there else None


def evaluate(
    model: str | Path,
    text: Text | None = None,
    *,
    revision: str | None = None,
    packing: str = CONCATENATE,
    text_column: str | None = None,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    reference: str | Path | None = None,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
    note: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Measure a model's perplexity in consecutive windows of a text, its accuracy on tasks, or both.

    Perplexity is exp of the mean over windows of each window's mean cross-entropy.

    Args:
        model: a checkpoint folder or a hub id of any causal language model that transformers loads.
        revision: branch, tag or commit of a model of the hub.
        text: as `calibration` of `prune`; "self" samples from `reference` if it is given, else from the model. Several
            are a dictionary of texts by name.
        packing, text_column: as in `prune`.
        sequence_length: tokens in a window. None: 2048, or as many as the model has positions for.
        max_windows: windows at most. None: all; 64 for "self".
        reference: the dense model, for KL divergence (nats), top-1 agreement, and its own accuracy on the tasks.
        tasks: names of lm-eval's tasks (extra `pyprune[eval]`); include_path: folder of more; limit: examples of each;
            few_shot: solved examples before each; batch_size: sequences in a forward pass.
        note: gets what the user should know beside the result.

    Returns:
        With a text `perplexity`, `windows`, `sequence_length`, `seconds`, and with a reference `kl_divergence`,
        `top1_agreement`, `reference_perplexity`; with several texts all this by name in `texts`; with tasks
        `task_evaluation` and `reference_task_evaluation`.

    Raises:
        InputError: the arguments or the input are wrong.
    """
    if text is None and not tasks:
        raise InputError("there is nothing to evaluate on: give --text TEXT, --tasks NAME,NAME or both")
    folder = checkpoint_folder(at_revision(str(model), revision))
    dense = checkpoint_folder(str(reference)) if reference is not None else None
    if dense is not None:
        evaluation_model(dense, trust_remote_code)  # says what is wrong with it in our words
    place = select_device(device)
    config, stored = evaluation_model(folder, trust_remote_code)
    compute = select_dtype(dtype, stored, place)
    result: dict[str, Any] = {}
    if tasks:
        by_key = {"task_evaluation": folder} | ({"reference_task_evaluation": dense} if dense is not None else {})
        for key, each in by_key.items():
            result[key] = evaluate_tasks(
                each,
                list(tasks),
                Path(include_path) if include_path is not None else None,
                limit,
                batch_size,
                device=place,
                dtype=compute,
                few_shot=few_shot,
                trust_remote_code=trust_remote_code,
            )
    if text is None:
        return result
    texts = text if isinstance(text, Mapping) else {"": text}
    windows = {}
    for name, own in texts.items():  # all are read before one is evaluated
        asked = _window_length(own, sequence_length)
        length, cut = fit_length(asked or PERPLEXITY_LENGTH, asked is not None, config)
        if cut is not None and note is not None:
            note(cut)
        source = TokenSource(
            own, dense or folder, config, place, compute, trust_remote_code, packing=packing, column=text_column
        )
        # Sampled text must not be what a pruning with this seed was calibrated on.
        windows[name] = source.evaluation(
            length, max_windows, seed + 1, lambda done, total: progress("sampling text", done, total)
        )
    models = load_models(folder, dense, place, compute, trust_remote_code)
    figures = {
        name: evaluate_models(models, own, progress=lambda done, total: progress("evaluate", done, total))
        for name, own in windows.items()
    }
    return ({"texts": figures} if isinstance(text, Mapping) else figures[""]) | result


def export(
    model: str | Path,
    output: str | Path,
    format: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    shard_size: int | None = None,
    verify: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a pruned checkpoint in a layout that other programs load.

    Args:
        model: a checkpoint folder or a hub id. revision: as in `evaluate`. output: the folder to make, or gguf's file.
        format: "stock" (a transformers class that every engine knows; all layers alike), "remote-code" (as it is, with
            its model code beside it), "gguf" (llama.cpp, Ollama) or "padded" (zeros up to the widest layer).
        dtype: of gguf: "f32", "f16" (default), "bf16" or "q8_0".
        shard_size: bytes of tensors in a file at most, as in `prune`; a GGUF file is one.
        verify: load the result in a fresh process and compare its logits with the model's.

    Returns:
        `output`, `format`, `class`, `bytes` (before, after), `notes` and `verification`.

    Raises:
        InputError: it cannot be exported so. VerificationError: what was written is not the model. Nothing is left.
    """
    folder = checkpoint_folder(at_revision(str(model), revision))
    return export_checkpoint(folder, Path(output), format, dtype, progress, verified=verify, shard_size=shard_size)


def estimate(
    model: str | Path,
    method: str = "obs",
    ratio: float | None = None,
    *,
    revision: str | None = None,
    target_size: int | None = None,
    parameters: int | None = None,
    calibration: Text | None = None,
    samples: int = 128,
    sequence_length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_memory: int | None = None,
    on: str | None = None,
    note: Callable[[str], object] | None = None,
    **options: Any,
) -> Estimate:
    """Predict sizes, parameters, time and peak memory of a pruning. Reads headers, writes nothing.

    Args:
        model, revision, method, ratio, target_size, parameters, samples, sequence_length, device, dtype, device_memory,
            options: see `prune`.
        calibration: as in `prune`; it is not read. With "self" the sampling is part of the estimate.
        on: name of a GPU that is not here: "h100", "RTX 4090".
        note: gets what the user should know beside the result.

    Returns:
        Sizes, parameters, memory, and each pass with its FLOPs and seconds.

    Raises:
        InputError: the run would be refused.
    """
    place = select_device(device)
    if device_memory is not None and on is None and place.type == "cpu":
        raise InputError("--device-memory is for a GPU: one that is here, or one named with --on")
    made, target = make_method(method, options), target_of(ratio, target_size, parameters)
    named = None if on is None else gpu_named(on)
    if target is None:
        resolve_ratio(made, ratio)
    reader = CheckpointReader(checkpoint_folder(at_revision(str(model), revision)))
    made = made.fitted(reader.shapes, reader.biased)
    compute = reader.dtype if on and dtype == "auto" else select_dtype(dtype, reader.dtype, place)
    length = sequence_length or CALIBRATION_LENGTH
    if made.needs_text:
        length, cut = fit_length(length, sequence_length is not None, reader.config)
        if cut is not None and note is not None:
            note(cut)
    share = resolve_ratio(made, ratio) if target is None else ratio_of(target, reader, made)
    parts = parts_of(calibration, samples) if made.needs_text and calibration is not None else []
    sampled = sum(part.windows for part in parts if is_self(part.text))
    return estimate_run(reader, made, share, samples, length, place, compute, device_memory, named, sampled)


__all__ = ["Estimate", "PruneRecord", "estimate", "evaluate", "export", "list_families", "list_methods", "prune"]
