"""Continuations: draws from the model's softmax, the same for the same model, by seed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pyprune.evaluation.continuations import NEW_TOKENS, SharedNoise, continue_prompts, sample_continuations
from pyprune.evaluation.perplexity import load_models

CPU = torch.device("cpu")


def test_noise_makes_draws_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(40_000, 4)
    for temperature in (1.0, 0.5):
        drawn = SharedNoise(1, temperature)(torch.empty(0), logits).argmax(-1)
        found = drawn.bincount(minlength=4) / len(drawn)
        expected = torch.softmax(logits[0] / temperature, -1)
        assert (found - expected).abs().max() < 0.01  # four standard errors of 40 000 draws
        assert found[3] == 0


@pytest.mark.slow
def test_the_same_model_writes_the_same_and_another_something_else(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    windows = torch.tensor([tokenizer("The film was a great success, and its music too.").input_ids[:8]] * 3)
    models = load_models(demo_model, demo_model, CPU, torch.float32)
    found = sample_continuations(models, windows, tokenizer, seed=5)
    assert (found["seed"], found["prompt_tokens"], len(found["samples"])) == (5, 8, 3)
    for sample in found["samples"]:
        assert sample["dense"] == sample["pruned"] != ""
        assert sample["prompt"] == tokenizer.decode(windows[0], skip_special_tokens=True)
    assert len({sample["dense"] for sample in found["samples"]}) == 3  # each prompt has noise of its own
    assert sample_continuations(models, windows, tokenizer, seed=5) == found
    assert sample_continuations(models, windows, tokenizer, seed=6)["samples"] != found["samples"]


def test_continuations_are_full_and_leave_the_model_as_it_was() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4, eos_token_id=[2, 3])).eval()
    settings = model.generation_config
    written = continue_prompts(model, torch.zeros(2, 4, dtype=torch.int64), 0)
    assert written.shape == (2, NEW_TOKENS)
    assert set(written.unique().tolist()) == {0, 1}
    assert model.generation_config is settings
