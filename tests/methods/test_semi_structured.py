"""wanda, dass and sparsegpt from folder to folder: weights against their formulas, resuming, what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.families import family_checkpoint
from support.proofs import prove_here
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pyprune.calibration.source import TokenSource
from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError
from pyprune.job.config import PruneConfig
from pyprune.methods.pattern import parse_pattern
from pyprune.methods.weight_sparsity import linears_of
from pyprune.ops.sparsify import sparsify_reference
from pyprune.pipeline.run import prune
from pyprune.runtime.progress import silent

METHODS = ("wanda", "sparsegpt", "dass")
SAMPLES, LENGTH = 6, 32
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], demo_model: Path) -> Path:
    return tiny_checkpoint(
        family="llama", hidden_size=64, intermediate_size=160, heads=4, kv_heads=2, layers=2, dtype="float32",
        tokenizer=demo_model,
    )  # fmt: skip


def options(
    model: Path, text: Path, output: Path, method: str, pattern: str = "2:4", ratio: float | None = None, **changes: Any
) -> PruneConfig:
    own = {"pattern": pattern, **changes.pop("method_options", {})}
    return PruneConfig(
        str(model), output, method, ratio, own, str(text), samples=SAMPLES, sequence_length=LENGTH, device="cpu",
        cache=output.parent / "cache", **changes,
    )  # fmt: skip


def keep(seen: dict[str, Tensor], name: str, linear: nn.Module, arguments: tuple[Tensor]) -> None:
    seen[name] = arguments[0].flatten(0, 1).double()


def inputs_by_layer(model: Path, text: Path, sparse: Path) -> list[dict[str, Tensor]]:
    """Inputs [tokens, in] of every linear, float64: each layer's on the sparse layers before it."""
    reader = CheckpointReader(model)
    cpu, float32 = torch.device("cpu"), torch.float32
    windows = TokenSource(str(text), model, reader.config, cpu, float32).calibration(SAMPLES, LENGTH, 0)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=float32)
    result = AutoModelForCausalLM.from_pretrained(sparse, dtype=float32)
    found = []
    for layer, block in enumerate(whole.model.layers):
        seen: dict[str, Tensor] = {}
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(partial(keep, seen, name))
            for name in linears_of(reader.family)
        ]
        with torch.no_grad():
            whole(windows)
        for hook in hooks:
            hook.remove()
        found.append(seen)
        block.load_state_dict(result.model.layers[layer].state_dict())
    return found


def weights_of(model: Path) -> list[dict[str, Tensor]]:
    """The linears of every layer, float64."""
    reader = CheckpointReader(model)
    return [
        {name: reader.read_layer(layer)[name + ".weight"].double() for name in linears_of(reader.family)}
        for layer in range(reader.layers)
    ]


def removed_by_sorting(scores: Tensor, pattern: str, ratio: float) -> Tensor:
    """What goes in each row, row by row in Python."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    kept, group = (int(n) for n in pattern.split(":")) if ":" in pattern else (0, scores.shape[1])
    zeros = group - kept if kept else int(ratio * group)
    for row, values in enumerate(scores.tolist()):
        for first in range(0, scores.shape[1], group):
            for k in sorted(range(first, first + group), key=values.__getitem__)[:zeros]:
                mask[row, k] = True
    return mask


@pytest.mark.parametrize("method", ["wanda", "dass"])
@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", None), ("4:8", None), ("unstructured", 0.3)])
def test_masks_are_the_papers(
    method: str, pattern: str, ratio: float | None, model: Path, text: Path, tmp_path: Path
) -> None:
    """Scores from the whole model's own inputs; what a rounding of a norm may turn around is left out."""
    prune(options(model, text, tmp_path / "out", method, pattern, ratio))
    dense, sparse = weights_of(model), weights_of(tmp_path / "out")
    for layer, inputs in enumerate(inputs_by_layer(model, text, tmp_path / "out")):
        middle = inputs["mlp.down_proj"].norm(dim=0)
        for name, weight in dense[layer].items():
            scores, own = weight.abs() * inputs[name].norm(dim=0), sparse[layer][name]
            if method == "dass" and name in GATE_UP:
                scores, own, weight = (weight.abs() * middle.sqrt()[:, None]).T, own.T, weight.T
            mask = removed_by_sorting(scores, pattern, ratio or 0.0)
            differ = mask != (own == 0)
            assert differ.sum() <= 1e-3 * differ.numel(), (layer, name)
            assert torch.equal(own[own != 0], weight[own != 0])


@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", None), ("4:8", None), ("unstructured", 0.5)])
def test_sparsegpt_is_the_papers(pattern: str, ratio: float | None, model: Path, text: Path, tmp_path: Path) -> None:
    """Each linear alone in float64, from the whole model's inputs: most rows alike, and the loss of all."""
    plan = prune(options(model, text, tmp_path / "out", "sparsegpt", pattern, ratio)).to_json()
    dense, sparse = weights_of(model), weights_of(tmp_path / "out")
    own = parse_pattern(pattern)
    for layer, inputs in enumerate(inputs_by_layer(model, text, tmp_path / "out")):
        for name, weight in dense[layer].items():
            x = inputs[name]
            h = 2 / SAMPLES * x.T @ x
            damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
            factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
            expected = weight.clone()
            losses = sparsify_reference(expected, factor, own.zeros, own.group, ratio or 0.0)
            alike = ((expected == 0) == (sparse[layer][name] == 0)).all(1)
            assert alike.double().mean() > 0.8, (layer, name)
            difference = (expected - sparse[layer][name])[alike].norm() / expected.norm()
            assert difference <= 1e-3, (layer, name)
            loss = losses.sum() / ((weight @ h) * weight).sum()
            assert plan["layers"][layer]["linears"][name]["loss"] == pytest.approx(loss.item(), rel=1e-2)


WRITTEN = [(method, *kind) for method in METHODS for kind in (("1:4", None, 0.75), ("unstructured", 0.3, 0.3))]


@pytest.mark.parametrize(("method", "pattern", "ratio", "zeros"), WRITTEN)
def test_what_is_written(
    method: str,
    pattern: str,
    ratio: float | None,
    zeros: float,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stock class of the same shapes, proved; the plan counts the zeros that are there."""
    prove_here(monkeypatch)
    plan = prune(options(model, text, tmp_path / "out", method, pattern, ratio, verify=True)).to_json()
    assert plan["verification"]["verified"], plan["verification"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is LlamaForCausalLM
    linears = [p for name, p in loaded.model.layers.named_parameters() if p.dim() == 2]
    found = sum(int((p == 0).sum()) for p in linears)
    total = sum(p.numel() for p in linears)
    assert plan["parameters"]["decoder_linears"] == [total, total - found]
    assert plan["ratio"]["met"] == pytest.approx(found / total)
    assert abs(plan["ratio"]["met"] - zeros) <= 0.02  # int(ratio · n) of short rows
    assert plan["ratio"]["asked"] == (ratio or zeros)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Share of zeros in each linear" in page
    assert ("What the zeros cost" in page) == (method == "sparsegpt")


@pytest.mark.parametrize("family", ["qwen2-biases", "qwen3-qk-norm", "mistral-sliding"])
def test_biases_and_norms_stay(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint(family, tiny_checkpoint, tmp_path)
    windows = torch.randint(0, 97, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(5))
    prove_here(monkeypatch)
    plan = prune(
        replace(options(folder, folder, tmp_path / "out", "sparsegpt", verify=True), calibration=windows)
    ).to_json()
    assert plan["verification"]["verified"]
    before, after = CheckpointReader(folder), CheckpointReader(tmp_path / "out")
    linears = {name + ".weight" for name in linears_of(before.family)}
    for layer in range(before.layers):
        dense, sparse = before.read_layer(layer), after.read_layer(layer)
        assert dense.keys() == sparse.keys()
        for name, tensor in dense.items():
            assert torch.equal(tensor, sparse[name]) == (name not in linears)


class Killed(BaseException):
    """Ends a run as a signal would."""


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_same_bits(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    prune(options(model, text, tmp_path / "whole", method))

    def kill(what: str, done: int, total: int) -> None:
        if what == "prune" and done == 1:
            raise Killed

    with pytest.raises(Killed):
        prune(options(model, text, tmp_path / "out", method), kill)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="cannot resume with other settings: options"):
        prune(options(model, text, tmp_path / "out", method, "4:8", resume=True))
    prune(options(model, text, tmp_path / "out", method, resume=True), silent)
    files = [{f.name: f.read_bytes() for f in (tmp_path / d).glob("*.safetensors")} for d in ("whole", "out")]
    assert files[0] == files[1]


def test_dead_channels_lose_their_weights(model: Path, text: Path, tmp_path: Path) -> None:
    """Columns of an input that is always zero are set to zero, as SparseGPT's authors do."""
    folder = tmp_path / "dead"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][5] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    prune(options(folder, text, tmp_path / "out", "sparsegpt"))
    query = weights_of(tmp_path / "out")[0]["self_attn.q_proj"]
    assert (query[:, 5] == 0).all()
    assert query.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_plan_says_what_it_takes(method: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--on", "h200")):
        result = run(capsys, "plan", model, "--method", method, "--json", *arguments).json
        before, after = result["parameters"]["decoder_linears"]
        assert after == before / 2
        assert result["bytes"][0] == result["bytes"][1]
        assert result["passes"][0]["pass"] == "prune"
        assert result["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wanda", "--pattern", "5:4"), "--pattern '5:4' is no pattern: N:M"),
        (("wanda", "--pattern", "half"), "--pattern 'half' is no pattern: N:M"),
        (("wanda", "--pattern", "2:4", "--ratio", 0.3), "--ratio 0.3 does not go with --pattern 2:4, which zeroes 0.5"),
        (("sparsegpt", "--pattern", "unstructured"), "Missing option '--ratio'"),
        (("sparsegpt", "--pattern", "unstructured", "--ratio", 1.2), "ratio 1.2 is outside (0, 1)"),
        (("sparsegpt", "--pattern", "3:7"), "--pattern 3:7 does not divide the weights of layer 0 (self_attn.q_proj)"),
        (("dass", "--pattern", "2:64"), "--pattern 2:64 does not divide the weights of layer 0 (mlp.gate_proj)"),
        (
            ("dass", "--uniform"),
            "method dass has no option --uniform, which magnitude, wanda-sp, flap",
        ),
        (("flap", "--pattern", "2:4", "--ratio", 0.3), "method flap has no option --pattern"),
        (("wanda", "--damping", 0.1), "method wanda has no option --damping"),
        (("wanda", "--compensation", "weights"), "method wanda has no option --compensation"),
    ],
)
def test_refused_in_one_line(
    arguments: tuple[Any, ...],
    message: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    outcome = run(capsys, "prune", model, tmp_path / "out", "--calibration", text, "--method", *arguments)
    assert outcome.status == 2
    assert message in outcome.err.replace("\n", " ")
    assert "Traceback" not in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_few_tokens_are_warned_of_where_weights_are_refitted(model: Path, text: Path, tmp_path: Path) -> None:
    for method in METHODS:
        warnings = prune(options(model, text, tmp_path / method, method), silent).warnings
        refits = method == "sparsegpt"
        assert len(warnings) == refits
        assert all("192 calibration tokens for up to 160 channels of a linear layer's input" in w for w in warnings)


def test_patterns() -> None:
    pattern = parse_pattern("1:4")
    assert (pattern.zeros, pattern.group, pattern.ratio) == (3, 4, 0.75)
    scores = torch.tensor([[3.0, 1, 2, 2, 0, 0, 0, 1]])
    assert parse_pattern("2:4").lowest(scores, 0.0).tolist() == [[False, True, True, False, True, True, False, False]]
    assert parse_pattern("unstructured").lowest(scores, 0.4).tolist() == [[False] * 4 + [True] * 3 + [False]]
    assert json.dumps(parse_pattern("unstructured").ratio) == "null"
