"""pyprune reads what transformers reads: the same files, the same names, the same head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.proofs import prove_here
from torch import Tensor
from transformers import AutoModelForCausalLM

from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError
from pyprune.job.record import read_plan

Tensors = dict[str, Tensor]
DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def proof_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    prove_here(monkeypatch)


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], demo_model: Path, tmp_path: Path) -> Path:
    """A tied model of two layers that a test may change."""
    made = tiny_checkpoint(family="llama", dtype="float32", layers=2, tokenizer=demo_model, tie=True)
    return shutil.copytree(made, tmp_path / "model")


def change(model: Path, how: Callable[[Tensors], Tensors]) -> Tensors:
    tensors = how(load_file(model / "model.safetensors"))
    save_file({name: t.clone() for name, t in tensors.items()}, model / "model.safetensors", metadata={"format": "pt"})
    return tensors


def index(model: Path, files: dict[str, str]) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def pruned(model: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: object) -> Path:
    outcome = run(capsys, "prune", model, output, "--method", "magnitude", "--ratio", 0.1, "--verify", *more)
    assert outcome.status == 0, outcome.err
    return output


@pytest.mark.parametrize("stale", ["there", "gone"])
def test_a_single_file_before_an_index(model: Path, stale: str) -> None:
    names = load_file(model / "model.safetensors")
    if stale == "there":
        save_file({name: torch.zeros_like(t) for name, t in names.items()}, model / "old.safetensors")
    index(model, dict.fromkeys(names, "old.safetensors"))
    read = CheckpointReader(model).read([DOWN])[DOWN]
    loaded = AutoModelForCausalLM.from_pretrained(model).model.layers[0].mlp.down_proj.weight
    assert torch.equal(read, loaded)
    assert read.abs().sum() > 0


def test_the_file_that_the_configuration_names(model: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {"transformers_weights": "other.safetensors"}))
    assert CheckpointReader(model).tensors[DOWN].file.name == "other.safetensors"
    assert torch.equal(CheckpointReader(model).read([DOWN])[DOWN],
                       AutoModelForCausalLM.from_pretrained(model).model.layers[0].mlp.down_proj.weight)  # fmt: skip


def test_links_stay_in_the_folder_or_in_the_blobs_of_the_hub_cache(model: Path, tmp_path: Path) -> None:
    names = list(load_file(model / "model.safetensors"))
    outside = tmp_path / "private"
    outside.mkdir()
    shutil.move(model / "model.safetensors", outside / "w.safetensors")
    for name in ("../private/w.safetensors", str(outside / "w.safetensors"), "link.safetensors"):
        if name.startswith("link"):
            (model / name).symlink_to(outside / "w.safetensors")
        index(model, dict.fromkeys(names, name))
        with pytest.raises(InputError, match="outside the checkpoint folder"):
            CheckpointReader(model)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    (model / "model.safetensors.index.json").unlink()
    shutil.move(model, snapshot)
    shutil.move(outside / "w.safetensors", blobs / "hash")
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    assert len(CheckpointReader(snapshot).tensors) == len(names)


def test_an_equal_head_is_dropped(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(model, lambda t: t | {HEAD: t[EMBEDDINGS].clone()})
    reader = CheckpointReader(model)
    assert reader.tied
    assert HEAD not in reader.tensors
    output = pruned(model, tmp_path / "out", capsys)
    assert HEAD not in CheckpointReader(output).tensors
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("more", [(), ("--uniform",)])
def test_another_head_stays(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    tensors = change(model, lambda t: t | {HEAD: t[EMBEDDINGS] + 0.02})
    assert torch.equal(AutoModelForCausalLM.from_pretrained(model).lm_head.weight, tensors[HEAD])
    output = pruned(model, tmp_path / "out", capsys, *more)
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(loaded.lm_head.weight, tensors[HEAD])
    assert torch.equal(loaded.model.embed_tokens.weight, tensors[EMBEDDINGS])
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_alone_is_the_embeddings_too(model: Path) -> None:
    tensors = change(model, lambda t: {name.replace(EMBEDDINGS, HEAD): v for name, v in t.items()})
    reader = CheckpointReader(model)
    assert torch.equal(reader.embed(torch.arange(9)), tensors[HEAD][:9])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(model).model.embed_tokens.weight, tensors[HEAD])


RENAMED: dict[str, Callable[[str], str]] = {
    "no prefix": lambda name: name.removeprefix("model."),
    "compiled": lambda name: "_orig_mod." + name,
    "parallel": lambda name: "module." + name,
    "both": lambda name: "module._orig_mod." + name,
    "compiled within": lambda name: name.replace("model.", "model._orig_mod."),
    "layers wrapped": lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
}


@pytest.mark.parametrize("how", RENAMED)
def test_names_that_training_leaves(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    expected = load_file(model / "model.safetensors")
    change(model, lambda tensors: {RENAMED[how](name): t for name, t in tensors.items()})
    reader = CheckpointReader(model)
    assert all(torch.equal(t, expected[name]) for name, t in reader.read(list(expected)).items())
    output = pruned(model, tmp_path / "out", capsys)
    assert CheckpointReader(output).tensors.keys() == expected.keys()
    text = tmp_path / "text.txt"
    text.write_text("A plain text about nothing in particular. " * 60)
    outcome = run(
        capsys, *("evaluate", output, "--reference", model, "--text", text, "--sequence-length", 32), "--json"
    )
    assert outcome.status == 0, outcome.err
    assert outcome.json["kl_divergence"] >= 0


UNUSED: dict[str, Tensor] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 8, 4),
    "model.layers.1.self_attn.bias": torch.ones(4, 4, dtype=torch.bool),
    "model.layers.1.self_attn.masked_bias": torch.tensor(-1e4),
    "v_head.summary.weight": torch.ones(1, 64),
    "model.layers.0.self_attn.k_scale": torch.ones(1),
    "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1, dtype=torch.float64),
}


@pytest.mark.parametrize("name", UNUSED)
def test_tensors_that_no_class_reads_are_left_out_and_listed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change(model, lambda tensors: tensors | {name: UNUSED[name]})
    plan = read_plan(pruned(model, tmp_path / "out", capsys))
    assert plan["unused_tensors"] == [name]
    assert len([warning for warning in plan["warnings"] if name in warning]) == 1
    assert name not in CheckpointReader(tmp_path / "out").tensors


@pytest.mark.parametrize(
    ("change_names", "message"),
    [
        (lambda t: t | {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, "merge the"),
        (lambda t: t | {"model.layers.0.mlp.up_proj.base_layer.weight": torch.ones(4, 64)}, "merge the"),
        (lambda t: t | {"model.layers.0.mlp.up_proj.bias": torch.ones(4)}, "is not part of a llama model"),
        (lambda t: t | {"layers.0.input_layernorm.weight": torch.ones(64)}, "are both model.layers.0"),
    ],
)
def test_names_that_are_refused(model: Path, change_names: Callable[[Tensors], Tensors], message: str) -> None:
    change(model, change_names)
    with pytest.raises(InputError, match=message):
        CheckpointReader(model)


def test_other_formats_say_what_to_do(model: Path) -> None:
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    with pytest.raises(InputError, match="a LoRA adapter; merge it"):
        CheckpointReader(model)
    (model / "adapter_model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"convert them: python -c .*save_pretrained"):
        CheckpointReader(model)
