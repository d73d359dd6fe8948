"""Log-probabilities of a causal model's next tokens, by slices of a window where its head alone makes the logits."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.load_model import vocabulary_size


class Predictor:
    """A model's predictions in two steps: what is computed of whole windows, and log-probabilities of a part of that.

    Where the logits are the head's output and nothing more (`by_slices`), the first are the head's inputs, and logits
    exist a slice at a time. Some families scale or cap their logits behind the head, or have no head to call: of them
    the first are the whole logits.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        self.model = model
        self.vocab_size = vocabulary_size(model.config)
        self.by_slices = _head_comes_last(model, windows[:1, :2].to(model.device))

    def outputs(self, ids: Tensor) -> Tensor:
        """[B, L] → [B, L, hidden], or [B, L, vocabulary] of a model that is not computed by slices."""
        if self.by_slices:
            return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return self.model(input_ids=ids, use_cache=False).logits

    def log_softmax(self, outputs: Tensor) -> Tensor:
        """float32 log-probabilities: [rows, ...] → [rows, vocabulary]."""
        logits = self.model.get_output_embeddings()(outputs) if self.by_slices else outputs
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _head_comes_last(model: PreTrainedModel, ids: Tensor) -> bool:
    """Return whether a forward passes the base model's output to the head, and returns the head's, unchanged."""
    head, base = model.get_output_embeddings(), model.base_model
    if not isinstance(head, nn.Module) or base is model:
        return False
    seen: dict[str, Any] = {}
    hooks = [
        head.register_forward_hook(lambda _, inputs, output: seen.update(given=inputs[0], made=output)),
        base.register_forward_hook(
            lambda _, inputs, output: seen.update(base=getattr(output, "last_hidden_state", None))
        ),
    ]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return _same(seen.get("base"), seen.get("given")) and _same(seen.get("made"), logits)


def _same(one: Any, other: Any) -> bool:
    """Up to their type: some heads' outputs become float32."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return torch.allclose(one.to(other.dtype), other, rtol=0, atol=0, equal_nan=True)
