"""disp and policy from folder to folder: what they write, how they go on, and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import run
from support.proofs import prove_here
from support.written import checkpoint_bytes
from torch import Tensor
from transformers import AutoModelForCausalLM

from pyprune.architectures import ATTENTION, FFN, SUBLAYERS
from pyprune.architectures.channel_selection import ATTENTION_OUT, FFN_OUT, SELECTIONS, width
from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError
from pyprune.forward.layer_forward import LayerForward
from pyprune.job import job as jobs
from pyprune.job import memory as memories
from pyprune.job.config import PruneConfig
from pyprune.mask_training import training
from pyprune.mask_training.budget import TOLERANCE, kept_share
from pyprune.mask_training.masked_model import masking_hooks, selection_masks
from pyprune.modeling import SELECTED_CLASSES
from pyprune.passes.refit import Refit
from pyprune.pipeline.run import prune
from pyprune.runtime import device as devices
from pyprune.runtime.progress import silent

METHODS = ("disp", "policy")
CPU = torch.device("cpu")


# Wide enough that one channel is far less than half a percent of it.
SIZES = {"family": "llama", "hidden_size": 96, "intermediate_size": 256, "heads": 6, "kv_heads": 3, "layers": 4}


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], demo_model: Path) -> Path:
    return tiny_checkpoint(**SIZES, tokenizer=demo_model)


def options(model: Path, text: Path, output: Path, method: str, ratio: float = 0.4, **changes: Any) -> PruneConfig:
    own = {"steps": 6, **changes.pop("method_options", {})}
    return PruneConfig(
        str(model), output, method, ratio, own, str(text), samples=6, sequence_length=32, device="cpu",
        cache=output.parent / "cache", **changes,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kv_heads"), [({}, 3), ({"round_to": 16}, 3), ({"gate": "gumbel", "warm_start": "moments"}, 6)]
)
def test_disp_writes_a_model_that_is_the_masked_one(
    changes: dict[str, Any],
    kv_heads: int,
    tiny_checkpoint: Callable[..., Path],
    demo_model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The proof compares the written model, loaded (once in a fresh process), with the dense one under the masks."""
    if changes:
        prove_here(monkeypatch)
    model = tiny_checkpoint(**SIZES | {"kv_heads": kv_heads}, tokenizer=demo_model)
    plan = prune(options(model, text, tmp_path / "out", "disp", method_options=changes, verify=True)).to_json()
    assert plan["verification"]["verified"], plan["verification"]
    assert abs(plan["ratio"]["met"] - 0.4) <= TOLERANCE
    reader = CheckpointReader(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is SELECTED_CLASSES["llama"][2]
    counts = [{name: len(layer[name]) for name in SELECTIONS} for layer in plan["layers"]]
    assert loaded.config.selections == counts
    assert plan["ratio"]["met"] == pytest.approx(1 - kept_share(reader.shapes, counts), abs=1e-6)
    linears = sum(p.numel() for name, p in loaded.model.layers.named_parameters() if p.dim() == 2)
    assert plan["parameters"]["decoder_linears"][1] == linears
    for layer, block in zip(plan["layers"], loaded.model.layers, strict=True):
        assert block.ffn_in.tolist() == layer["ffn_in"]
        multiple = changes.get("round_to", 1)
        for name, dense in ((name, width(reader.shapes[0], name)) for name in SELECTIONS):
            assert len(layer[name]) % multiple == 0 or len(layer[name]) == dense
            assert len(layer["scores"][name]) == dense
    assert len(plan["training"]["loss"]) == 6
    stored = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert {tensor.dtype for tensors in stored for tensor in tensors.values()} == {torch.bfloat16, torch.int32}
    assert not (tmp_path / "out" / training.FILE).exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Channels that the FFN adds to" in page
    assert "6 steps; loss" in page


@pytest.mark.slow
def test_policy_writes_a_pruned_model(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove_here(monkeypatch)
    plan = prune(options(model, text, tmp_path / "out", "policy", verify=True)).to_json()
    assert plan["verification"]["verified"]
    assert abs(plan["ratio"]["met"] - 0.4) <= 0.03  # a KV group is six percent of this model
    assert plan["passes"].keys() == {"calibration", "train", "prune"}
    for layer in plan["layers"]:
        assert 1 <= len(layer["kv_groups"]) <= 3
    biased = prune(
        options(model, text, tmp_path / "biased", "policy", method_options={"compensation": "bias"})
    ).to_json()
    assert [layer["kv_groups"] for layer in biased["layers"]] == [layer["kv_groups"] for layer in plan["layers"]]
    assert json.loads((tmp_path / "biased" / "config.json").read_text())["o_proj_bias"]


class Killed(BaseException):
    """Ends a run as a signal would."""


@pytest.mark.parametrize(
    ("method", "moment"), [("disp", "train"), pytest.param("policy", "prune", marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_to_the_same_bits(
    method: str, moment: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_learning.py has the training of both resumed."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    whole = prune(options(model, text, tmp_path / "whole", method)).to_json()

    def kill(what: str, done: int, total: int) -> None:
        if what.split(":")[0] == moment and done == 3:
            raise Killed

    with pytest.raises(Killed):
        prune(options(model, text, tmp_path / "out", method), kill)
    assert not (tmp_path / "out").exists()
    steps: list[int] = []

    def count(what: str, done: int, total: int) -> None:
        if what.startswith("train"):
            steps.append(done)

    with pytest.raises(InputError, match=r"cannot resume with other settings: options \(was .*'steps': 6"):
        prune(options(model, text, tmp_path / "out", method, method_options={"steps": 7}, resume=True))
    resumed = prune(options(model, text, tmp_path / "out", method, resume=True), count).to_json()
    assert steps == ([3, 4, 5, 6] if moment == "train" else [])
    assert checkpoint_bytes(tmp_path / "out") == checkpoint_bytes(tmp_path / "whole")
    assert resumed["layers"] == whole["layers"]
    assert resumed["training"] == whole["training"]


@pytest.mark.parametrize("method", ["disp", pytest.param("policy", marks=pytest.mark.slow)])
def test_the_seed_decides(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    plans = [
        prune(options(model, text, tmp_path / name, method, seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    ]
    assert checkpoint_bytes(tmp_path / "first") == checkpoint_bytes(tmp_path / "again")
    assert plans[0].layers != plans[2].layers


def test_refit_comes_nearer_to_the_whole_modules(model: Path, text: Path, tmp_path: Path) -> None:
    """Outputs of the kept rows against those of the dense sublayer on the same hidden states, layer by layer."""
    reader = CheckpointReader(model)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(reader.config.vocab_size, (32, 32), generator=generator)
    selection = {
        name: torch.randperm(width(reader.shapes[0], name), generator=generator)[: width(reader.shapes[0], name) // 2]
        .sort()
        .values
        for name in SELECTIONS
    }
    forward = LayerForward(reader, windows, CPU, torch.float32)
    refit = Refit(forward)
    masks = selection_masks(reader.shapes[0], selection, CPU, torch.float32)

    def output(block: torch.nn.Module, module: str, hidden: Tensor) -> Tensor:
        return forward.run_sublayer(block, 0, module, hidden) - hidden

    with torch.no_grad():
        dense = forward.build(reader.stream_layer(0), 0)
        hidden = {ATTENTION: refit.hidden.data.clone()}
        fitted = refit.layer(forward.build(reader.stream_layer(0), 0), 0, selection)
        errors = {}
        for changed in (False, True):
            block = forward.build(reader.stream_layer(0), 0)
            for module, out in ((ATTENTION, ATTENTION_OUT), (FFN, FFN_OUT)):
                name = reader.family.output_proj(module) + ".weight"
                rows = selection[out]
                columns = selection["ffn_middle"] if module == FFN else torch.arange(fitted[name].shape[1])
                if changed:
                    block.get_parameter(name).data[rows[:, None], columns] = fitted[name]
                elif module == FFN:  # both are judged on the hidden states that the fitted attention leaves
                    continue
                with masking_hooks(block, reader.family, masks):
                    hidden[FFN] = hidden[ATTENTION] + output(block, ATTENTION, hidden[ATTENTION])
        plain, better = (forward.build(reader.stream_layer(0), 0) for _ in range(2))
        for module, out in ((ATTENTION, ATTENTION_OUT), (FFN, FFN_OUT)):
            name, rows = reader.family.output_proj(module) + ".weight", selection[out]
            columns = selection["ffn_middle"] if module == FFN else torch.arange(fitted[name].shape[1])
            better.get_parameter(name).data[rows[:, None], columns] = fitted[name]
            target = output(dense, module, hidden[module])[..., rows]
            for which, block in (("plain", plain), ("fitted", better)):
                with masking_hooks(block, reader.family, masks):
                    errors[module, which] = (output(block, module, hidden[module])[..., rows] - target).square().sum()
    for module in SUBLAYERS:
        assert errors[module, "fitted"] < 0.9 * errors[module, "plain"], errors
    with masking_hooks(better, reader.family, masks), torch.no_grad():
        expected = hidden[FFN] + output(better, FFN, hidden[FFN])
    torch.testing.assert_close(refit.hidden.data, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_refitted_model_is_the_masked_one_with_new_drivers(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_here(monkeypatch)
    own = {"compensation": "weights"}
    plan = prune(options(model, text, tmp_path / "out", "disp", method_options=own, verify=True)).to_json()
    assert plan["verification"]["verified"]
    plain = prune(options(model, text, tmp_path / "plain", "disp")).to_json()
    assert plan["layers"] == plain["layers"]
    assert checkpoint_bytes(tmp_path / "out") != checkpoint_bytes(tmp_path / "plain")


def test_plan_says_what_training_takes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in METHODS:
        shown = run(capsys, "plan", model, "--method", method, "--ratio", 0.4, "--steps", 10, "--json")
        assert shown.status == 0, shown.err
        steps = {step["pass"]: step["flops"] for step in shown.json["passes"]}
        assert ("calibration" in steps) == (method == "policy")
        assert steps["train"] > 0
        named = run(capsys, "plan", model, "--method", method, "--ratio", 0.4, "--on", "h100", "--json").json
        assert named["peak_memory_by_pass"]["train"] > 0
        assert named["recomputed_activations"] is False
    refused = run(capsys, "plan", model, "--method", "disp", "--ratio", 0.4, "--on", "h100", "--device-memory", "10MB")
    assert refused.status == 2


def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, text: Path, *arguments: object) -> str:
    shown = run(
        capsys, "prune", model, tmp_path / "out", "--calibration", text, "--samples", 4, "--sequence-length", 32,
        "--device", "cpu", *arguments,
    )  # fmt: skip
    assert shown.status == 2
    assert list(tmp_path.glob("out*")) == []
    lines = [line for line in shown.err.splitlines() if line.strip()]
    assert len(lines) == 1
    return lines[0]


def test_refuses_in_one_line(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(*arguments: object) -> str:
        return refusal(capsys, tmp_path, model, text, *arguments)

    assert "at most 0.9" in line("--method", "disp", "--ratio", 0.9999)
    assert "is outside (0, 1)" in line("--method", "disp", "--ratio", 1.2)
    assert "at most 0." in line("--method", "policy", "--ratio", 0.999)
    assert "'hard' is not one of reinmax, gumbel" in line("--method", "disp", "--ratio", 0.4, "--gate", "hard")
    assert "not one of gradients, moments, none" in line("--method", "disp", "--ratio", 0.4, "--warm-start", "obs")
    assert "'obs' is not one of flap, wanda-sp" in line("--method", "policy", "--ratio", 0.4, "--start", "obs")
    assert "method disp has no option --uniform" in line("--method", "disp", "--ratio", 0.4, "--uniform")
    assert "method policy has no option --round-to" in line("--method", "policy", "--ratio", 0.4, "--round-to", 8)
    assert "--learning-rate 0.0 is not positive" in line("--method", "disp", "--ratio", 0.4, "--learning-rate", 0)
    for value in ("nan", "inf", "-1"):
        assert "is not positive and finite" in line("--method", "disp", "--ratio", 0.4, "--learning-rate", value)
    assert "disp has no compensation 'bias'" in line("--method", "disp", "--ratio", 0.4, "--compensation", "bias")
    assert "method flap has no option --steps" in line("--method", "flap", "--ratio", 0.4, "--steps", 5)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    for method in METHODS:
        said = refusal(capsys, tmp_path, model, short, "--method", method, "--ratio", 0.4)
        assert "tokens" in said
        assert "32" in said
    monkeypatch.setattr(memories, "usable_memory", lambda device: 1 << 20)
    for method in METHODS:
        said = line("--method", method, "--ratio", 0.4)
        assert f"{method} trains on the whole model: that takes 1.1 GB of device memory" in said
        assert "0.0 GB are there" in said


@pytest.mark.slow
def test_activations_are_computed_twice_where_memory_is_short(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, since the same numbers are computed again."""
    prune(options(model, text, tmp_path / "plain", "disp"))
    training = jobs.make_method("disp", {}).training
    memory = memories.training_memory(CheckpointReader(model), training, 32, torch.float32)
    between = (memory.peak(True) + memory.peak(False)) // 2 + (1 << 30)
    monkeypatch.setattr(memories, "usable_memory", lambda device: between)
    job = jobs.Job(options(model, text, tmp_path / "out", "disp"), silent)
    assert job.recompute
    prune(options(model, text, tmp_path / "out", "disp"))
    assert checkpoint_bytes(tmp_path / "out") == checkpoint_bytes(tmp_path / "plain")
    assert devices.usable_memory(CPU) > between


@pytest.mark.slow
def test_masked_and_materialised_models_of_a_trained_one(
    demo_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified against the dense model under the masks; a few steps from the warm start gain."""
    prove_here(monkeypatch)
    own = {"steps": 8, "warm_windows": 4, "learning_rate": 5e-3}
    run_options = PruneConfig(
        str(demo_model), tmp_path / "out", "disp", 0.3, own, str(text), samples=8, sequence_length=64, device="cpu",
        cache=tmp_path / "cache", verify=True,
    )  # fmt: skip
    plan = prune(run_options).to_json()
    assert plan["verification"]["verified"]
    assert abs(plan["ratio"]["met"] - 0.3) <= TOLERANCE
    assert plan["training"]["kept"][-1] == pytest.approx(0.7, abs=0.05)
