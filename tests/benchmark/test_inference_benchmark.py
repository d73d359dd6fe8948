"""The benchmarks of pruned models' speed: their sizes, their static cache, and every row with its ratios."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from inference import DENSE, Decoder, Prefill, build, floor_seconds, forward
from inference import argument_parser as inference_parser
from inference_layouts import LAYOUTS, layouts
from support.forked import run_script
from support.paths import ROOT

from pyprune.architectures import FAMILIES, LLAMA, LayerShape
from pyprune.forward.fused import fuse, fused_rotary
from pyprune.modeling import pruned_config
from pyprune.testing.random_checkpoint import SHAPES, checkpoint_config

PHASES = ("prefill", "decode")
PUBLISHED = (LayerShape(4096, 128, 32, 1, 11008), LayerShape(4096, 128, 8, 4, 14336))
PROMPT, CONTEXT, STEPS = 24, 8, 4


@pytest.mark.parametrize("shape", PUBLISHED, ids=("llama-2-7b", "llama-3.1-8b"))
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_layouts_have_as_many_parameters(shape: LayerShape, ratio: float) -> None:
    dense = [shape] * 32
    whole = 32 * shape.parameters
    made = layouts(dense, ratio, 128, seed=0)
    assert made == layouts(dense, ratio, 128, seed=0)
    assert made["nonuniform"] != layouts(dense, ratio, 128, seed=1)["nonuniform"]
    for name, shapes in made.items():
        assert sum(own.parameters for own in shapes) / whole == pytest.approx(1 - ratio, abs=0.005), name
        assert (len(set(shapes)) > 16) == name.startswith("nonuniform"), name
        channels = [own.intermediate_channels for own in shapes]
        if name.endswith("rounded"):
            assert all(count % 128 == 0 for count in channels)
        elif name == "nonuniform":
            # Drawn, so that layers differ as those of an allocation over the model do.
            assert min(channels) >= 0.3 * shape.intermediate_channels - 1
            assert max(channels) > 1.5 * min(channels)
            assert any(count % 8 for count in channels)


def nonuniform_model(family: str) -> Any:
    config = checkpoint_config(family=family, layers=4, vocab_size=512, head_dim=16)
    shapes = [LayerShape(64, 16, 1 + layer % 2, 2, 48 + 7 * layer) for layer in range(4)]
    return build(pruned_config(FAMILIES[family], config, shapes, False, False), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_static_cache_of_layers_that_differ(family: str) -> None:
    """Every layer's cache has its own KV heads, and each step's logits are those of a forward without a cache."""
    model = nonuniform_model(family)
    ids = torch.randint(0, 512, (2, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, "eager", ids[:, :-1], ids[:, -1:], STEPS)
    assert [layer.keys.shape[1] for layer in decoder.cache.layers] == [1, 2, 1, 2]
    for _ in range(2):  # from the prompt's end again
        decoder.start()
        seen = ids
        for _ in range(STEPS):
            decoder.step()
            torch.testing.assert_close(decoder.logits, forward(model, seen, None), rtol=1e-4, atol=1e-5)
            seen = torch.cat([seen, decoder.tokens], dim=1)


@torch.no_grad()
def test_fused_step_gives_the_same_logits() -> None:
    """The modules of the mode that is captured on a GPU, here in their operators' references."""
    model = nonuniform_model("llama")
    ids = torch.randint(0, 512, (2, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    expected = forward(model, ids, None)
    for block in model.model.layers:
        fuse(block, LLAMA, model.config.hidden_act)
    with fused_rotary(LLAMA):
        decoder = Decoder(model, "eager", ids[:, :-1], ids[:, -1:], STEPS)
        decoder.start()
        decoder.step()
    torch.testing.assert_close(decoder.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["uniform", "nonuniform"])
@torch.no_grad()
def test_captured_step_gives_the_same_logits(layout: str) -> None:
    """Replays go on from token to token; the uniform model of 3 heads in a hidden size of 64 is a stock Mistral."""
    device = torch.device("cuda")
    config = checkpoint_config(layers=4, vocab_size=512, heads=4, kv_heads=4)
    groups = [3] * 4 if layout == "uniform" else [1, 2, 3, 4]
    shapes = [LayerShape(64, 16, kept, 1, 64) for kept in groups]
    own = pruned_config(LLAMA, config, shapes, False, False)
    assert own.model_type == ("mistral" if layout == "uniform" else "pyprune_llama")
    model = build(own, device, torch.float32)
    family = FAMILIES[own.model_type.removeprefix("pyprune_")]
    ids = torch.randint(0, 512, (2, CONTEXT + STEPS), device=device)
    for block in model.model.layers:
        fuse(block, family, own.hidden_act)
    seen = ids[:, : CONTEXT + 1]
    with fused_rotary(family):
        decoder = Decoder(model, "graph", seen[:, :-1], seen[:, -1:], STEPS + 1)
        decoder.start()
        for _ in range(STEPS):
            decoder.step()
            torch.testing.assert_close(decoder.logits, forward(model, seen, None), rtol=1e-3, atol=1e-4)
            seen = torch.cat([seen, decoder.tokens], dim=1)
        prefill = Prefill(model, "graph", ids)
        for _ in range(2):
            prefill.logits.zero_()
            prefill.run()
            torch.testing.assert_close(prefill.logits, forward(model, ids, None), rtol=1e-3, atol=1e-4)


def script(folder: Path, name: str, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a benchmark as a program."""
    ended = run_script(folder, ROOT / "benchmarks" / name, *arguments)
    return ended.wait(), ended.out.read_text(), ended.err.read_text()


TINY = ["tiny", "--device", "cpu", "--dtype", "float32", "--threads", 1, "--multiple", 16, "--batches", 1, 2,
        "--prompt", PROMPT, "--context", CONTEXT, "--steps", STEPS]  # fmt: skip


@pytest.mark.slow
def test_every_row_of_a_tiny_shape(tmp_path: Path) -> None:
    status, out, err = script(tmp_path, "inference.py", *TINY, "--ratios", 0.5, "--output", tmp_path / "result.json")
    assert status == 0, err
    report = json.loads((tmp_path / "result.json").read_text())
    rows = {(row["layout"], row["batch"]): row for row in report["rows"]}
    assert list(rows) == [(layout, batch) for layout in (DENSE, *LAYOUTS) for batch in (1, 2)]
    assert len(out.splitlines()) == len(rows) + 1
    assert report["machine"]["transformers"]
    for (layout, batch), row in rows.items():
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        assert row["mode"] == "eager"
        assert row["prefill_tokens_per_second"] == pytest.approx(batch * PROMPT / row["prefill_seconds"])
        assert row["decode_tokens_per_second"] == pytest.approx(batch / row["decode_seconds_a_step"])
        for phase in PHASES:
            speed = row[f"{phase}_tokens_per_second"]
            of_dense = speed / rows[DENSE, batch][f"{phase}_tokens_per_second"]
            assert row[f"{phase}_against_dense"] == pytest.approx(of_dense)
            if layout.startswith("nonuniform"):
                alike = rows[layout.removeprefix("non"), batch][f"{phase}_tokens_per_second"]
                assert row[f"{phase}_against_uniform"] == pytest.approx(speed / alike)
            else:
                assert f"{phase}_against_uniform" not in row
    assert rows[DENSE, 1]["class"] == rows["uniform", 1]["class"] == "LlamaForCausalLM"
    assert rows["nonuniform", 1]["class"] == "PyPruneLlamaForCausalLM"
    assert rows["nonuniform", 1]["decoder_parameters"] < 0.55 * rows[DENSE, 1]["decoder_parameters"]


@pytest.mark.slow
def test_a_graph_needs_a_gpu(tmp_path: Path) -> None:
    status, _, err = script(tmp_path, "inference.py", *TINY, "--modes", "graph", "--output", tmp_path / "result.json")
    assert status == 2
    assert "--modes graph needs a GPU" in err.splitlines()[-1]
    assert not (tmp_path / "result.json").exists()


def test_floors_count_what_must_be_moved() -> None:
    """By hand: a tiny dense model in float32, 1 GB/s and 1 GFLOP/s."""
    config = checkpoint_config(**SHAPES["tiny"])
    model = build(config, torch.device("cpu"), torch.float32)
    arguments = inference_parser().parse_args(
        ["tiny", "--prompt", str(PROMPT), "--context", str(CONTEXT), "--steps", str(STEPS)]
    )
    shapes = LLAMA.shapes(config)
    floors = floor_seconds(model, 3 * shapes[0].parameters, shapes, 2, {"copy": 1e9, "product": {"2": 1e9}}, arguments)
    linears = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)
    assert floors["prefill_floor_seconds"] == pytest.approx(2 * linears * 2 * PROMPT / 1e9)
    weights = 4 * (linears + 7 * 64 + 64 * 8192)
    step_bytes = [weights + 2 * tokens * 3 * 2 * 32 * 4 for tokens in range(CONTEXT + 1, CONTEXT + STEPS + 1)]
    assert floors["decode_floor_seconds"] == pytest.approx(statistics.mean(step_bytes) / 1e9)


def test_llama_cpp_rows(demo_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    output = tmp_path / "result.json"
    text = tmp_path / "text.txt"
    text.write_text("The old house stood by the river, and nobody had opened its doors since the winter. " * 200)
    status, _, err = script(
        tmp_path, "inference_llama_cpp.py", demo_model, "--calibration", text, "--samples", 4, "--rounds", 3,
        "--prompt", 32, "--steps", 4, "--threads", 1, "--layouts", "uniform", "nonuniform", "--output", output,
    )  # fmt: skip
    assert status == 0, err
    report = json.loads(output.read_text())
    rows = {row["layout"]: row for row in report["rows"]}
    assert list(rows) == [DENSE, "uniform", "nonuniform"]
    assert [row["architecture"] for row in rows.values()] == ["llama", "llama", "deci"]
    assert len(rows["uniform"]["sizes"]) == 1 < len(rows["nonuniform"]["sizes"])
    for row in rows.values():
        assert row["decoder_parameters"] == pytest.approx(
            rows[DENSE]["decoder_parameters"] * (1 if row["layout"] == DENSE else 0.5), rel=0.02
        )
        for phase, tokens in zip(PHASES, (32, 4), strict=True):
            seconds = row[f"{phase}_seconds"]
            assert len(seconds) == 3
            assert min(seconds) > 0
            assert row[f"{phase}_tokens_per_second"] == pytest.approx(tokens / statistics.median(seconds))
            pairs = zip(rows[DENSE][f"{phase}_seconds"], seconds, strict=True)
            assert row[f"{phase}_against_dense"] == pytest.approx(statistics.median(d / s for d, s in pairs))
