"""Vision-language checkpoints: the text model inside is pruned, everything beside it stays byte for byte."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.wrapper_models import CONFIGS, image_inputs, respelled, save_wrapper, small_wrapper
from torch import Tensor
from transformers import AutoModelForImageTextToText

import pyprune
from pyprune import InputError
from pyprune.architectures import ATTENTION, SUBLAYERS, expand
from pyprune.architectures.wrappers import OLDER_SPELLING, WRAPPERS
from pyprune.checkpoint import CheckpointReader
from pyprune.evaluation.roundtrip import layered_logits
from pyprune.job.entries import kept_from_entry
from pyprune.job.record import read_record
from pyprune.passes.base import Passes

NAMES = list(CONFIGS)
IDS = torch.randint(90, (6, 24), generator=torch.Generator().manual_seed(5))
FAST = {"method": "flap", "ratio": 0.3, "compensation": "none", "uniform": True, "calibration": IDS, "device": "cpu"}

# Without pyprune: what transformers alone makes of each output.
LOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    given = load_file(folder + ".inputs")
    (name,) = json.load(open(folder + "/config.json"))["architectures"]
    model, loading = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    assert model.dtype == torch.float32
    with torch.inference_mode():
        text = model(input_ids=given.pop("text")).logits[0].contiguous()
        image = model(**given).logits[0].contiguous()
    save_file({"text": text, "image": image}, folder + ".logits")
assert "pyprune" not in sys.modules
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dense")
    return {name: save_wrapper(name, folder / name) for name in NAMES}


@pytest.fixture(scope="module")
def pruned(dense: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model pruned, and what transformers alone computes with it, in `<output>.logits`."""
    folder = tmp_path_factory.mktemp("pruned")
    outputs = {name: folder / name.replace(" ", "-") for name in NAMES}
    for name, output in outputs.items():
        pyprune.prune(dense[name], output, **FAST)
        save_file({"text": IDS[:1], **image_inputs(name)}, f"{output}.inputs")
    command = [sys.executable, "-c", LOAD, *map(str, outputs.values())]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    return outputs


@torch.inference_mode()
def text_logits(model: Any, ids: Tensor = IDS[:1]) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits[0]
    return logits


def masked(name: str, output: Path) -> Any:
    """The dense model, where the columns of output projections that read removed units are zero."""
    model, reader = small_wrapper(name), CheckpointReader(output)
    layers = model.model.language_model.layers
    for layer, entry in zip(layers, read_record(output).layers, strict=True):
        kept = kept_from_entry(entry)
        for sublayer in SUBLAYERS:
            if not reader.family.has(layer, sublayer) or not len(kept[sublayer]):
                continue
            weight = layer.get_submodule(reader.family.output_proj(sublayer)).weight
            units = len(entry["scores"]["kv_groups" if sublayer == ATTENTION else "intermediate_channels"])
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[expand(kept[sublayer], weight.shape[1] // units)] = False
            weight.data[:, gone] = 0
    return model


@pytest.mark.parametrize("name", NAMES)
def test_layered_logits_are_those_of_transformers(name: str, dense: dict[str, Path]) -> None:
    expected = text_logits(small_wrapper(name))
    found = layered_logits(CheckpointReader(dense[name]), IDS[:1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_loads_in_the_outer_class_as_the_masked_dense_model(
    name: str, dense: dict[str, Path], pruned: dict[str, Path]
) -> None:
    found = load_file(f"{pruned[name]}.logits")
    torch.testing.assert_close(found["text"], text_logits(masked(name, pruned[name])), rtol=0, atol=1e-5)
    with torch.inference_mode():
        image = masked(name, pruned[name])(**image_inputs(name)).logits[0]
    torch.testing.assert_close(found["image"], image, rtol=0, atol=1e-5)
    assert not torch.allclose(found["text"], text_logits(small_wrapper(name)), atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_everything_beside_the_text_model_is_copied(name: str, dense: dict[str, Path], pruned: dict[str, Path]) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (dense[name], pruned[name]))
    assert before.keys() == after.keys()
    reader = CheckpointReader(dense[name])
    assert any("vis" in key for key in reader.beside)
    for key in reader.beside:
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key
    for file in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (pruned[name] / file).read_bytes() == (dense[name] / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_only_sizes_of_the_text_model_change_in_the_configuration(
    name: str, dense: dict[str, Path], pruned: dict[str, Path]
) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (dense[name], pruned[name]))
    changed = {key for key, value in after.pop("text_config").items() if before["text_config"].get(key) != value}
    assert changed <= {"num_attention_heads", "num_key_value_heads", "intermediate_size"}
    assert "intermediate_size" in changed
    before.pop("text_config")
    assert before == after


def test_numbers_of_heads_are_those_that_the_class_takes(dense: dict[str, Path], pruned: dict[str, Path]) -> None:
    """Gemma 3 insists on a hidden size that the heads divide: of 40 channels six are no divisor."""
    assert CheckpointReader(dense["gemma3"]).shapes[0].group_counts == (1, 2, 4)
    assert CheckpointReader(dense["mistral3"]).shapes[0].group_counts == (1, 2, 3, 4)
    assert CheckpointReader(pruned["gemma3"]).shapes[0].kv_groups == 2
    assert CheckpointReader(pruned["mistral3"]).shapes[0].kv_groups == 3


def test_a_head_beside_a_configuration_that_says_nothing(dense: dict[str, Path], pruned: dict[str, Path]) -> None:
    assert not CheckpointReader(dense["mistral3"]).tied
    assert not CheckpointReader(pruned["mistral3"]).tied
    assert "language_model.lm_head.weight" in load_file(pruned["mistral3"] / "model.safetensors")


@pytest.mark.parametrize("name", ["gemma3", pytest.param("mistral3", marks=pytest.mark.slow)])
def test_both_spellings_give_one_result(
    name: str, dense: dict[str, Path], pruned: dict[str, Path], tmp_path: Path
) -> None:
    source = respelled(dense[name], tmp_path / "source")
    pyprune.prune(source, tmp_path / "out", **FAST)
    older, newer = (load_file(folder / "model.safetensors") for folder in (pruned[name], tmp_path / "out"))
    assert newer.keys() == load_file(source / "model.safetensors").keys()
    assert not newer.keys() & older.keys()
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(text_logits(found), load_file(f"{pruned[name]}.logits")["text"])


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("model*"))}


@pytest.mark.parametrize(
    ("method", "options"),
    [("flap", {}), pytest.param("obs", {"compensation": "weights"}, marks=pytest.mark.slow)],
)
def test_resumed_to_the_same_files(
    method: str, options: dict[str, Any], dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = FAST | {"method": method, "shard_size": 16 << 10} | options
    pyprune.prune(dense["gemma3"], tmp_path / "whole", **arguments)
    assert len(shards(tmp_path / "whole")) > 3
    for place in ("_copy_beside", "write_layer"):
        output, original = tmp_path / place, getattr(Passes, place)

        def second(self: Passes, part: int, *rest: Any, original: Any = original) -> None:
            if part:
                raise RuntimeError("stopped")
            original(self, part, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Passes, place, second)
            with pytest.raises(RuntimeError, match="stopped"):
                pyprune.prune(dense["gemma3"], output, **arguments)
        record = pyprune.prune(dense["gemma3"], output, resume=True, **arguments)
        assert shards(output) == shards(tmp_path / "whole")
        assert set(CheckpointReader(dense["gemma3"]).beside) < record.source["digests"].keys()
        again = pyprune.prune(dense["gemma3"], output, resume=True, **arguments)
        assert again.checksums == record.checksums


def test_another_vision_tower_is_not_resumed_with(dense: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in dense["gemma3"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    arguments = {"method": "magnitude", "ratio": 0.3, "uniform": True, "device": "cpu"}
    pyprune.prune(source, tmp_path / "out", **arguments)
    tensors = load_file(source / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.startswith("vision_tower"))[:] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has changed|other settings"):
        pyprune.prune(source, tmp_path / "out", resume=True, **arguments)


def test_layers_that_predict_further_tokens_are_left_out(dense: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in dense["qwen3_5"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors") | {"mtp.fc.weight": torch.ones(4, 4)}
    tensors["model.visual.steps"] = torch.arange(3)  # int64, as old positions
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(source)
    assert reader.unused == ["mtp.fc.weight"]
    assert "model.visual.steps" in reader.beside
    record = pyprune.prune(source, tmp_path / "out", "magnitude", 0.3, uniform=True, device="cpu")
    assert record.warnings == ["left out, since the model does not use it: mtp.fc.weight"]
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert "mtp.fc.weight" not in after
    assert torch.equal(after["model.visual.steps"], torch.arange(3))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers that differ": ({"method": "magnitude"}, "gemma3 stays in transformers' class.*add --uniform"),
    "biases": ({"method": "flap", "uniform": True}, "no biases to compensate with: add --compensation none"),
    "learned units": ({"method": "policy"}, "policy cannot make them so.*--uniform"),
    "selections": ({"method": "disp"}, "disp cannot make them so"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, dense: dict[str, Path], tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as raised:
        pyprune.prune(dense["gemma3"], tmp_path / "out", ratio=0.3, calibration=IDS, device="cpu", **options)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=message):
        pyprune.estimate(dense["gemma3"], ratio=0.3, **options)
    assert not list(tmp_path.iterdir())


CHANGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown outside": (
        lambda f: f.update(model_type="llava"),
        "'llava' around a text model of 'gemma3_text'.*mistral3",
    ),
    "unknown inside": (lambda f: f["text_config"].update(model_type="gpt2"), "gemma3 around .* 'gpt2'.*gemma3_text"),
    "quantised": (lambda f: f.update(quantization_config={"bits": 4}), "quantised"),
    "another text": (lambda f: f["text_config"].update(num_hidden_layers=3), "num_hidden_layers is 3"),
    "another size": (lambda f: f["text_config"].update(intermediate_size=63), "calls for"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_configurations_refused(case: str, dense: dict[str, Path], tmp_path: Path) -> None:
    change, message = CHANGED[case]
    (tmp_path / "model.safetensors").write_bytes((dense["gemma3"] / "model.safetensors").read_bytes())
    fields = json.loads((dense["gemma3"] / "config.json").read_text())
    change(fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message) as raised:
        CheckpointReader(tmp_path)
    assert "\n" not in str(raised.value)


def test_no_text_model_refused(dense: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dense["gemma3"] / "config.json").read_bytes())
    save_file({"vision_tower.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"begins with language_model\.model\. or model\.language_model\."):
        CheckpointReader(tmp_path)


def test_in_memory_and_export_refused(dense: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save it, and name its folder"):
        pyprune.prune(small_wrapper("gemma3"), None, "magnitude", 0.3, uniform=True)
    with pytest.raises(InputError, match="a gemma3 model is not exported"):
        pyprune.export(dense["gemma3"], tmp_path / "out", "stock")


def test_card_names_the_class(pruned: dict[str, Path]) -> None:
    card = (pruned["qwen3_vl"] / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card
    assert "import pyprune" not in card


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "qwen3_5" else pytest.mark.slow) for name in NAMES]
)
def test_evaluated_on_text(name: str, dense: dict[str, Path], pruned: dict[str, Path]) -> None:
    result = pyprune.evaluate(pruned[name], IDS, reference=dense[name], device="cpu", dtype="float32")
    losses = []
    for model in (masked(name, pruned[name]), small_wrapper(name)):
        with torch.inference_mode():
            logits = model(input_ids=IDS).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).exp().item())
    assert result["perplexity"] == pytest.approx(losses[0], rel=1e-4)
    assert result["reference_perplexity"] == pytest.approx(losses[1], rel=1e-4)


def test_sparse_methods_need_the_same_linears(dense: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layer 0 has no self_attn\.q_proj: wanda needs the same linears"):
        pyprune.prune(dense["qwen3_5"], tmp_path / "out", "wanda", 0.5, pattern="2:4", calibration=IDS, device="cpu")


OTHERS = {
    "obs": {"compensation": "weights"},
    "slimgpt": {},
    "wanda-sp": {},
    "magnitude": {},
    "wanda": {"pattern": "2:4"},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_method(name: str, method: str, dense: dict[str, Path], tmp_path: Path) -> None:
    if (name, method) == ("qwen3_5", "wanda"):
        pytest.skip("layers with linear attention are refused")
    arguments = {"calibration": IDS, "device": "cpu", **OTHERS[method]}
    if method != "wanda":
        arguments["uniform"] = True
    pyprune.prune(dense[name], tmp_path / "out", method, 0.5 if method == "wanda" else 0.3, **arguments)
    loaded, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    found = layered_logits(CheckpointReader(tmp_path / "out"), IDS[:1])
    torch.testing.assert_close(text_logits(loaded.eval()), found, rtol=0, atol=1e-4)
    with (
        safe_open(dense[name] / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as after,
    ):
        for key in CheckpointReader(dense[name]).beside:
            assert torch.equal(before.get_tensor(key), after.get_tensor(key))


@pytest.mark.slow
def test_pruned_again_and_on_its_own_text(pruned: dict[str, Path], tmp_path: Path) -> None:
    """With the proof, which loads the output in transformers' class, in a process without pyprune."""
    record = pyprune.prune(
        pruned["qwen3_vl"], tmp_path / "out", "flap", 0.2, uniform=True, compensation="none", calibration="self",
        samples=4, sequence_length=16, device="cpu", verify=True,
    )  # fmt: skip
    assert record.verification["verified"], record.verification
    assert record.verification["loader"] == "transformers"


def test_spellings() -> None:
    for wrapper in WRAPPERS.values():
        for spelling in wrapper.spellings:
            for name in ("model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"):
                assert spelling.inner(spelling.stored(name)) == name
    assert OLDER_SPELLING.inner("vision_tower.layers.0.weight") is None
