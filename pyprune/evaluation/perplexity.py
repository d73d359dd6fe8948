"""Perplexity of a model, and its distance from a reference model, on windows of token ids."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..calibration.text import check_vocabulary
from ..calibration.windows import fingerprint
from ..checkpoint import ModelInMemory
from ..checkpoint.load_model import load_model, vocabulary_size
from ..errors import InputError
from .predictor import Predictor
from .standard_error import paired_difference, perplexity_error

# Rows of a forward pass. On a GPU enough to keep its matrix products busy, while the widest activations of a 70B
# model (28672 channels in bf16, three of them alive) stay near 1.4 GB; on a CPU few, whose temporaries stay in its
# caches (16 windows of 1024 on the 24 M model, 2 threads: 8.8 s one by one, 12.2 s eight at a time).
_TOKENS_PER_BATCH = {"cuda": 8192, "cpu": 1024}
# Bytes of one float32 slice of logits, of which a comparison holds up to four at a time: on a CPU few enough
# for its caches, on a GPU enough rows to read the head's weights only a few times a window.
_LOGITS_SLICE_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}


@dataclass
class _Window:
    """Sums over the predicted tokens of one window, in float64; those with a reference are 0 without one."""

    loss: float
    reference_loss: float
    kl_divergence: float
    agreement: float


def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch_size: int | None = None) -> float:
    """exp of the mean over windows of each window's mean cross-entropy.

    `windows` is int64 [windows, sequence_length]; token 0 predicts token 1 and so on, so a window has
    sequence_length − 1 predictions. Log-softmax in float32, means in float64. `batch_size`: windows in
    a forward pass (None: 8192 tokens on a GPU, 1024 on a CPU). InputError: token ids outside the vocabulary, or a
    perplexity that is not finite.
    """
    predictions = windows.shape[1] - 1
    losses = [window.loss / predictions for window in _score(model, None, windows, batch_size)]
    return _exp_mean(losses, "the model")


@dataclass(frozen=True)
class EvaluatedModels:
    """A loaded model, perhaps one to compare it with, and their folders for messages."""

    model: PreTrainedModel
    reference: PreTrainedModel | None
    folder: str | Path | ModelInMemory
    reference_folder: str | Path | ModelInMemory | None


def load_models(
    folder: str | Path | ModelInMemory,
    reference_folder: str | Path | ModelInMemory | None,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> EvaluatedModels:
    """Load the models of an evaluation; both are in memory together.

    InputError: as `load_model`, or vocabularies of different sizes.
    """
    model = load_model(folder, device, dtype, trust_remote_code)
    reference = None
    if reference_folder is not None:
        reference = load_model(reference_folder, device, dtype, trust_remote_code)
        sizes = vocabulary_size(model.config), vocabulary_size(reference.config)
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{folder} has a vocabulary of {sizes[0]} and the reference {reference_folder} of "
                f"{sizes[1]}: they cannot be compared"
            )
    return EvaluatedModels(model, reference, folder, reference_folder)


def evaluate(
    model_folder: str | Path | ModelInMemory,
    windows: torch.Tensor,
    *,
    reference_folder: str | Path | ModelInMemory | None = None,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Evaluate the model in a folder, or in memory, on `windows` [windows, sequence_length]: `evaluate_models` of it.

    InputError: as `perplexity` and `load_models`.
    """
    models = load_models(model_folder, reference_folder, device, dtype, trust_remote_code)
    return evaluate_models(models, windows, batch_size, progress)


def evaluate_models(
    models: EvaluatedModels,
    windows: torch.Tensor,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate loaded models on `windows` [windows, sequence_length] (int64).

    Returns `perplexity` (as in `perplexity`) and `perplexity_standard_error`, `windows`, `sequence_length` (tokens),
    `text_fingerprint` (of the windows), `seconds` (without the loading of models) and `tokens_per_second` (of the text;
    a reference reads it in the same time). With a reference also `kl_divergence` (mean over predictions of
    KL(reference‖model), in nats), `top1_agreement` (the part of predictions whose most likely token is the same),
    `reference_perplexity` and `reference_perplexity_standard_error`, and `perplexity_difference` (the model's less the
    reference's) with `perplexity_difference_standard_error`, over pairs of windows. A standard error is None for one
    window. `progress` gets (windows done, all windows).

    InputError: as `perplexity`.
    """
    start = time.perf_counter()
    scored = []
    for window in _score(models.model, models.reference, windows, batch_size):
        scored.append(window)
        if progress is not None:
            progress(len(scored), len(windows))
    seconds = time.perf_counter() - start

    predictions = windows.shape[1] - 1
    losses = [window.loss / predictions for window in scored]
    result: dict[str, Any] = {
        "perplexity": _exp_mean(losses, models.folder),
        "perplexity_standard_error": perplexity_error(losses),
        "windows": windows.shape[0],
        "sequence_length": windows.shape[1],
        "text_fingerprint": fingerprint(windows),
        "seconds": seconds,
        "tokens_per_second": windows.numel() / seconds,
    }
    return result if models.reference is None else result | _compared(models, scored, losses, predictions)


def _compared(
    models: EvaluatedModels, scored: list[_Window], losses: list[float], predictions: int
) -> dict[str, float | None]:
    """Figures that need a reference."""
    reference_losses = [window.reference_loss / predictions for window in scored]
    reference_perplexity = _exp_mean(reference_losses, models.reference_folder)
    difference, error = paired_difference(losses, reference_losses)
    total = predictions * len(scored)
    return {
        "kl_divergence": math.fsum(window.kl_divergence for window in scored) / total,
        "top1_agreement": math.fsum(window.agreement for window in scored) / total,
        "reference_perplexity": reference_perplexity,
        "reference_perplexity_standard_error": perplexity_error(reference_losses),
        "perplexity_difference": difference,
        "perplexity_difference_standard_error": error,
    }


def _exp_mean(losses: list[float], model: object) -> float:
    """exp of the mean of the windows' losses (nats), or an InputError that says which are not finite."""
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise InputError(
            f"the perplexity of {model} is not finite: {len(bad)} of {len(losses)} windows have a loss of "
            f"nan or inf (the first is window {bad[0]}): the weights are damaged, or the dtype overflows"
        )
    mean = math.fsum(losses) / len(losses)
    try:
        return math.exp(mean)
    except OverflowError:
        raise InputError(f"the perplexity of {model} is not finite: exp of a mean loss of {mean:.0f} nats") from None


@torch.inference_mode()
def _score(
    model: PreTrainedModel, reference: PreTrainedModel | None, windows: torch.Tensor, batch_size: int | None
) -> Iterator[_Window]:
    """Each window's sums, in order."""
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"windows of shape {list(windows.shape)}: at least 1 window of 2 tokens is needed")
    check_vocabulary(windows, vocabulary_size(model.config))
    scored = Predictor(model, windows)
    compared = None if reference is None else Predictor(reference, windows)
    if batch_size is None:
        batch_size = max(1, _TOKENS_PER_BATCH[model.device.type] // windows.shape[1])
        if not (scored.by_slices and (compared is None or compared.by_slices)):
            batch_size = 1  # whole logits of more windows would take more memory than the model
    for batch in windows.split(batch_size):
        ids = batch.to(model.device)  # [B, L]
        outputs = scored.outputs(ids)
        reference_outputs = None if compared is None else compared.outputs(ids)
        for row in range(len(batch)):
            yield _score_window(
                scored,
                outputs[row],
                compared,
                None if reference_outputs is None else reference_outputs[row],
                ids[row],
            )


def _score_window(
    model: Predictor,
    outputs: torch.Tensor,  # [L, ...]
    reference: Predictor | None,
    reference_outputs: torch.Tensor | None,
    ids: torch.Tensor,  # [L]
) -> _Window:
    predictions = len(ids) - 1
    rows = max(1, _LOGITS_SLICE_BYTES[ids.device.type] // (4 * model.vocab_size))
    sums = torch.zeros(4, dtype=torch.float64, device=ids.device)  # stays there: one transfer a window
    for start in range(0, predictions, rows):
        part = slice(start, min(start + rows, predictions))
        targets = ids[1:][part]  # [rows]
        log_p = model.log_softmax(outputs[part])  # [rows, vocabulary]
        sums[0] += F.nll_loss(log_p, targets, reduction="none").double().sum()
        if reference is not None and reference_outputs is not None:
            log_r = reference.log_softmax(reference_outputs[part])
            sums[1] += F.nll_loss(log_r, targets, reduction="none").double().sum()
            sums[3] += (log_p.argmax(-1) == log_r.argmax(-1)).sum()
            # KL(r‖p) = Σ r·(log r − log p), in place of log_p, whose slice may be large
            sums[2] += log_p.neg_().add_(log_r).mul_(log_r.exp_()).sum(dtype=torch.float64)
    return _Window(*sums.tolist())
