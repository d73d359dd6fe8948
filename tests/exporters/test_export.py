"""Exported checkpoints: the class that each case takes, the source's logits, and nothing left where it cannot be."""

import functools
import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.families import FAMILIES, family_checkpoint
from support.proofs import prove_here
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyprune
from pyprune.allocation.budget import KeptUnits
from pyprune.architectures import ATTENTION, FFN, SUBLAYERS
from pyprune.checkpoint import CheckpointReader, CheckpointWriter
from pyprune.evaluation import roundtrip as verify
from pyprune.evaluation.roundtrip import VerificationError, layered_logits, verify_roundtrip
from pyprune.exporters import FORMATS, export
from pyprune.exporters.gguf_export import ROUNDINGS, q8_0
from pyprune.job.result import UnitResult
from pyprune.modeling.config import registered_config
from pyprune.modeling.stock import Stock, find_stock
from pyprune.passes.rewrite import rewrite_layer
from pyprune.pipeline import finalize as finish
from pyprune.runtime.progress import silent
from pyprune.testing.random_checkpoint import make_checkpoint

FLOAT32 = torch.float32
IDS = torch.randint(97, (1, 64), generator=torch.Generator().manual_seed(5))
LOGITS = Path(pyprune.__file__).parent / "evaluation" / "logits_worker.py"
ZEROS = {f"self_attn.{m}_proj" for m in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}

# (family's checkpoint, KV groups kept, biases) -> (class, linears that get biases of zeros)
UNIFORM: dict[tuple[str, int, bool], tuple[str, set[str]]] = {
    ("llama-mha", 2, False): ("Llama", set()),
    ("llama-mha", 3, False): ("Mistral", set()),  # 64 % 3 heads
    ("llama-mha", 2, True): ("Llama", ZEROS),
    ("llama-mha", 3, True): ("Granite", ZEROS),
    ("llama-gqa-tied", 1, False): ("Llama", set()),
    ("llama-gqa-tied", 1, True): ("Llama", ZEROS),
    ("llama-biases", 1, False): ("Llama", set()),
    ("llama-biases", 1, True): ("Llama", set()),
    ("llama-3-rope", 1, False): ("Llama", set()),
    ("llama-3-rope", 1, True): ("Llama", ZEROS),
    ("mistral-head-dim", 1, False): ("Mistral", set()),
    ("mistral-head-dim", 1, True): ("Granite", ZEROS),
    ("mistral-sliding", 1, False): ("Mistral", set()),
    ("mistral-sliding", 1, True): ("SmolLM3", ZEROS),
    ("qwen2-biases", 2, False): ("Qwen2", set()),
    ("qwen2-biases", 2, True): ("Granite", {"mlp.gate_proj", "mlp.up_proj"}),
    ("qwen2-sliding", 1, False): ("Qwen2", set()),
    ("qwen2-sliding", 1, True): ("SmolLM3", {"mlp.gate_proj", "mlp.up_proj"}),
    ("qwen3-qk-norm", 1, False): ("Qwen3", set()),
}
NON_UNIFORM = [(1, 40), (2, 96), (1, 64)]


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint in pyprune's class: `pruned("llama-mha", [(groups, channels), ...], biased)`, made once each."""
    made: dict[str, Path] = {}

    def make(name: str, sizes: list[tuple[int, int]], biased: bool) -> Path:
        key = f"{name} {sizes} {biased}"
        if key in made:
            return made[key]
        reader = CheckpointReader(family_checkpoint(name, tiny_checkpoint, tmp_path_factory.mktemp("dense")))
        folder = made[key] = tmp_path_factory.mktemp("pruned")
        generator = torch.Generator().manual_seed(7)
        tensors, shapes = reader.read(reader.outside_layers()), []
        for layer, shape in enumerate(reader.shapes):
            kept = {ATTENTION: torch.arange(sizes[layer][0]), FFN: torch.arange(sizes[layer][1])}
            bias = {m: torch.randn(shape.hidden_size, generator=generator) * 0.3 for m in SUBLAYERS} if biased else {}
            own = rewrite_layer(reader.family, reader.read_layer(layer), shape, kept, bias)
            tensors |= {reader.layer_prefix(layer) + name: tensor for name, tensor in own.items()}
            shapes.append(shape.kept(*sizes[layer]))
        registered_config(reader.family, reader.config, shapes, biased, biased).save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "LICENSE").write_text("as it was")
        return folder

    return make


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    return model(ids).logits[0]


@functools.cache
def source_logits(folder: Path) -> torch.Tensor:
    return logits(folder)


@pytest.mark.parametrize("case", list(UNIFORM), ids=lambda c: f"{c[0]}-{c[1]}{'-biased' * c[2]}")
def test_stock_class_computes_the_same(
    pruned: Callable[..., Path], tmp_path: Path, case: tuple[str, int, bool]
) -> None:
    name, groups, biased = case
    source, output = pruned(name, [(groups, 96)] * 3, biased), tmp_path / "out"
    result = export(source, output, "stock", verified=False)
    prefix, zeros = UNIFORM[case]
    assert result["class"] == f"{prefix}ForCausalLM"
    assert result["verification"] == {"verified": False, "reason": "--no-verify"}
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == [f"{prefix}ForCausalLM"]
    assert not config["model_type"].startswith("pyprune")
    before, after = CheckpointReader(source).tensors, load_file(output / "model.safetensors")
    assert set(after) - set(before) == {f"model.layers.{layer}.{linear}.bias" for layer in range(3) for linear in zeros}
    # Adding zeros and multiplying by 1 changes no bit, and the shapes of all products are the same.
    assert torch.equal(logits(output), logits(source))
    assert (output / "LICENSE").read_text() == "as it was"
    assert not (tmp_path / "out.partial").exists()


def test_every_family_is_exported() -> None:
    assert {name for name, *_ in UNIFORM} == set(FAMILIES)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_padded_computes_the_same(pruned: Callable[..., Path], tmp_path: Path, name: str) -> None:
    biased = name != "qwen3-qk-norm"  # its biases are refused
    source, output = pruned(name, NON_UNIFORM, biased), tmp_path / "out"
    result = export(source, output, "padded", verified=False)
    assert "for evaluation only: 3" in result["notes"][0]  # a third of the decoder linears
    assert not json.loads((output / "config.json").read_text())["model_type"].startswith("pyprune")
    # Sums over more columns, of zeros, may be cut into other blocks.
    torch.testing.assert_close(logits(output), source_logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_fresh_process_without_pyprune(pruned: Callable[..., Path], tmp_path: Path) -> None:
    """The families' remote code, and a padded and a stock output, in one process that never imports pyprune."""
    cases = {f"{name}-remote": (name, "remote-code", "remote-code", True) for name in FAMILIES}
    cases |= {"padded": ("qwen2-biases", "padded", "transformers", True)}
    cases |= {"plain": ("mistral-sliding", "remote-code", "remote-code", False)}
    sources = {case: pruned(name, NON_UNIFORM, biased) for case, (name, _, _, biased) in cases.items()}
    for case, (_, form, _, _) in cases.items():
        export(sources[case], tmp_path / case, form, verified=False)
    loaders = {case: loader for case, (_, _, loader, _) in cases.items()}
    code = (
        "import json, runpy, sys, torch; from safetensors.torch import load_file, save_file\n"
        "worker, loaders = runpy.run_path(sys.argv[1]), json.loads(sys.argv[2])\n"
        "ids = load_file('ids')['ids']\n"
        "save_file({case: worker['logits'](loader, case, ids) for case, loader in loaders.items()}, 'logits')\n"
    )
    save_file({"ids": IDS}, tmp_path / "ids")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-P", "-c", code, str(LOGITS), json.dumps(loaders)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = load_file(tmp_path / "logits")
    for case, source in sources.items():
        torch.testing.assert_close(found[case], source_logits(source), rtol=1e-5, atol=1e-5)
        files = {file.name for file in (tmp_path / case).iterdir()}
        assert ("modeling_pruned.py" in files) == (case != "padded")
    # The exports can be pruned, evaluated and exported again; then without the code's reference.
    assert CheckpointReader(tmp_path / "plain").shapes == CheckpointReader(sources["plain"]).shapes
    export(tmp_path / "llama-mha-remote", tmp_path / "again", "padded", verified=False)
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3-qk-norm", "mistral-sliding"])
def test_layered_logits_are_those_of_the_whole_model(pruned: Callable[..., Path], name: str) -> None:
    source = pruned(name, NON_UNIFORM, True)
    found = layered_logits(CheckpointReader(source), IDS)
    torch.testing.assert_close(found, source_logits(source), rtol=1e-5, atol=1e-5)


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], demo_model: Path) -> Path:
    return tiny_checkpoint(family="llama", dtype="bfloat16", tokenizer=demo_model)


def test_command(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pyprune export` proves its result; the tokenizer goes along."""
    prove_here(monkeypatch)
    small, output = tmp_path / "small", tmp_path / "out"
    assert run(capsys, "prune", model, small, "--method", "magnitude", "--ratio", 0.3).status == 0
    outcome = run(capsys, "export", small, output, "--format", "padded", "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["verification"]["verified"]
    assert outcome.json["verification"]["loader"] == "transformers"
    assert outcome.json["verification"]["max_difference"] <= outcome.json["verification"]["tolerance"]
    text = "The old house stood beside a river."
    tokens = [AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (model, output)]
    assert tokens[0] == tokens[1]
    shown = run(capsys, "export", small, tmp_path / "other", "--format", "stock", "--no-verify").out
    assert "not verified" in shown
    assert "--no-verify" in shown


def test_broken_export_is_not_made(
    capsys: pytest.CaptureFixture[str], pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of one matrix in the wrong place: status 1, one line, nothing written."""
    source, fill = pruned("llama-mha", [(3, 96)] * 3, True), Stock.fill

    def exchanged(self: Stock, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        filled = dict(fill(self, tensors))
        weight = filled["self_attn.q_proj.weight"]
        if not weight.is_meta:
            filled["self_attn.q_proj.weight"] = torch.cat([weight[1:2], weight[:1], weight[2:]])
        return filled

    monkeypatch.setattr(Stock, "fill", exchanged)
    monkeypatch.setattr(verify, "fresh_logits", lambda folder, ids, loader: logits(folder, ids))
    outcome = run(capsys, "export", source, tmp_path / "out", "--format", "stock")
    assert outcome.status == 1
    assert outcome.out == ""
    line = outcome.err.splitlines()[-1]
    assert line.startswith("pyprune: ")
    assert "as it was written, loaded by transformers: its logits differ by up to" in line
    assert list(tmp_path.iterdir()) == []


def test_worker_takes_no_tensor_that_the_class_does_not_know(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers drops it with a line in its log."""
    fill = Stock.fill
    monkeypatch.setattr(Stock, "fill", lambda self, t: fill(self, t) | {"mlp.extra.bias": torch.zeros(3)})
    source = pruned("llama-mha", [(2, 96)] * 3, False)
    with pytest.raises(VerificationError, match=r"mlp.extra.bias: shape \[3\] was written, but \w+ has none"):
        export(source, tmp_path / "out", "stock", verified=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("pyprune.exporters.check_state_dict", lambda *_: None)
    export(source, tmp_path / "out", "stock", verified=False)
    with pytest.raises(SystemExit, match=r"unexpected_keys: model.layers.0.mlp.extra.bias, model"):
        runpy.run_path(str(LOGITS))["logits"]("transformers", str(tmp_path / "out"), IDS)


def test_output_that_does_not_load_is_not_made(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(
        "import sys; print('much before it', file=sys.stderr); sys.exit('no such class')"
    )
    monkeypatch.setattr(verify, "_WORKER", tmp_path / "worker.py")
    with pytest.raises(VerificationError, match=r"transformers does not load what was written: no such class$"):
        export(pruned("llama-mha", [(2, 96)] * 3, False), tmp_path / "out", "stock")
    (tmp_path / "worker.py").write_text("import os; os.kill(os.getpid(), 9)")
    result = export(pruned("llama-mha", [(2, 96)] * 3, False), tmp_path / "other", "stock")
    assert result["verification"]["reason"] == "the process that loaded it was killed, as when memory runs out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "worker.py"]


def test_registered_class_is_loaded_as_it_computes(pruned: Callable[..., Path]) -> None:
    """What is asked after a prune: the written folder, loaded by `import pyprune`, against its own layers."""
    source = pruned("llama-gqa-tied", NON_UNIFORM, True)
    loaded = runpy.run_path(str(LOGITS))["logits"]("pyprune", str(source), IDS)
    torch.testing.assert_close(loaded, layered_logits(CheckpointReader(source), IDS), rtol=1e-5, atol=1e-5)


def test_what_keeps_from_verifying(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pruned("llama-mha", [(3, 96)] * 3, True)
    with monkeypatch.context() as patch:
        patch.setattr(verify, "available_memory", lambda: 1000)
        shown = run(capsys, "export", source, tmp_path / "out", "--format", "stock").out
        assert "not verified  loading it takes 0.00 GB of memory, 0.00 GB are available" in shown
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "llama_cpp" else find_spec(name))
    file = tmp_path / "some.gguf"
    file.write_bytes(b"")
    assert verify_roundtrip(source, file, "gguf") == {"verified": False, "reason": "llama-cpp-python is not installed"}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def check(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = run(capsys, "export", *arguments)
        assert outcome.status == 2
        assert outcome.out == ""
        lines = outcome.err.strip().splitlines()
        assert lines[-1].startswith("pyprune: ")
        assert sum(line.startswith("pyprune: ") for line in lines) == 1
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return lines[-1]

    return check


def test_refusals(
    refused: Callable[..., str],
    pruned: Callable[..., Path],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    different, normed = pruned("llama-mha", NON_UNIFORM, True), pruned("qwen3-qk-norm", [(1, 96)] * 3, True)
    assert (
        "layer 1 has 2 KV groups and 96 FFN channels, layer 0 has 1 KV groups and 40 FFN channels: a stock class needs"
        in refused(different, output, "--format", "stock")
    )
    line = refused(normed, output, "--format", "stock")
    assert "no stock class has the biases of this Qwen3 model together with its norms of queries and keys" in line
    assert "--compensation weights" in line
    assert "no stock class has the biases of this Qwen3 model" in refused(normed, output, "--format", "padded")
    known = "known: stock, padded, remote-code, gguf"
    assert "'onnx' is not one of stock, remote-code, gguf, padded" in refused(different, output, "--format", "onnx")
    assert known.endswith(", ".join(FORMATS))
    assert "--dtype is for gguf" in refused(different, output, "--format", "padded", "--dtype", "f16")
    assert "--shard-size is for folders" in refused(different, output, "--format", "gguf", "--shard-size", "1GB")
    assert "'big' is no size" in refused(different, output, "--format", "padded", "--shard-size", "big")
    assert "a stock llama model, which loads without code" in refused(model, output, "--format", "remote-code")
    assert "ends in .gguf" in refused(different, output, "--format", "gguf")
    assert "no such folder" in refused(tmp_path / "nowhere", output, "--format", "stock")
    assert "Missing option '--format'" in refused(different, output)
    assert "exists and is not an empty folder" in refused(different, different, "--format", "padded")
    output.with_name("out.partial").mkdir()
    assert "what a killed run left; delete that folder" in refused(different, output, "--format", "padded")
    output.with_name("out.partial").rmdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "MB free, the output needs" in refused(different, output, "--format", "padded")


def test_interrupted_export_leaves_nothing(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: CheckpointWriter, part: int, *arguments: Any) -> None:
        if part == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(pruned("llama-mha", NON_UNIFORM, True), tmp_path / "out", "padded")
    assert list(tmp_path.iterdir()) == []


def test_stock_class_for_the_attention_bias_alone(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Qwen3 itself takes a bias on o_proj, with zeros for q, k and v; on down_proj it takes none."""
    reader = CheckpointReader(family_checkpoint("qwen3-qk-norm", tiny_checkpoint, tmp_path))
    stock = find_stock(reader.family, reader.config, reader.shapes, True, False)
    assert stock is not None
    assert stock.config.model_type == "qwen3"
    assert stock.zero_biases == [f"self_attn.{m}_proj.bias" for m in "kqv"]
    assert find_stock(reader.family, reader.config, reader.shapes, False, True) is None


def test_gguf(refused: Callable[..., str], capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    source = tmp_path / "small"
    assert run(capsys, "prune", model, source, "--method", "magnitude", "--ratio", 0.3).status == 0
    file = tmp_path / "small.gguf"
    outcome = run(capsys, "export", source, file, "--format", "gguf", "--dtype", "q8_0", "--json")
    assert outcome.status == 0, outcome.err
    verification = outcome.json["verification"]
    assert verification["loader"] == "gguf"
    # Rounding shows, and the tolerance is no more than that times 4 and a bit: far from what a wrong model gives.
    assert 1e-4 * verification["max_logit"] < verification["max_difference"] <= verification["tolerance"]
    assert verification["tolerance"] < 0.3 * verification["max_logit"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "small.gguf"]
    assert "small.gguf: exists" in refused(source, file, "--format", "gguf")
    line = refused(source, tmp_path / "x.gguf", "--format", "gguf", "--dtype", "int4")
    assert "dtype 'int4' is not one of f32" in line
    (source / "tokenizer.json").unlink()
    assert "tokenizer" in refused(source, tmp_path / "other.gguf", "--format", "gguf")


def test_uniform_prune_with_biases_is_written_in_a_stock_class(
    capsys: pytest.CaptureFixture[str], model: Path, demo_model: Path, tmp_path: Path
) -> None:
    """Granite's, since 64 % 3 heads; with zeros beside it. pyprune reads, prunes and exports it again."""
    text, small = tmp_path / "text.txt", tmp_path / "small"
    text.write_text("A plain text about nothing in particular. " * 60)
    dense = make_checkpoint(tmp_path / "dense", heads=4, kv_heads=4, dtype="float32", vocab_size=8192)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, dense)
    options = ("--structure", "UL-UM", "--calibration", text, "--samples", 4, "--sequence-length", 16)
    outcome = run(capsys, "prune", dense, small, "--method", "flap", "--ratio", 0.3, *options)
    assert outcome.status == 0, outcome.err
    reader = CheckpointReader(small)
    assert reader.config.architectures == ["GraniteForCausalLM"]
    assert {shape.kv_groups for shape in reader.shapes} == {3}
    written = load_file(small / "model.safetensors")
    for name in (f"model.layers.{k}.{linear}.bias" for k in range(3) for linear in ZEROS):
        assert not written[name].any()
    torch.testing.assert_close(layered_logits(reader, IDS), logits(small), rtol=1e-5, atol=1e-5)
    again = run(capsys, "prune", small, tmp_path / "again", "--method", "magnitude", "--ratio", 0.3)
    assert again.status == 0, again.err


UNITS = UnitResult(KeptUnits([]), [])  # proved against what was written itself


@pytest.mark.slow
def test_prune_proves_what_it_wrote(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own class with pyprune, in a stock one without; a failure is status 1, and the folder stays partial."""
    command = ("prune", model, tmp_path / "small", "--method", "magnitude", "--ratio", 0.3, "--verify")
    outcome = run(capsys, *command, "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["verification"]["loader"] == "transformers"
    assert outcome.json["verification"]["max_difference"] <= outcome.json["verification"]["tolerance"]
    assert json.loads((tmp_path / "small" / "plan.json").read_text())["verification"] == outcome.json["verification"]
    with monkeypatch.context() as patch:  # test_learned_methods.py has a class of pyprune proved in a fresh process
        prove_here(patch)
        other = finish._verify(_job(None), registered(tmp_path / "small", tmp_path / "own"), 1000, UNITS)
    assert other["loader"] == "pyprune"
    assert other["verified"]
    assert "--verify insists" in finish._verify(_job(None), tmp_path / "small", 9 << 30, UNITS)["reason"]
    assert finish._verify(_job(False), tmp_path / "small", 1000, UNITS) == {"verified": False, "reason": "--no-verify"}

    monkeypatch.setattr(verify, "fresh_logits", lambda *_: torch.zeros(64, 97))
    shutil.rmtree(tmp_path / "small")
    outcome = run(capsys, *command)
    assert outcome.status == 1
    line = outcome.err.splitlines()[-1]
    assert "its logits differ" in line or "logits of shape" in line
    assert "small.partial keeps what was written" in line
    assert not (tmp_path / "small").exists()
    monkeypatch.undo()
    monkeypatch.setenv("PYPRUNE_VERIFY", "0")
    assert run(capsys, *command, "--resume").status == 0


def _job(verify: bool | None) -> Any:
    reader = SimpleNamespace(dtype=torch.float32)
    return SimpleNamespace(options=SimpleNamespace(verify=verify), reader=reader, progress=silent)


def registered(source: Path, target: Path) -> Path:
    """The checkpoint under pyprune's own class."""
    shutil.copytree(source, target)
    reader = CheckpointReader(source)
    config = registered_config(reader.family, reader.config, reader.shapes, False, False)
    config.save_pretrained(target)
    return target


def test_gguf_roundings_are_those_of_the_file() -> None:
    gguf = pytest.importorskip("gguf")
    matrix = torch.randn(7, 96, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 1, 7)[:, None]
    matrix[2, 32:64] = 0
    for name, rounding in ROUNDINGS.items():
        kind = gguf.GGMLQuantizationType[name.upper()]
        expected = gguf.dequantize(gguf.quantize(matrix.numpy(), kind), kind)
        found = matrix if rounding is None else rounding(matrix)
        assert torch.equal(found, torch.from_numpy(expected)), name
    assert torch.equal(q8_0(matrix[:, :40]), matrix[:, :40].half().float())
