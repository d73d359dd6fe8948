"""Perplexity and divergence against transformers' own loss and against float64 on whole logits."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.texts import read_text
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, GraniteForCausalLM

import pyprune.evaluation.perplexity
from pyprune import InputError
from pyprune.calibration.text import tokenize
from pyprune.calibration.windows import consecutive_windows, fingerprint
from pyprune.checkpoint.load_model import load_model
from pyprune.evaluation.perplexity import evaluate, perplexity
from pyprune.evaluation.predictor import Predictor

CPU = torch.device("cpu")
# Both sides take float32 logits from the same model; products of another shape round differently, by some
# 1e-6 of a logit near 10, and the loss averages that over many tokens.
RELATIVE = 1e-5


def random_ids(windows: int, sequence_length: int, vocab_size: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (windows, sequence_length), generator=generator)


def perplexity_by_transformers(folder: Path, windows: torch.Tensor) -> float:
    """A plain loop over the loss that transformers computes for each window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def changed_copy(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_perplexity_is_that_of_transformers(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    folder, windows = tiny_checkpoint(family=family, tie=family == "qwen3"), random_ids(5, 48)
    result = evaluate(folder, windows, device=CPU, dtype=torch.float32)
    assert result["perplexity"] == pytest.approx(perplexity_by_transformers(folder, windows), rel=RELATIVE)
    assert (result["windows"], result["sequence_length"]) == (5, 48)
    assert result["seconds"] > 0
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(5 * 48)
    assert result["text_fingerprint"] == fingerprint(windows)
    assert "kl_divergence" not in result


def test_perplexity_of_the_trained_model(demo_model: Path) -> None:
    prompt = "The history of the railway begins with the steam engine. " * 20
    tokens = tokenize(prompt, AutoTokenizer.from_pretrained(demo_model))
    windows = consecutive_windows(tokens, 128)
    value = perplexity(load_model(demo_model, CPU, torch.float32), windows)
    assert value == pytest.approx(perplexity_by_transformers(demo_model, windows), rel=RELATIVE)
    assert value < 100  # of 8192 tokens: the model is trained, and the text repeats


def test_slices_and_batches_change_nothing(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, windows = tiny_checkpoint(), random_ids(5, 48)
    reference = tiny_checkpoint(seed=1)
    arguments = {"reference_folder": reference, "device": CPU, "dtype": torch.float32}
    whole = evaluate(folder, windows, **arguments)
    monkeypatch.setitem(pyprune.evaluation.perplexity._LOGITS_SLICE_BYTES, "cpu", 7 * 256 * 4)  # 7 rows of 47
    for batch_size in (1, 2, 5):
        sliced = evaluate(folder, windows, batch_size=batch_size, **arguments)
        for figure in ("perplexity", "kl_divergence", "top1_agreement", "reference_perplexity"):
            assert sliced[figure] == pytest.approx(whole[figure], rel=RELATIVE), figure


def test_divergence_from_a_reference(tiny_checkpoint: Callable[..., Path]) -> None:
    folder, reference = tiny_checkpoint(), tiny_checkpoint(layers=4, seed=1)
    windows = random_ids(4, 32)
    result = evaluate(folder, windows, reference_folder=reference, device=CPU, dtype=torch.float32)

    log_p, log_r = (
        torch.log_softmax(load_model(which, CPU, torch.float32)(windows).logits[:, :-1].double(), dim=-1)
        for which in (folder, reference)
    )
    expected = (log_r.exp() * (log_r - log_p)).sum(-1).mean().item()
    assert result["kl_divergence"] == pytest.approx(expected, rel=RELATIVE)
    agreement = (log_p.argmax(-1) == log_r.argmax(-1)).double().mean().item()
    assert result["top1_agreement"] == agreement
    loss = -log_r.gather(-1, windows[:, 1:, None]).mean().item()
    assert result["reference_perplexity"] == pytest.approx(math.exp(loss), rel=RELATIVE)


def test_a_model_does_not_diverge_from_itself(tiny_checkpoint: Callable[..., Path]) -> None:
    folder, steps = tiny_checkpoint(), []
    result = evaluate(
        folder,
        random_ids(3, 16),
        reference_folder=folder,
        device=CPU,
        dtype=torch.bfloat16,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert result["kl_divergence"] == 0
    assert result["top1_agreement"] == 1
    assert result["perplexity"] == result["reference_perplexity"]
    assert result["perplexity_standard_error"] == result["reference_perplexity_standard_error"] > 0
    assert (result["perplexity_difference"], result["perplexity_difference_standard_error"]) == (0, 0)
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_perplexity_that_is_not_finite_is_an_error(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][200] = torch.nan

    folder = changed_copy(tiny_checkpoint(), tmp_path / "nan", poison)
    windows = torch.zeros(4, 8, dtype=torch.int64)
    windows[2:, 3] = 200
    with pytest.raises(InputError, match=r"not finite: 2 of 4 windows .*the first is window 2") as error:
        evaluate(folder, windows, device=CPU, dtype=torch.float32)
    assert str(folder) in str(error.value)

    def overshoot(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] *= 1e4

    folder = changed_copy(tiny_checkpoint(), tmp_path / "large", overshoot)
    with pytest.raises(InputError, match=r"not finite: exp of a mean loss of \d{4,} nats"):
        evaluate(folder, random_ids(2, 16), device=CPU, dtype=torch.float32)


def test_tokens_and_models_that_do_not_belong_together(tiny_checkpoint: Callable[..., Path]) -> None:
    small, large = tiny_checkpoint(), tiny_checkpoint(vocab_size=300)
    with pytest.raises(InputError, match="token id 280 is outside the model's vocabulary of 256"):
        evaluate(small, torch.full((1, 4), 280), device=CPU, dtype=torch.float32)
    with pytest.raises(InputError, match=r"vocabulary of 256 and the reference .* of 300"):
        evaluate(small, random_ids(1, 4), reference_folder=large, device=CPU, dtype=torch.float32)
    with pytest.raises(InputError, match=r"windows of shape \[3, 1\]"):
        evaluate(small, random_ids(3, 1), device=CPU, dtype=torch.float32)


def test_logits_changed_after_the_head_are_taken_whole() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = GraniteConfig(**sizes, intermediate_size=96, vocab_size=256, logits_scaling=8.0)
    torch.manual_seed(0)
    model = GraniteForCausalLM(config).eval()
    model.lm_head.weight.data.normal_()
    windows = random_ids(3, 16)
    for scaling, by_slices in ((8.0, False), (1.0, True)):
        model.config.logits_scaling = model.logits_scaling = scaling
        assert Predictor(model, windows).by_slices == by_slices
        with torch.no_grad():
            expected = torch.stack([model(window[None], labels=window[None]).loss for window in windows]).mean().exp()
        assert perplexity(model, windows) == pytest.approx(expected.item(), rel=RELATIVE)


def test_folders_that_hold_no_whole_model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it has no config"):
        load_model(tmp_path, CPU, torch.float32)

    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "no-weights")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no-weights cannot be loaded") as error:
        load_model(folder, CPU, torch.float32)
    assert "\n" not in str(error.value)

    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="cut cannot be loaded"):
        load_model(folder, CPU, torch.float32)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    folder = changed_copy(tiny_checkpoint(), tmp_path / "missing", drop)
    with pytest.raises(InputError, match=r"missing lacks model\.layers\.1\.mlp\.up_proj\.weight \(LlamaForCausalLM\)"):
        load_model(folder, CPU, torch.float32)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            tensors[f"model.layers.{layer}.mlp.down_proj.bias"] = torch.zeros(64)

    folder = changed_copy(tiny_checkpoint(), tmp_path / "biases", add)
    with pytest.raises(InputError, match=r"does not use: model\.layers\.0\.mlp\.down_proj\.bias and 2 more"):
        load_model(folder, CPU, torch.float32)

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)

    folder = changed_copy(tiny_checkpoint(), tmp_path / "shape", reshape)
    with pytest.raises(InputError, match=r"another shape .*: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, CPU, torch.float32)


@pytest.mark.slow
@pytest.mark.shared
def test_wikitext(shared_dir: Path) -> None:
    folder = shared_dir / "models" / "llama-6m-gqa"
    tokens = tokenize(
        read_text(shared_dir / "data" / "wikitext2-test.txt")[:60_000], AutoTokenizer.from_pretrained(folder)
    )
    windows = consecutive_windows(tokens, 1024, max_windows=6)
    result = evaluate(folder, windows, device=CPU, dtype=torch.float32)
    assert result["perplexity"] == pytest.approx(perplexity_by_transformers(folder, windows), rel=RELATIVE)
    # training.json has 98.4 for the whole text; its first 6 windows are somewhat harder.
    assert 90 < result["perplexity"] < 130


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(tiny_checkpoint: Callable[..., Path]) -> None:
    windows, reference = random_ids(5, 48), tiny_checkpoint(seed=1)
    cpu, cuda = (
        evaluate(
            tiny_checkpoint(),
            windows,
            reference_folder=reference,
            device=torch.device(device),
            dtype=torch.float32,
        )
        for device in ("cpu", "cuda")
    )
    for figure in ("perplexity", "kl_divergence", "reference_perplexity"):
        assert cuda[figure] == pytest.approx(cpu[figure], rel=10 * RELATIVE), figure
