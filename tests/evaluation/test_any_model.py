"""Evaluation of causal language models that pyprune does not prune; what does not load is one line."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
)

from pyprune import InputError
from pyprune.calibration.sampling import sample_from_model
from pyprune.calibration.windows import fit_length
from pyprune.checkpoint.load_model import evaluation_model, load_model, vocabulary_size
from pyprune.evaluation.perplexity import evaluate
from pyprune.evaluation.predictor import Predictor

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, bool]] = {  # and whether slices of its logits follow from the head alone
    "gpt2": (GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64), True),
    "opt": (OPTConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
                      word_embed_proj_dim=16, max_position_embeddings=64), False),
    # its forward calls the decoder, not the base model
    "bloom": (BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4), True),
    "mamba": (MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2), True),
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=2.0, sliding_window=8), False),
    "granite": (GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=8.0), False),
    "llama": (LlamaConfig(**SIZES), True),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (config, _) in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def ids(windows: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(128, (windows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_perplexity_is_that_of_transformers(name: str, folders: dict[str, Path]) -> None:
    config, dtype = evaluation_model(folders[name], trust_remote_code=False)
    assert (vocabulary_size(config), dtype) == (128, torch.float32)
    result = evaluate(folders[name], ids(), reference_folder=folders["llama"], device=CPU, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in ids()]
        log_p = torch.log_softmax(model(ids()).logits[:, :-1].double(), -1)
        reference = load_model(folders["llama"], CPU, torch.float32)
        log_r = torch.log_softmax(reference(ids()).logits[:, :-1].double(), -1)
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result["kl_divergence"] == pytest.approx((log_r.exp() * (log_r - log_p)).sum(-1).mean().item(), abs=1e-5)
    with torch.no_grad():
        assert Predictor(model, ids()).by_slices == CONFIGS[name][1]


@pytest.mark.parametrize("name", CONFIGS)
def test_any_model_writes_its_own_text(name: str, folders: dict[str, Path]) -> None:
    model = load_model(folders[name], CPU, torch.float32)
    if model.generation_config.bos_token_id is None and model.generation_config.eos_token_id is None:
        pytest.skip("names neither BOS nor EOS")
    path = folders[name] / "generation_config.json"
    fields = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(fields | {"bos_token_id": 1, "eos_token_id": 2}))  # some name ids beyond 128
    windows = sample_from_model(folders[name], 2, 6, 0, CPU, torch.float32)
    assert windows.shape == (2, 6)
    assert (windows[:, 0] == 1).all()


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"a": torch.bfloat16, "b": torch.float32}, torch.bfloat16),
        ({"a": torch.float16, "b": torch.int32}, torch.float16),
        ({"a": torch.float8_e4m3fn, "b": torch.bfloat16}, torch.bfloat16),
        ({"a": torch.int32, "b": torch.int32}, torch.float16),  # as the configuration says
    ],
)
def test_the_stored_type_is_that_of_most_numbers(
    stored: dict[str, torch.dtype], expected: torch.dtype, tmp_path: Path
) -> None:
    LlamaConfig(**SIZES, dtype=torch.float16).save_pretrained(tmp_path)
    sizes = {"a": 100, "b": 3}
    tensors = {name: torch.zeros(sizes[name]).to(dtype) for name, dtype in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert evaluation_model(tmp_path, False)[1] == expected


def spoil_config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def spoil_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)


def spoil_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def quantise(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(fields))


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def code_of_its_own(folder: Path) -> None:
    fields = {"model_type": "own", "auto_map": {n: f"own.{n}" for n in ("AutoConfig", "AutoModelForCausalLM")}}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "own.py").write_text("raise SystemExit('was run')")


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_config(""), spoil_config("[" * 100_000), spoil_config("[]"), spoil_config("{}"), spoil_config("5"),
        spoil_config('{"model_type": "no-such"}'), spoil_config('{"model_type": "llama", "hidden_size": "x"}'),
        spoil_config('{"model_type": 5}'), spoil_index, spoil_weights, quantise, only_pickles, code_of_its_own,
    ],
)  # fmt: skip
def test_what_does_not_load_is_one_line(
    spoil: Callable[[Path], object], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "m")
    spoil(folder)
    refused = []
    for load in (lambda: evaluation_model(folder, False), lambda: load_model(folder, CPU, torch.float32)):
        try:
            load()
        except InputError as error:
            refused.append(str(error))
        else:
            refused.append("")
    assert refused[-1]  # the configuration alone may do
    assert all(not line or str(folder) in line for line in refused)
    assert not any("\n" in line for line in refused)


def test_tensors_that_no_model_computes_with_are_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    spare = (
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "v_head.summary.weight",
        "model.layers.1.self_attn.k_scale",
    )
    save_file(tensors | {name: torch.ones(3) for name in spare}, folder / "model.safetensors", {"format": "pt"})
    whole, other = (
        evaluate(each, ids(), device=CPU, dtype=torch.float32)["perplexity"] for each in (folders["llama"], folder)
    )
    assert whole == other


def test_a_length_is_cut_to_the_positions_unless_it_was_typed() -> None:
    gpt2 = CONFIGS["gpt2"][0]  # calls them n_positions
    assert fit_length(64, True, gpt2) == (64, None)
    assert fit_length(10, False, gpt2) == (10, None)
    length, note = fit_length(2048, False, gpt2)
    assert length == 64
    assert note is not None
    assert "2048" in note
    with pytest.raises(InputError, match="sequence length 65 exceeds the model's max_position_embeddings 64"):
        fit_length(65, True, gpt2)
    for unlimited in ("bloom", "mamba"):
        assert fit_length(10**6, True, CONFIGS[unlimited][0]) == (10**6, None)
