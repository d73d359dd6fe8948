"""From a checkpoint folder to a smaller one through the command line, on the trained model of the repository."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.command_line import run
from support.written import checkpoint_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pyprune import modeling
from pyprune.architectures import ATTENTION, FFN, SUBLAYERS
from pyprune.calibration import sampling
from pyprune.checkpoint import CheckpointReader
from pyprune.forward.layer_forward import LayerForward
from pyprune.job.entries import kept_from_entry
from pyprune.job.record import read_plan
from pyprune.ops.declaration import OPERATORS
from pyprune.passes.calibrate import statistics_of
from pyprune.passes.rewrite import compensation_bias, rewrite_layer

SIZES = ("--samples", 12, "--sequence-length", 32, "--device", "cpu")
SMALL = ("--calibration", "self", *SIZES)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.figures
def test_flap_end_to_end(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pruned"
    outcome = run(capsys, "prune", demo_model, output, "--method", "flap", "--ratio", 0.3, *SMALL, "--json",
                  "--evaluate", "self", "--evaluation-length", 32, "--max-windows", 8)  # fmt: skip
    assert outcome.status == 0, outcome.err
    result, plan = outcome.json, read_plan(output)
    assert result["output"] == str(output)
    assert result["ratio"] == plan["ratio"]["met"] == pytest.approx(0.3, abs=0.005)
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 0
    assert result["calibration_cached"] is False
    assert plan["evaluation"]["pruned"]["perplexity"] > plan["evaluation"]["dense"]["perplexity"] > 1

    # What is on disk is what the plan says, recounted from the tensors.
    dense, pruned = CheckpointReader(demo_model), CheckpointReader(output)
    kept = sum(s.parameters for s in pruned.shapes)
    assert 1 - kept / sum(s.parameters for s in dense.shapes) == pytest.approx(result["ratio"], abs=1e-12)
    assert result["bytes"] == [dense.bytes, pruned.bytes]
    removed = sum(s.parameters for s in dense.shapes) - kept
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(demo_model).parameters())
    assert result["ratio_of_model"] == pytest.approx(removed / whole, abs=1e-12)
    for name in ("plan.json", "report.html", "tokenizer.json", "generation_config.json", "config.json"):
        assert (output / name).stat().st_size > 0
    assert (
        AutoTokenizer.from_pretrained(output)("text").input_ids
        == AutoTokenizer.from_pretrained(demo_model)("text").input_ids
    )

    # It loads by transformers' own calls, generates with a cache, and equals the pruned model in memory bitwise.
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert type(loaded) is modeling.PRUNED_CLASSES["llama"][2]
    ids = torch.randint(2, 8192, (2, 48), generator=torch.Generator().manual_seed(1))
    in_memory = prune_in_memory(demo_model, plan, next((tmp_path / ".pyprune-cache").glob("calibration-*.safetensors")))
    assert torch.equal(logits(loaded, ids), logits(in_memory, ids))
    cached = loaded.generate(ids[:1], max_new_tokens=12, do_sample=False)
    assert torch.equal(cached, loaded.generate(ids[:1], max_new_tokens=12, do_sample=False, use_cache=False))


def prune_in_memory(model_folder: Path, plan: dict[str, Any], survey_file: Path) -> Any:
    """The dense model with its layers replaced by pruned ones, through no file of the output."""
    reader = CheckpointReader(model_folder)
    with safe_open(survey_file, framework="pt") as f:
        survey = statistics_of(survey_file, load_file(survey_file), f.metadata(), reader.shapes)
    tensors, shapes = {}, []
    for layer, shape in enumerate(reader.shapes):
        kept = kept_from_entry(plan["layers"][layer])
        own = reader.read_layer(layer)
        bias = {}
        for module in SUBLAYERS:
            mean = survey[layer][module].mean
            assert mean is not None
            weight = own[reader.family.output_proj(module) + ".weight"]
            bias[module] = compensation_bias(weight, mean, kept[module], shape.unit_width(module))
        pruned = rewrite_layer(reader.family, own, shape, kept, bias)
        tensors |= {reader.layer_prefix(layer) + name: t for name, t in pruned.items()}
        shapes.append(shape.kept(len(kept[ATTENTION]), len(kept[FFN])))
    config = modeling.pruned_config(reader.family, reader.config, shapes, True, True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).state_dict()
    model.load_state_dict({k: v for k, v in state.items() if ".layers." not in k} | tensors)
    return model.eval()


def test_another_ratio_runs_no_forward(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(capsys, "prune", demo_model, tmp_path / "a", "--method", "flap", "--ratio", 0.2, *SMALL, "--json").json
    calls: list[int] = []
    forward = LayerForward.run
    monkeypatch.setattr(LayerForward, "run", lambda *a, **k: (calls.append(1), forward(*a, **k)))
    load = sampling.load_model
    monkeypatch.setattr(sampling, "load_model", lambda *a, **k: (calls.append(1), load(*a, **k))[1])
    second = run(capsys, "prune", demo_model, tmp_path / "b", "--method", "flap", "--ratio", 0.5, *SMALL, "--json").json
    assert not calls
    assert (first["calibration_cached"], second["calibration_cached"]) == (False, True)
    # Another seed is another text: the cache must not answer for it.
    other = run(
        capsys, "prune", demo_model, tmp_path / "c", "--method", "flap", "--ratio", 0.5, *SMALL, "--seed", 1, "--json"
    ).json
    assert other["calibration_cached"] is False
    assert calls


@pytest.mark.slow
def test_seed_makes_the_result_repeatable(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        run(
            capsys,
            "prune",
            demo_model,
            tmp_path / name,
            "--method",
            "flap",
            "--ratio",
            0.4,
            *SMALL,
            "--cache",
            tmp_path / f"cache-{name}",
        )
    assert checkpoint_bytes(tmp_path / "a") == checkpoint_bytes(tmp_path / "b")


@pytest.mark.slow
def test_uniform_result_is_of_the_stock_class(
    demo_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """test_export.py has one loaded by a Python without pyprune."""
    outputs = [tmp_path / method for method in ("magnitude", "wanda-sp")]
    for output in outputs:
        calibration = () if output.name == "magnitude" else ("--calibration", text, *SIZES)
        outcome = run(
            capsys, "prune", demo_model, output, "--method", output.name, "--ratio", 0.5, *calibration, "--json"
        )
        assert outcome.status == 0, outcome.err
        assert outcome.json["ratio"] == pytest.approx(0.5, abs=0.005)
        assert json.loads((output / "config.json").read_text())["model_type"] == "llama"
        loaded = AutoModelForCausalLM.from_pretrained(output)
        assert type(loaded) is LlamaForCausalLM
        assert (loaded.config.num_key_value_heads, loaded.config.intermediate_size) == (2, 352)


@pytest.mark.slow
def test_files_by_size(demo_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tensors are those of one file, whatever the size; one above it has a file of its own."""
    # flap's biases are float32 beside bfloat16
    arguments = ("--ratio", 0.3, "--calibration", text, *SIZES, "--cache", tmp_path / "cache")
    for name, size in (("one", ()), ("several", ("--shard-size", "600KB"))):
        outcome = run(capsys, "prune", demo_model, tmp_path / name, *arguments, *size)
        assert outcome.status == 0, outcome.err
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    files: dict[str, list[int]] = {}
    for place in CheckpointReader(tmp_path / "several").tensors.values():
        files.setdefault(place.file.name, []).append(place.bytes)
    assert len(files) > 4
    assert files.keys() == {f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)}
    assert all(sum(sizes) <= 600_000 or len(sizes) == 1 for sizes in files.values())
    assert any(sum(sizes) > 600_000 for sizes in files.values())
    one, several = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "several"))
    assert one.state_dict().keys() == several.state_dict().keys()
    assert all(torch.equal(tensor, several.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.slow
def test_wanda_sp_sees_the_pruned_prefix(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of layer 2 recomputed with transformers: pruned layers 0 and 1, then the dense layer 2."""
    output = tmp_path / "pruned"
    run(capsys, "prune", demo_model, output, "--method", "wanda-sp", "--ratio", 0.5, *SMALL)
    plan = read_plan(output)
    from pyprune.calibration.source import TokenSource

    ids = TokenSource(
        "self", demo_model, CheckpointReader(demo_model).config, torch.device("cpu"), torch.float32
    ).calibration(12, 32, 0)
    dense = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    mixed = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    mixed.model.layers[2] = dense.model.layers[2]
    inputs: list[torch.Tensor] = []
    output_proj = mixed.model.layers[2].mlp.down_proj
    output_proj.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].double()))
    logits(mixed, ids)
    squares = torch.cat(inputs).flatten(0, 1).pow(2).sum(0) / len(ids)
    expected = output_proj.weight.double().abs().mean(0) * squares.sqrt()
    scores = torch.tensor(plan["layers"][2]["scores"]["intermediate_channels"], dtype=torch.float64)
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-4, atol=0)
    lowest = scores.argsort()[: 704 - 352]
    assert not set(lowest.tolist()) & set(plan["layers"][2]["intermediate_channels"])


@pytest.mark.slow
def test_half_precision_models_and_computation(
    tiny_checkpoint: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_model: Path
) -> None:
    arguments = ("--method", "flap", "--ratio", 0.3, "--calibration", text, *SIZES)
    for dtype in ("float16", "bfloat16", "float32"):
        model = tiny_checkpoint(family="qwen2", dtype=dtype, tokenizer=demo_model)
        output = tmp_path / dtype
        outcome = run(capsys, "prune", model, output, *arguments, "--dtype", dtype, "--json")
        assert outcome.status == 0, outcome.err
        reader = CheckpointReader(output)
        assert str(reader.dtype) == f"torch.{dtype}"
        # A compensation bias keeps the precision that it was computed in.
        assert reader.tensors["model.layers.0.mlp.down_proj.bias"].dtype == torch.float32
        loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        assert torch.isfinite(logits(loaded, torch.arange(10)[None])).all()


def test_evaluate_and_plan_and_lists(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "evaluate", demo_model, "--text", "self", "--max-windows", 4, "--sequence-length", 48,
                  "--reference", demo_model, "--json")  # fmt: skip
    assert outcome.status == 0, outcome.err
    result = outcome.json
    assert (result["windows"], result["sequence_length"]) == (4, 48)
    assert result["perplexity"] == result["reference_perplexity"] > 1
    assert (result["kl_divergence"], result["top1_agreement"]) == (0, 1)

    estimated = run(capsys, "plan", demo_model, "--ratio", 0.5, "--method", "wanda-sp", "--json").json
    assert estimated["layers"] == [{"kv_groups": 2, "intermediate_channels": 352}] * 6
    before, after = estimated["parameters"]["decoder_linears"]
    assert after == before / 2
    assert estimated["peak_memory_bytes"] > 0
    flap = run(capsys, "plan", demo_model, "--method", "flap", "--ratio", 0.5, "--json").json
    # 2 FLOPs a parameter and token; scores and weighted values over half of the window, 256 wide in 6 layers.
    assert flap["passes"][0]["flops"] == 128 * 2048 * (2 * before + 6 * 2 * 256 * 2048)

    listed = run(capsys, "methods", "--json").json
    structured = {"magnitude", "wanda-sp", "flap", "slimgpt", "obs", "disp", "policy"}
    assert listed.keys() == structured | {"wanda", "sparsegpt", "dass"}
    assert listed["flap"]["options"]["structure"] == "AL-AM"
    table = run(capsys, "backends", "--json").json
    assert {row["operator"] for row in table["operators"]} == {
        name for name, operator in OPERATORS.items() if operator.kernels
    }
    for command in ("prune", "evaluate", "plan", "backends", "methods"):
        shown = run(capsys, command, "--help")
        assert shown.status == 0
        assert "Usage:" in shown.out
    for command in (("methods",), ("backends",), ("plan", demo_model, "--ratio", 0.5)):
        assert run(capsys, *command).out.strip()


def test_allow_nonfinite_counts_them_as_zero(
    tiny_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_model: Path
) -> None:
    from support.bad_models import overflowing

    model = overflowing(tiny_checkpoint(family="llama", dtype="float32", tokenizer=demo_model), tmp_path / "bad")
    text = tmp_path / "text.txt"
    text.write_text("A plain text about nothing in particular. " * 60)
    arguments = ("--calibration", text, "--samples", 4, "--sequence-length", 16)
    outcome = run(
        capsys, "prune", model, tmp_path / "out", "--method", "flap", "--ratio", 0.3, *arguments, "--allow-nonfinite"
    )
    assert outcome.status == 0, outcome.err
    # Channel 7 is Inf at every token, times a finite gate: all 64 tokens of layer 1, and nothing after it.
    counted = read_plan(tmp_path / "out")["nonfinite"]
    assert counted == {"layer 1 (mlp.down_proj)": 64}
    assert "64 NaN or Inf activations in layer 1 (mlp.down_proj)" in outcome.out


@pytest.mark.slow
def test_what_pyprune_wrote_can_be_pruned_again(
    demo_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Uneven layers and biases of the first pruning survive the second, whatever the method."""
    once, small = tmp_path / "once", ("--calibration", text, *SIZES)
    run(capsys, "prune", demo_model, once, "--method", "flap", "--ratio", 0.2, *small)
    for method in ("flap", "wanda-sp", "magnitude"):
        twice = tmp_path / method
        calibration = () if method == "magnitude" else small
        outcome = run(capsys, "prune", once, twice, "--method", method, "--ratio", 0.2, *calibration, "--json")
        assert outcome.status == 0, outcome.err
        assert outcome.json["ratio"] == pytest.approx(0.2, abs=0.01)
        assert "model.layers.0.mlp.down_proj.bias" in CheckpointReader(twice).tensors
        loaded = AutoModelForCausalLM.from_pretrained(twice, dtype=torch.float32)
        assert torch.isfinite(logits(loaded, torch.arange(12)[None])).all()


@pytest.mark.slow
def test_a_survey_answers_only_for_what_it_was_made_of(
    tiny_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_model: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A plain text about nothing in particular. " * 60)
    fixed = (
        "--calibration",
        text,
        "--samples",
        4,
        "--sequence-length",
        16,
        "--device",
        "cpu",
        "--method",
        "flap",
        "--ratio",
        0.3,
    )

    def cached(name: str, *changes: object, seed: int = 0) -> bool:
        model = tiny_checkpoint(family="llama", dtype="float32", tokenizer=demo_model, seed=seed)
        outcome = run(capsys, "prune", model, tmp_path / name, *fixed, *changes, "--json")
        assert outcome.status == 0, outcome.err
        return outcome.json["calibration_cached"]

    assert not cached("first")
    assert cached("same")
    assert cached("metric", "--metric", "IFV")
    assert not cached("mode", "--mode", "reference")
    assert not cached("dtype", "--dtype", "bfloat16")
    assert not cached("samples", "--samples", 5)
    assert not cached("model", seed=1)
    assert not cached("allowed", "--allow-nonfinite")
    for file in (tmp_path / ".pyprune-cache").glob("calibration-*"):
        file.write_bytes(b"damaged")
    assert "damaged calibration pass" in run(capsys, "prune", tiny_checkpoint(
        family="llama", dtype="float32", tokenizer=demo_model, seed=0), tmp_path / "last", *fixed).err  # fmt: skip


def test_plan_shows_what_prune_does(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manual = ("--structure", "UL-MM", "--attention-ratio", 0)
    (expected,) = {
        tuple(layer.values())
        for layer in run(capsys, "plan", demo_model, "--method", "flap", "--ratio", 0.3, *manual, "--json").json[
            "layers"
        ]
    }
    run(capsys, "prune", demo_model, tmp_path / "out", "--method", "flap", "--ratio", 0.3, *manual, *SMALL)
    for layer in read_plan(tmp_path / "out")["layers"]:
        assert (len(layer["kv_groups"]), len(layer["intermediate_channels"])) == expected == (4, 416)
