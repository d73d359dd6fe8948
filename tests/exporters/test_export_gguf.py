"""GGUF files as gguf's own reader sees them: sizes, tensors and their order, types, and what is refused."""

import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bad_models import infinite
from support.families import FAMILIES, family_checkpoint
from support.gguf_models import change_config, pruned_copy, with_tokenizer

import pyprune
from pyprune.architectures import LayerShape
from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError
from pyprune.exporters.gguf import write_gguf
from pyprune.exporters.gguf_architecture import check_shapes
from pyprune.exporters.gguf_export import modelfile_of

gguf = pytest.importorskip("gguf")

LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
# Of the dense checkpoint, and of one whose layers differ, without and with biases on o_proj and down_proj.
ARCHITECTURES = {
    "llama-mha": ("llama", "deci", "deci"),
    "llama-gqa-tied": ("llama", "deci", "deci"),
    "mistral-head-dim": ("llama", "deci", "deci"),
    "mistral-sliding": ("llama", "deci", "deci"),
    "qwen2-biases": ("deci", "deci", "deci"),  # 6 heads of 16 are not its hidden size of 64
    "qwen2-sliding": ("qwen2", "deci", "deci"),
    "qwen3-qk-norm": ("qwen3", None, None),
    "qwen3-tied": ("qwen3", "openelm", None),
    "llama-biases": ("deci", "deci", "deci"),
    "llama-3-rope": ("llama", "deci", "deci"),
}
KINDS = ("dense", "differing", "biased")


def checkpoint(name: str, tiny_checkpoint: Callable[..., Path], folder: Path) -> Path:
    """One of FAMILIES, or a Qwen3 with tied embeddings, with a tokenizer."""
    folder.mkdir(exist_ok=True)
    if name == "qwen3-tied":
        tied = {"family": "qwen3", "heads": 4, "kv_heads": 2, "head_dim": 32, "tie": True}
        made = tiny_checkpoint(dtype="float32", vocab_size=97, **tied)
    else:
        made = family_checkpoint(name, tiny_checkpoint, folder)
    return with_tokenizer(made, folder / "source")


def pruned(source: Path, target: Path, biased: bool) -> Path:
    groups = CheckpointReader(source).shapes[0].kv_groups
    return pruned_copy(source, target, [(groups, 160), (1, 52), (groups - 1, 33)], biased)[0]


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata by key, without the architecture's name in it, and tensors by name: (type, array of rows)."""
    reader = gguf.GGUFReader(file)
    architecture = reader.get_field("general.architecture").contents()
    fields = {key.removeprefix(architecture + "."): field.contents() for key, field in reader.fields.items()}
    return fields, {t.name: (t.tensor_type.name, t.data) for t in reader.tensors}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_sizes_and_tensors(name: str, kind: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint(name, tiny_checkpoint, tmp_path / "made")
    if kind != "dense":
        source = pruned(source, tmp_path / "pruned", kind == "biased")
    architecture, output = ARCHITECTURES[name][KINDS.index(kind)], tmp_path / "model.gguf"
    if architecture is None:
        with pytest.raises(InputError, match=r"llama\.cpp cannot hold this model: qwen3 takes no") as caught:
            write_gguf(source, output, "f32")
        assert ("--compensation none" in str(caught.value)) == (kind == "biased")
        assert not output.exists()
        return
    summary = write_gguf(source, output, "f32")
    fields, tensors = contents(output)
    reader = CheckpointReader(source)
    shapes, config = reader.shapes, reader.config
    assert summary["architecture"] == fields["general.architecture"] == architecture
    assert summary["bytes"] == output.stat().st_size
    assert summary["tensors"] == len(tensors)

    sizes = {
        "attention.head_count": [s.kv_groups * s.heads_per_group for s in shapes],
        "attention.head_count_kv": [s.kv_groups for s in shapes],
        "feed_forward_length": [s.intermediate_channels for s in shapes],
    }
    by_layer = architecture in ("deci", "openelm")
    assert {key: fields[key] for key in sizes} == {key: own if by_layer else own[0] for key, own in sizes.items()}
    dimension = shapes[0].head_dim
    assert fields["attention.key_length"] == fields["attention.value_length"] == dimension
    assert fields["rope.dimension_count"] == dimension
    assert fields["rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert fields["attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert fields["context_length"] == (6 if "sliding" in name else config.max_position_embeddings)
    assert (fields["block_count"], fields["embedding_length"]) == (reader.layers, 64)
    assert fields["vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == 97

    expected = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not reader.tied:
        expected["output.weight"] = "lm_head.weight"
    stored = reader.read(list(reader.tensors))
    for output_name, source_name in expected.items():
        assert np.array_equal(tensors.pop(output_name)[1], stored[source_name].numpy())
    if name == "llama-3-rope":
        assert tensors.pop("rope_freqs.weight")[1].shape == (dimension // 2,)
    for layer, shape in enumerate(shapes):
        own = reader.read_layer(layer)
        if architecture == "openelm":
            fused = [own.pop(f"self_attn.{linear}_proj.weight") for linear in "qkv"]
            assert np.array_equal(tensors.pop(f"blk.{layer}.attn_qkv.weight")[1], torch.cat(fused).numpy())
        for full, tensor in own.items():
            module, _, suffix = full.rpartition(".")
            written = tensors.pop(f"blk.{layer}.{(LINEARS | OTHERS)[module]}.{suffix}")[1]
            assert written.dtype == np.float32
            if module in ("self_attn.q_proj", "self_attn.k_proj") and architecture in ("llama", "deci"):
                heads = shape.kv_groups * (shape.heads_per_group if "q_proj" in module else 1)
                written = written.reshape(heads, dimension, -1)
                rows = tensor.reshape(heads, dimension, -1).numpy()
                # The two channels that transformers turns together are neighbours.
                assert np.array_equal(written[:, 0::2], rows[:, : dimension // 2])
                assert np.array_equal(written[:, 1::2], rows[:, dimension // 2 :])
            else:
                assert np.array_equal(written, tensor.numpy())
    assert not tensors
    assert any("sliding window" in line for line in summary["warnings"]) == ("sliding" in name)


def test_a_window_that_never_slides_cuts_nothing(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    mistral = checkpoint("mistral-sliding", tiny_checkpoint, tmp_path / "mistral")
    change_config(mistral, sliding_window=4096)
    qwen2 = checkpoint("qwen2-sliding", tiny_checkpoint, tmp_path / "qwen2")
    change_config(qwen2, use_sliding_window=False, layer_types=None)
    for number, source in enumerate((mistral, qwen2)):
        assert write_gguf(source, tmp_path / f"{number}.gguf")["warnings"] == []
        assert contents(tmp_path / f"{number}.gguf")[0]["context_length"] == 4096


def test_types(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Matrices in the type asked for, vectors in float32; rows that q8_0 cannot hold in f16."""
    source = pruned(checkpoint("llama-biases", tiny_checkpoint, tmp_path / "made"), tmp_path / "pruned", True)
    reader, files = CheckpointReader(source), {}
    for dtype in ("f32", "f16", "bf16", "q8_0"):
        summary = write_gguf(source, tmp_path / f"{dtype}.gguf", dtype)
        files[dtype] = contents(tmp_path / f"{dtype}.gguf")[1]
        ragged = ["blk.1.ffn_down.weight", "blk.2.ffn_down.weight"] if dtype == "q8_0" else []  # 52 and 33 channels
        assert summary["fallback"] == ragged
        assert [line for line in summary["warnings"] if "f16" in line] == [
            f"{len(ragged)} matrices are f16, their rows being no multiples of 32 ({name} is the first)"
            for name in ragged[:1]
        ]
        for name, (kind, array) in files[dtype].items():
            vector = files["f32"][name][1].ndim == 1
            assert kind == ("F32" if vector else "F16" if name in ragged else dtype.upper()), name
            assert vector == ("norm" in name or name.endswith("bias"))
            exact = files["f32"][name][1]
            if kind == "F16":
                assert np.array_equal(array, exact.astype(np.float16))
            if kind == "BF16":
                rounded = torch.from_numpy(exact.copy()).bfloat16()
                assert np.array_equal(array.view(np.int16), rounded.view(torch.int16).numpy())
            if kind == "Q8_0":
                blocks = exact.reshape(-1, 32)
                values = gguf.dequantize(array, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 32)
                scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
                # Half a step, and up to 127 steps off by the scale's rounding to float16.
                assert (np.abs(values - blocks) <= scale * (0.5 + 127 * 2**-11)).all()
                assert not np.array_equal(values, blocks)
    down = reader.read_layer(0)["mlp.down_proj.weight"].numpy()
    assert np.array_equal(files["f32"]["blk.0.ffn_down.weight"][1], down)


def test_bfloat16_weights_stay_bit_by_bit(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = with_tokenizer(tiny_checkpoint(vocab_size=97, head_dim=16), tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf", "bf16")
    stored = load_file(source / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    written = contents(tmp_path / "model.gguf")[1]["blk.2.ffn_up.weight"][1]
    assert np.array_equal(written.view(np.int16), stored.view(torch.int16).numpy())


def test_one_tensor_at_a_time(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama-mha", tiny_checkpoint, tmp_path / "made")
    reads: list[int] = []
    read = CheckpointReader.read

    def recorded(self: CheckpointReader, names: list[str]) -> dict[str, torch.Tensor]:
        reads.append(len(names))
        return read(self, names)

    monkeypatch.setattr(CheckpointReader, "read", recorded)
    steps: list[tuple[str, int, int]] = []
    summary = write_gguf(source, tmp_path / "model.gguf", progress=lambda *step: steps.append(step))
    assert reads == [1] * summary["tensors"]
    assert steps == [("export", done, summary["tensors"]) for done in range(summary["tensors"] + 1)]


def test_large_tensors_are_converted_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune.exporters import gguf as export

    tensor = torch.randn(37, 64, generator=torch.Generator().manual_seed(1))
    whole = {dtype: export.encode(tensor, dtype, "x") for dtype in export.DTYPES}
    monkeypatch.setattr(export, "_SLICE", 5 * 64)
    for dtype, expected in whole.items():
        assert np.array_equal(export.encode(tensor, dtype, "x"), expected)


class Stop(BaseException):
    """What an interruption is to the writer."""


def test_nothing_is_left_behind(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("llama-mha", tiny_checkpoint, tmp_path / "made")
    target = tmp_path / "target"
    target.mkdir()

    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds NaN or infinite weights"):
        write_gguf(
            infinite(source, tmp_path / "infinite", "model.layers.1.mlp.up_proj.weight"),
            target / "a" / "b" / "model.gguf",
        )

    def stop(what: str, done: int, total: int) -> None:
        if done == 9:
            (file,) = target.iterdir()
            assert re.fullmatch(r"\.model\.gguf\.[0-9a-f]{8}\.partial", file.name)
            raise Stop

    with pytest.raises(Stop):
        write_gguf(source, target / "model.gguf", progress=stop)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.gguf"):
            write_gguf(source, target / "model.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(target.iterdir()) == []

    write_gguf(source, target / "model.gguf")
    with pytest.raises(InputError, match="exists; name another output"):
        write_gguf(source, target / "model.gguf")
    assert [file.name for file in target.iterdir()] == ["model.gguf"]


def test_the_output_must_fit(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama-mha", tiny_checkpoint, tmp_path / "made")
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match=r"0\.1 MB free"):
        write_gguf(source, tmp_path / "model.gguf")


ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu: llama.cpp has silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling dynamic"),
        ({"rope_parameters": ROPE | {"rope_type": "yarn", "beta_fast": 16}}, "yarn with beta_fast 16"),
        ({"rope_parameters": ROPE | {"rope_type": "yarn", "truncate": False}}, "yarn with truncate False"),
        (
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor",
        ),
    ],
)
def test_refused_configurations(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    source = checkpoint("llama-mha", tiny_checkpoint, tmp_path / "made")
    change_config(source, **changes)
    with pytest.raises(InputError, match=reason):
        write_gguf(source, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_refused_sizes(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("llama-mha", tiny_checkpoint, tmp_path / "made")
    few, _ = pruned_copy(source, tmp_path / "few", [(4, 160), (4, 31), (4, 160)], False)
    with pytest.raises(InputError, match=r"layer 1 has 31 FFN channels: llama\.cpp needs at least 32"):
        write_gguf(few, tmp_path / "model.gguf")
    whole = LayerShape(64, 16, 2, 2, 160)
    with pytest.raises(InputError, match="layer 0 has no attention heads"):
        check_shapes([whole.kept(0, 160), whole])
    with pytest.raises(InputError, match="head dimension differs"):
        check_shapes([whole, LayerShape(64, 32, 2, 2, 160)])
    with pytest.raises(InputError, match="'q4_0' is not one of f32, f16, bf16, q8_0"):
        write_gguf(source, tmp_path / "model.gguf", "q4_0")


def test_weights_that_float16_does_not_reach(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = with_tokenizer(tiny_checkpoint(dtype="float32", vocab_size=97), tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 5] = -70000.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"token_embd\.weight holds weights of up to 70000, too large for f16: use bf16"
    ):
        write_gguf(source, tmp_path / "model.gguf")
    for dtype in ("bf16", "q8_0"):
        write_gguf(source, tmp_path / f"{dtype}.gguf", dtype)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_tokenizer(family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer there"):
        write_gguf(tiny_checkpoint(family=family, vocab_size=97), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_gguf_is_asked_for(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'pyprune\[gguf\]'"):
        write_gguf(tiny_checkpoint(vocab_size=97), tmp_path / "model.gguf")


def test_every_family_is_tried() -> None:
    assert set(FAMILIES) < set(ARCHITECTURES)


def test_a_modelfile_stands_beside_the_file(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1, "top_k": True}
    expected = "FROM ./model.gguf\nPARAMETER temperature 0.6\nPARAMETER top_p 0.95\nPARAMETER repeat_penalty 1.1\n"
    assert modelfile_of(Path("a", "model.gguf"), settings) == expected
    assert modelfile_of(Path("model.gguf"), settings | {"do_sample": False}) == "FROM ./model.gguf\n"
    source = with_tokenizer(tiny_checkpoint(), tmp_path / "source")
    made = pyprune.export(source, tmp_path / "one.gguf", "gguf", verify=False)
    assert (tmp_path / "one.Modelfile").read_text().startswith("FROM ./one.gguf\n")
    assert any("ollama create one -f " in note for note in made["notes"])
    (tmp_path / "two.Modelfile").write_text("mine")
    made = pyprune.export(source, tmp_path / "two.gguf", "gguf", verify=False)
    assert (tmp_path / "two.Modelfile").read_text() == "mine"
    assert f"{tmp_path / 'two.Modelfile'}: kept as it was" in made["notes"]
