"""Whether the forward is the model's: every known family passes, and each way of being wired otherwise is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families
from support.command_line import run
from support.selected_models import dense_model
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pyprune import architectures
from pyprune.architectures import GRANITE, MISTRAL, Family
from pyprune.architectures.declaration import FULL, Scales
from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError
from pyprune.forward import forward_check
from pyprune.forward.forward_check import check_forward, layer_kinds

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 97,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_multiplier": 16**-0.5,
}


def windows(length: int = 40) -> Tensor:
    return torch.randint(97, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> Family:
    """Granite as somebody would add it who took its layers for Llama's."""
    family = replace(GRANITE, scales=Scales(), computes_llama=lambda config: True)
    monkeypatch.setitem(architectures.FAMILIES, "granite", family)
    return family


def granite(folder: Path, **multipliers: float) -> Path:
    torch.manual_seed(0)
    config = GraniteConfig(**(SIZES | multipliers))
    GraniteForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_known_families_pass(
    name: str, dtype: torch.dtype, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    reader = CheckpointReader(families.family_checkpoint(name, tiny_checkpoint, tmp_path))
    for length in (2, 40, 300):
        check_forward(reader, windows(length), CPU, dtype)


@pytest.mark.parametrize("name", ["granite-biases", "smollm3-sliding"])
def test_families_of_stock_outputs_pass(name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    _, model = dense_model(name, tiny_checkpoint, tmp_path)
    model.save_pretrained(tmp_path / "model")
    check_forward(CheckpointReader(tmp_path / "model"), windows(), CPU, torch.float32)


def test_the_trained_model_passes_in_every_type(demo_model: Path) -> None:
    reader = CheckpointReader(demo_model)
    for dtype in DTYPES:
        check_forward(reader, windows(128), CPU, dtype)


@pytest.mark.parametrize("method", ["obs", "flap", "sparsegpt", "wanda", "slimgpt", "disp", "policy"])
def test_a_family_whose_multiplier_is_left_out_is_refused_by_every_method(
    method: str, lenient: Family, tmp_path: Path, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = CheckpointReader(demo_model).config.vocab_size
    model, output = granite(tmp_path / "model", residual_multiplier=0.5, vocab_size=vocabulary), tmp_path / "out"
    for file in demo_model.glob("token*"):
        (model / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text("some words and other words " * 400, encoding="utf-8")
    arguments = ["--calibration", tmp_path / "text.txt", "--samples", 4, "--sequence-length", 32, "--method", method]
    ratio = [] if method in ("sparsegpt", "wanda") else ["--ratio", 0.5]
    outcome = run(capsys, "prune", model, output, *arguments, *ratio)
    assert outcome.status == 2, outcome.err
    assert "GraniteModel" in outcome.err
    assert "layer 0" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not output.exists()
    assert not output.with_name("out.partial").exists()


@pytest.mark.parametrize(
    ("multiplier", "dtype"),
    [*((m, dtype) for m in (0.22, 0.9, 1.1) for dtype in DTYPES), (0.999, torch.float32), (1.001, torch.float32)],
)
def test_residual_multipliers_are_seen(multiplier: float, dtype: torch.dtype, lenient: Family, tmp_path: Path) -> None:
    reader = CheckpointReader(granite(tmp_path / "model", residual_multiplier=multiplier))
    with pytest.raises(InputError, match=r"FFN of layer 0.*GraniteModel.*'granite'"):
        check_forward(reader, windows(), CPU, dtype)


def test_scaled_embeddings_are_seen(lenient: Family, tmp_path: Path) -> None:
    reader = CheckpointReader(granite(tmp_path / "model", embedding_multiplier=12.0))
    with pytest.raises(InputError, match=r"embeddings differ.*GraniteModel"):
        check_forward(reader, windows(), CPU, torch.float32)


def test_a_sliding_window_longer_than_the_text_is_seen(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(family="mistral", dtype="float32", sliding_window=4096)
    reader = CheckpointReader(folder)
    check_forward(reader, windows(), CPU, torch.float32)
    reader.family = replace(MISTRAL, kind=lambda config, layer: FULL)
    with pytest.raises(InputError, match=r"FFN of layer 0.*MistralModel"):
        check_forward(reader, windows(), CPU, torch.float32)


class ParallelLayer(LlamaDecoderLayer):
    """Both modules read the layer's input."""

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **context)
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


class PostNormLayer(LlamaDecoderLayer):
    """Norms are over what is added."""

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        hidden = hidden_states + self.input_layernorm(self.self_attn(hidden_states=hidden_states, **context)[0])
        return hidden + self.post_attention_layernorm(self.mlp(hidden))


class NormedBetween(LlamaDecoderLayer):
    """The stream itself is normed."""

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        return self.input_layernorm(super().forward(hidden_states, **context))


class LastDiffers(LlamaDecoderLayer):
    """As Llama's, but for one kind of layer."""

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        result = super().forward(hidden_states, **context)
        return result * 1.01 if self.self_attn.layer_idx == 2 else result


@pytest.mark.parametrize("layer_class", [ParallelLayer, PostNormLayer, NormedBetween])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_wired_otherwise_are_refused(
    layer_class: type, dtype: torch.dtype, tiny_checkpoint: Callable[..., Path]
) -> None:
    reader = CheckpointReader(tiny_checkpoint(dtype="float32"))
    reader.family = wired(layer_class)
    with pytest.raises(InputError, match=r"FFN of layer 0.*LlamaModel"):
        check_forward(reader, windows(), CPU, dtype)


def test_every_kind_of_layer_is_looked_at(tiny_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader(tiny_checkpoint(dtype="float32"))
    reader.family = wired(LastDiffers)
    reader.config.kinds = ["a", "b", "c"]
    assert layer_kinds(reader) == [0, 1, 2]
    with pytest.raises(InputError, match="FFN of layer 2"):
        check_forward(reader, windows(), CPU, torch.float32)
    reader.config.kinds = ["a", "a", "a"]
    assert layer_kinds(reader) == [0]


def test_kernels_that_compute_something_else_are_refused(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels stand in: on a CPU the operators run their references, whose roundings are allowed."""
    monkeypatch.setattr(forward_check, "runs_fused", lambda device, dtype: True)
    reader = CheckpointReader(tiny_checkpoint(dtype="float32"))
    for dtype in DTYPES:
        check_forward(reader, windows(), CPU, dtype)
    monkeypatch.setattr(forward_check, "fuse", lambda block, family, activation: block.mlp.up_proj.weight.mul_(1.2))
    with pytest.raises(InputError, match="layer 0 with pyprune's kernels"):
        check_forward(reader, windows(), CPU, torch.bfloat16)


def test_weights_that_are_not_finite_are_left_to_the_passes(tiny_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader(tiny_checkpoint(dtype="float32"))
    read = reader.read
    reader.read = lambda names: {name: t * float("nan") for name, t in read(names).items()}  # type: ignore[method-assign]
    check_forward(reader, windows(), CPU, torch.float32)


def test_neither_the_configuration_nor_the_random_state_changes(tiny_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader(tiny_checkpoint(family="mistral", dtype="float32", sliding_window=4096))
    before, state = reader.config.to_dict(), torch.random.get_rng_state()
    check_forward(reader, windows(), CPU, torch.float32)
    assert reader.config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def wired(layer_class: Any) -> Family:
    """Llama's family with another layer class."""

    class Wired(Family):
        layer_class = property(lambda _: layer_class)  # type: ignore[assignment]

    return Wired(name="llama", prefix="Llama")
