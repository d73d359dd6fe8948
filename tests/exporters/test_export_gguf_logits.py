"""llama.cpp computes from an exported file what transformers computes from the checkpoint."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_models import change_config, pruned_copy, with_tokenizer
from test_export_gguf import ARCHITECTURES, KINDS, checkpoint, contents, pruned
from transformers import AutoTokenizer

from pyprune.calibration.source import TokenSource
from pyprune.checkpoint.load_model import load_model
from pyprune.errors import InputError
from pyprune.evaluation.llama_cpp import logits_gguf, perplexity_gguf, tokens_gguf
from pyprune.evaluation.perplexity import perplexity
from pyprune.exporters.gguf import write_gguf
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

CPU, FLOAT32 = torch.device("cpu"), torch.float32
# Float32 sums of up to 500 terms in another order, through three layers: a few 1e-6 on logits of unit scale.
EXACT = 1e-4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """llama.cpp's threads spin while they wait for each other: with busy cores a test took 22 s instead of 0.5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_ids(length: int) -> list[int]:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(5)).tolist()


def expected_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = load_model(folder, CPU, FLOAT32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def check_logits(file: Path, expected: torch.Tensor, ids: list[int], tolerance: float) -> None:
    """Logits within the tolerance, and the same most likely token wherever the tolerance leaves no choice."""
    logits = logits_gguf(file, ids)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < tolerance
    first, second = expected.topk(2).values.unbind(-1)
    clear = first - second > 2 * tolerance
    assert clear.float().mean() > 0.8
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_families(name: str, kind: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    if ARCHITECTURES[name][KINDS.index(kind)] is None:
        pytest.skip("llama.cpp has no architecture for it")
    source = checkpoint(name, tiny_checkpoint, tmp_path / "made")
    if kind != "dense":
        source = pruned(source, tmp_path / "pruned", kind == "biased")
    ids = random_ids(6 if "sliding" in name else 300)  # as far as the context length of the file
    write_gguf(source, tmp_path / "model.gguf", "f32")
    check_logits(tmp_path / "model.gguf", expected_logits(source, ids), ids, EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.01), ("bf16", 0.1), ("q8_0", 0.3)])
def test_types(dtype: str, tolerance: float, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Rounded weights and, in llama.cpp, rounded activations: 2^-11, 2^-8 and about 1/254 of the largest of 32."""
    source = checkpoint("llama-gqa-tied", tiny_checkpoint, tmp_path / "made")
    source, _ = pruned_copy(source, tmp_path / "pruned", [(2, 160), (1, 52), (1, 33)], True)
    ids = random_ids(64)
    expected = expected_logits(source, ids)
    write_gguf(source, tmp_path / "model.gguf", dtype)
    logits = logits_gguf(tmp_path / "model.gguf", ids)
    assert 1e-5 < (logits - expected).abs().max() < tolerance


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.7,
    },
}


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rope_scaling(family: str, rope: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """At positions far beyond the original length, in the dense model and with layers that differ."""
    made = tiny_checkpoint(family=family, dtype="float32", vocab_size=97, head_dim=16, tie=True)
    dense = with_tokenizer(made, tmp_path / "dense")
    ids = random_ids(500)
    unscaled = expected_logits(dense, ids)
    change_config(dense, rope_parameters={"rope_theta": 10000.0} | ROPES[rope])
    differing, _ = pruned_copy(dense, tmp_path / "differing", [(2, 160), (1, 52), (1, 33)], False)
    for number, source in enumerate((dense, differing)):
        file = tmp_path / f"{number}.gguf"
        if (family, rope) == ("qwen3", "llama3"):
            with pytest.raises(InputError, match="no llama3 rope scaling"):
                write_gguf(source, file, "f32")
            continue
        write_gguf(source, file, "f32")
        expected = expected_logits(source, ids)
        check_logits(file, expected, ids, EXACT)
    # The tolerance would not let a scaling pass that was lost.
    assert (expected_logits(dense, ids) - unscaled).abs().max() > 100 * EXACT


def test_perplexity(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The definition of evaluation.perplexity, over several decoding batches of a window and several windows."""
    source = checkpoint("llama-mha", tiny_checkpoint, tmp_path / "made")
    write_gguf(source, tmp_path / "model.gguf", "f32")
    windows = torch.tensor(random_ids(3 * 300)).view(3, 300)
    expected = perplexity(load_model(source, CPU, FLOAT32), windows)
    assert perplexity_gguf(tmp_path / "model.gguf", windows) == pytest.approx(expected, rel=1e-6)
    # The windows count alike, whatever their predictions: no other mean gives the same.
    single = [perplexity_gguf(tmp_path / "model.gguf", window[None]) for window in windows]
    assert math.prod(single) ** (1 / 3) == pytest.approx(expected, rel=1e-6)


def test_bad_files_and_ids(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="no such file"):
        tokens_gguf(file, [""])
    file.write_bytes(b"not GGUF" * 100)
    with pytest.raises(InputError, match=r"llama\.cpp cannot load it \(.*magic"):
        logits_gguf(file, [1])
    file.unlink()
    write_gguf(checkpoint("llama-mha", tiny_checkpoint, tmp_path / "made"), file)
    for ids in ([], [97], [-1]):
        with pytest.raises(InputError, match="from 0 to 96"):
            logits_gguf(file, ids)
    with pytest.raises(InputError, match="at least 1 window of 2 tokens"):
        perplexity_gguf(file, torch.zeros(3, 1, dtype=torch.int64))
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"pip install 'pyprune\[gguf\]'"):
        logits_gguf(file, [1])


@pytest.mark.shared
@pytest.mark.parametrize("compensation", ["bias", "none"])
def test_a_trained_model_pruned(compensation: str, demo_model: Path, shared_dir: Path, tmp_path: Path) -> None:
    """Layers of different sizes, with biases on o_proj and down_proj and without: tokens, logits, perplexity."""
    text = shared_dir / "data" / "wikitext2-test.txt"
    options = PruneConfig(
        model=str(demo_model),
        output=tmp_path / "pruned",
        method="flap",
        method_options={"compensation": compensation},
        ratio=0.3,
        calibration=str(shared_dir / "data" / "wikitext2-valid.txt"),
        samples=4,
        sequence_length=128,
        device="cpu",
        dtype="float32",
    )
    prune(options)
    model = load_model(tmp_path / "pruned", CPU, FLOAT32)
    windows = TokenSource(str(text), demo_model, model.config, CPU, FLOAT32).evaluation(256, 2, 0)
    ids = windows[0].tolist()
    with torch.no_grad():
        expected = model(windows[:1]).logits[0]
    for dtype in ("f32", "f16"):
        file = tmp_path / f"{dtype}.gguf"
        assert write_gguf(tmp_path / "pruned", file, dtype)["architecture"] == "deci"
        fields, tensors = contents(file)
        assert len(set(fields["feed_forward_length"])) > 1
        assert ("blk.0.ffn_down.bias" in tensors) == (compensation == "bias")
        # The logits' scale is 3.2; in f16 weights and activations are rounded to 2^-11 of themselves, in each of the
        # six layers: 0.0016 a rounding, of which 0.05 allows for a sum of thirty, all of one sign.
        check_logits(file, expected, ids, {"f32": 1e-3, "f16": 0.05}[dtype])
        assert perplexity_gguf(file, windows) == pytest.approx(perplexity(model, windows), rel=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    lines = [line for line in text.read_text().splitlines() if line.strip()][:20]
    assert tokens_gguf(tmp_path / "f16.gguf", lines) == tokenizer(lines)["input_ids"]
