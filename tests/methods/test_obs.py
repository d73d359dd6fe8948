"""obs and slimgpt through the pipeline: exact refits, the target, allocations, biases, checkpoints that load."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bad_models import overflowing
from support.command_line import run
from support.texts import harvest
from torch import Tensor
from transformers import AutoModelForCausalLM

from pyprune.architectures import expand
from pyprune.calibration.second_moments import HessianObserver
from pyprune.calibration.source import TokenSource
from pyprune.checkpoint import CheckpointReader
from pyprune.checkpoint.load_model import load_model
from pyprune.errors import InputError
from pyprune.evaluation.perplexity import perplexity
from pyprune.job.config import PruneConfig
from pyprune.methods import SecondOrderMethod, make_method
from pyprune.methods.obs import ALLOCATIONS, Obs
from pyprune.pipeline.run import prune

DAMPING = 0.01
CPU = torch.device("cpu")


class Layer:
    """Random correlated inputs with a mean, a weight, and a stream error that goes with the inputs; float64."""

    def __init__(self, channels: int, outputs: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.x = normal(6 * channels, channels) @ (normal(channels, channels) / channels**0.5) + normal(channels)
        self.weight = normal(outputs, channels)
        self.stream_error = self.x @ normal(channels, outputs) * 0.1 + normal(len(self.x), outputs) + normal(outputs)

    def reconstruct(self, method: SecondOrderMethod, count: int, width: int) -> Any:
        observer = HessianObserver(self.x.shape[1], torch.device("cpu"), "here", method.centred, False)
        observer.observe_stream_error(observer.observe(self.x), self.stream_error)
        second_moments = observer.result()
        # Statistics in float64: the observer's own are float32.
        mean = self.x.mean(0) if method.centred else torch.zeros(self.x.shape[1], dtype=torch.float64)
        offset = self.stream_error.mean(0) if method.centred else torch.zeros(self.weight.shape[0], dtype=torch.float64)
        x, r = self.x - mean, self.stream_error - offset
        for own, exact in ((second_moments.hessian, x.T @ x), (second_moments.cross, r.T @ x)):
            assert own is not None
            assert (own - exact).abs().max() <= 1e-4 * exact.abs().max()
        second_moments.hessian, second_moments.cross = x.T @ x, r.T @ x
        if method.centred:
            second_moments.mean, second_moments.stream_error = mean, offset
        return method.reconstruct(second_moments, self.weight, count, width, "here")

    def least_squares(self, kept: Tensor, share: float, centred: bool) -> tuple[Tensor, Tensor]:
        """The minimiser of |W x + share r - W' x_K - b|^2 + damping |W' - W_K|^2, by its normal equations."""
        ones = torch.ones(len(self.x), 1, dtype=torch.float64)
        goal = self.x @ self.weight.T + share * self.stream_error
        x = self.x - self.x.mean(0) if centred else self.x
        penalty = DAMPING * (x**2).sum(0).mean()
        inputs = torch.cat([self.x[:, kept], ones], 1) if centred else self.x[:, kept]
        gram, right = inputs.T @ inputs, inputs.T @ goal
        for k in range(len(kept)):
            gram[k, k] += penalty
        right[: len(kept)] += penalty * self.weight[:, kept].T
        solution = torch.linalg.solve(gram, right).T
        return solution[:, : len(kept)], solution[:, len(kept) :].sum(1)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("compensation", ["weights", "bias"])
@pytest.mark.parametrize("target", ["residual", "weights"])
def test_refit_is_least_squares_on_the_kept_units(width: int, compensation: str, target: str) -> None:
    layer = Layer(48, 20, seed=width)
    method = Obs(target=target, compensation=compensation)
    assert method.damping == DAMPING
    chosen = layer.reconstruct(method, 18 // width, width)
    share = 0.5 if target == "residual" else 0.0
    weight, bias = layer.least_squares(expand(chosen.kept, width), share, method.centred)
    assert (chosen.weight - weight).abs().max() <= 1e-8 * weight.abs().max()
    if method.centred:
        # The refit's bias is exact for its weights: what the mean asks for.
        assert (chosen.bias - bias).abs().max() <= 1e-8 * bias.abs().max()
    else:
        assert chosen.bias is None


def test_nothing_removed_still_corrects() -> None:
    layer = Layer(16, 8)
    chosen = layer.reconstruct(Obs(), 0, 1)
    weight, _ = layer.least_squares(torch.arange(16), 0.5, False)
    assert (chosen.weight - weight).abs().max() <= 1e-8 * weight.abs().max()


@pytest.mark.parametrize("width", [1, 4])
def test_without_compensation_only_the_choice_is_made(width: int) -> None:
    """The units are those of a fit to the projection's own output; their weights, also of a dead channel, stay."""
    layer = Layer(16, 8)
    layer.x[:, 5] = 0
    chosen = layer.reconstruct(Obs(compensation="none"), 8 // width, width)
    fitted = layer.reconstruct(Obs(target="weights"), 8 // width, width)
    assert chosen.kept.tolist() == fitted.kept.tolist()
    assert torch.equal(chosen.weight, layer.weight[:, expand(chosen.kept, width)])
    assert chosen.bias is None
    assert not torch.equal(chosen.weight, fitted.weight)
    whole = layer.reconstruct(Obs(compensation="none"), 0, width)
    assert torch.equal(whole.weight, layer.weight)


def test_dead_channels_are_the_first_to_go() -> None:
    layer = Layer(16, 8)
    layer.x[:, [3, 7]] = 0
    chosen = layer.reconstruct(Obs(), 2, 1)
    assert chosen.kept.tolist() == [k for k in range(16) if k not in (3, 7)]
    assert chosen.scores[3] == chosen.scores[7] == 0


@pytest.mark.parametrize(("name", "value"), [("allocation", "x"), ("target", "x"), ("compensation", "x")])
def test_options_are_checked(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"obs has no {name} '{value}'; one of"):
        make_method("obs", {name: value})
    with pytest.raises(InputError, match="target share"):
        make_method("obs", {"target_share": 0.0})
    with pytest.raises(InputError, match="input share"):
        make_method("obs", {"input_share": 1.5})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(harvest(800))
    return path


def pruned(model: Path, text: Path, output: Path, method: str, ratio: float = 0.4, **options: Any) -> dict[str, Any]:
    return prune(
        PruneConfig(str(model), output, method, ratio, options, str(text), samples=16, sequence_length=64, device="cpu")
    ).to_json()


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "slimgpt", {}),
        ("llama", "obs", {"compensation": "bias"}),
        pytest.param("llama", "obs", {}, marks=pytest.mark.slow),
        ("qwen2", "obs", {}),
        pytest.param("qwen3", "obs", {}, marks=pytest.mark.slow),
        pytest.param("mistral", "obs", {}, marks=pytest.mark.slow),
    ],
)
def test_the_result_loads_and_meets_its_ratio(
    tiny_checkpoint: Callable[..., Path],
    demo_model: Path,
    text: Path,
    tmp_path: Path,
    family: str,
    method: str,
    options: dict[str, Any],
) -> None:
    model = tiny_checkpoint(family=family, dtype="bfloat16", layers=4, tokenizer=demo_model)
    plan = pruned(model, text, tmp_path / "out", method, **options)
    assert plan["ratio"]["met"] == pytest.approx(0.4, abs=0.02)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    biases = [name for name in loaded.state_dict() if name.endswith(("o_proj.bias", "down_proj.bias"))]
    assert bool(biases) == (options.get("compensation") == "bias")
    ids = torch.randint(2, 100, (1, 12))
    with torch.no_grad():
        assert torch.isfinite(loaded(ids).logits).all()
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)


@pytest.mark.slow
def test_every_allocation(tiny_checkpoint: Callable[..., Path], demo_model: Path, text: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(family="llama", dtype="float32", layers=4, tokenizer=demo_model)
    sizes = {}
    for allocation in ALLOCATIONS:
        plan = pruned(model, text, tmp_path / allocation, "obs", allocation=allocation)
        assert plan["ratio"]["met"] == pytest.approx(0.4, abs=0.02)
        sizes[allocation] = [len(layer["intermediate_channels"]) for layer in plan["layers"]]
    assert len(set(sizes["uniform"])) == 1
    assert sizes["log"] == sorted(sizes["log"], reverse=True)
    assert len({tuple(own) for own in sizes.values()}) >= 4
    # The calibration pass is kept, and another ratio reads it.
    again = pruned(model, text, tmp_path / "again", "obs", ratio=0.2)
    assert again["passes"]["calibration"]["cached"] is True


def test_what_reads_the_stream_is_fitted_to_its_change(
    tiny_checkpoint: Callable[..., Path], demo_model: Path, text: Path, tmp_path: Path
) -> None:
    """gate and up of layer 0 are W (I + D A): by transformers' own modules and a float64 solution of the definition."""
    model = tiny_checkpoint(family="llama", dtype="float32", layers=2, tokenizer=demo_model)
    plan = pruned(model, text, tmp_path / "out", "obs", ratio=0.5, allocation="uniform")
    reader, result = CheckpointReader(model), CheckpointReader(tmp_path / "out")
    windows = TokenSource(str(text), model, reader.config, torch.device("cpu"), torch.float32).calibration(16, 64, 0)
    streams = []
    for folder in (model, tmp_path / "out"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
        seen: list[Tensor] = []
        loaded.layers[0].post_attention_layernorm.register_forward_hook(lambda _, a, out, seen=seen: seen.append(out))
        with torch.no_grad():
            loaded(windows)
        streams.append(seen[0].flatten(0, 1).double())
    dense, x = streams
    hessian = x.T @ x
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    fit = torch.eye(len(hessian)) + torch.linalg.solve(hessian, x.T @ (dense - x)).T
    kept = plan["layers"][0]["intermediate_channels"]
    before, after = reader.read_layer(0), result.read_layer(0)
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        expected = (before[name].double() @ fit)[kept]
        change = (expected - before[name][kept]).norm()
        assert change > 0.01 * expected.norm()
        assert (after[name] - expected).norm() <= 1e-3 * change
    # At the first norm both streams are the same.
    groups = torch.tensor(plan["layers"][0]["kv_groups"])
    rows = expand(groups, reader.shapes[0].head_dim)
    assert torch.equal(after["self_attn.k_proj.weight"], before["self_attn.k_proj.weight"][rows])


@pytest.mark.slow
def test_obs_beats_slimgpt_and_flap_on_a_trained_model(demo_model: Path, tmp_path: Path) -> None:
    source = TokenSource("self", demo_model, CheckpointReader(demo_model).config, CPU, torch.float32)
    windows = source.evaluation(64, 16, 0)
    sizes = {"samples": 32, "sequence_length": 64, "device": "cpu"}
    found = {}
    for method in ("flap", "slimgpt", "obs"):
        prune(PruneConfig(str(demo_model), tmp_path / method, method, 0.3, calibration="self", **sizes))
        found[method] = perplexity(load_model(tmp_path / method, CPU, torch.float32), windows)
    assert found["obs"] < found["slimgpt"] < found["flap"]


@pytest.mark.parametrize("method", ["slimgpt", "obs"])
def test_odd_layers(
    tiny_checkpoint: Callable[..., Path], demo_model: Path, text: Path, tmp_path: Path, method: str
) -> None:
    """One KV head, so that units are query heads, an odd number of channels, and a layer whose FFN is dead."""
    model = tiny_checkpoint(
        family="llama", dtype="float32", layers=3, heads=2, kv_heads=1, intermediate_size=163, tokenizer=demo_model
    )
    dead = tmp_path / "dead"
    shutil.copytree(model, dead)
    (file,) = dead.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    plan = pruned(dead, text, tmp_path / "out", method, ratio=0.2)
    assert plan["ratio"]["met"] == pytest.approx(0.2, abs=0.01)
    assert all(1 <= len(layer["kv_groups"]) <= 2 for layer in plan["layers"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(t).all() for t in loaded.state_dict().values())
    if method == "obs":  # what costs nothing goes first
        assert len(plan["layers"][1]["intermediate_channels"]) < 60


@pytest.mark.parametrize("method", ["slimgpt", "obs"])
def test_a_ratio_that_rounds_to_no_unit(
    tiny_checkpoint: Callable[..., Path], demo_model: Path, text: Path, tmp_path: Path, method: str
) -> None:
    model = tiny_checkpoint(family="llama", dtype="float32", layers=3, tokenizer=demo_model)
    plan = pruned(model, text, tmp_path / "out", method, ratio=0.0005)
    assert all(len(layer["intermediate_channels"]) == 160 for layer in plan["layers"])
    assert plan["ratio"]["met"] == 0


def test_allow_nonfinite_counts_what_it_left_out(
    tiny_checkpoint: Callable[..., Path], demo_model: Path, text: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoint(family="llama", dtype="float32", layers=3, tokenizer=demo_model)
    bad = overflowing(model, tmp_path / "bad")
    options = PruneConfig(
        str(bad), tmp_path / "out", "obs", 0.3, {}, str(text), samples=16, sequence_length=64, device="cpu",
        allow_nonfinite=True,
    )  # fmt: skip
    plan = prune(options).to_json()
    assert plan["nonfinite"]["layer 1 (mlp.down_proj)"] == 16 * 64


def test_a_hessian_that_needs_more_damping_is_reported(
    tiny_checkpoint: Callable[..., Path],
    demo_model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No real Hessian is indefinite, so one is made so: by a negative eigenvalue of 5 % of its diagonal's mean."""
    model = tiny_checkpoint(family="llama", dtype="float32", layers=2, tokenizer=demo_model)
    finish = HessianObserver.result

    def spoiled(self: HessianObserver, share: float) -> Any:
        second_moments = finish(self)
        values, vectors = torch.linalg.eigh(second_moments.hessian)
        mean = float(second_moments.hessian.diagonal().mean())
        vector = vectors[:, 0]
        second_moments.hessian -= (float(values[0]) + share * mean) * torch.outer(vector, vector)
        return second_moments

    monkeypatch.setattr(HessianObserver, "result", lambda self: spoiled(self, 0.05))
    plan = pruned(model, text, tmp_path / "raised", "slimgpt")
    assert any("layer 1 (mlp.down_proj)" in w and "0.1 was taken" in w for w in plan["warnings"])
    monkeypatch.setattr(HessianObserver, "result", lambda self: spoiled(self, 50.0))
    with pytest.raises(InputError, match=r"layer 0 \(self_attn.o_proj\): the Hessian is not positive definite"):
        pruned(model, text, tmp_path / "hopeless", "slimgpt")


@pytest.mark.slow
def test_few_tokens_are_warned_of(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "prune", demo_model, tmp_path / "out", "--method", "obs", "--ratio", 0.3, "--json",
                  "--calibration", "self", "--samples", 4, "--sequence-length", 32, "--device", "cpu")  # fmt: skip
    assert outcome.status == 0, outcome.err
    (warning,) = outcome.json["warnings"]
    assert "128 calibration tokens for up to 704 channels" in warning
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(t).all() for t in loaded.state_dict().values())
