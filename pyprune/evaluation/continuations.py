"""Sampled continuations of a text's windows, by the dense and by the pruned model, for people to read."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from .perplexity import EvaluatedModels

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 10, 16, 32
TEMPERATURE = 0.7  # at 1 small models write what nobody can read, before and after


class SharedNoise(LogitsProcessor):
    """Gumbel noise on logits / temperature, from a seed: the largest sum is a draw from the softmax.

    Two models that get the same noise draw the same token wherever their logits are near, so that what differs between
    their texts comes of the models.
    """

    def __init__(self, seed: int, temperature: float) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [prompts, vocabulary] → the noisy ones, float32."""
        uniform = torch.rand(scores.shape, generator=self.generator, dtype=torch.float32)
        noise = -torch.log(-torch.log(uniform))
        return scores.float() / self.temperature + noise.to(scores.device)


@torch.inference_mode()
def continue_prompts(model: PreTrainedModel, prompts: Tensor, seed: int) -> Tensor:
    """int64 [prompts, tokens] → the NEW_TOKENS drawn after each, on the CPU; EOS is never drawn."""
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ids = prompts.to(model.device)
    saved = model.generation_config
    # An own configuration, since generate() fills what a given one leaves open from the model's.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, suppress_tokens=ends or None, pad_token_id=0
    )
    try:
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), logits_processor=[SharedNoise(seed, TEMPERATURE)]
        )
    finally:
        model.generation_config = saved
    return written[:, ids.shape[1] :].cpu()


def sample_continuations(models: EvaluatedModels, windows: Tensor, tokenizer: Any, seed: int) -> dict[str, Any]:
    """Continuations of the first tokens of up to ten windows, spread over `windows` [windows, tokens].

    Returns how they were drawn (`seed`, `temperature`, `prompt_tokens`, `new_tokens`) and `samples`, each with the
    texts `prompt`, `dense` and `pruned`.
    """
    assert models.reference is not None
    count = min(PROMPTS, len(windows))
    chosen = torch.tensor([number * len(windows) // count for number in range(count)])
    prompts = windows[chosen, :PROMPT_TOKENS]
    written = {
        name: continue_prompts(model, prompts, seed)
        for name, model in (("dense", models.reference), ("pruned", models.model))
    }
    samples = []
    for number, prompt in enumerate(prompts.tolist()):
        own = {name: _text_after(tokenizer, prompt, ids[number].tolist()) for name, ids in written.items()}
        samples.append({"prompt": _decode(tokenizer, prompt)} | own)
    return {
        "seed": seed,
        "temperature": TEMPERATURE,
        "prompt_tokens": prompts.shape[1],
        "new_tokens": NEW_TOKENS,
        "samples": samples,
    }


def _text_after(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text that `ids` add to the prompt's: alone, some tokenizers would lose the space before their first word."""
    before, whole = _decode(tokenizer, prompt), _decode(tokenizer, prompt + ids)
    return whole.removeprefix(before) if whole.startswith(before) else _decode(tokenizer, ids)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.encode(errors="replace").decode()
