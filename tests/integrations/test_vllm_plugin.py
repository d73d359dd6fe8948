"""The vLLM plugin: what it registers, and, where vLLM is installed, what vLLM computes against transformers.

Where there is no vLLM the tests that run it are skipped. Run as a program, this file is one vLLM engine:

    python tests/integrations/test_vllm_plugin.py ARGUMENTS.json RESULT.json
"""

import ast
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune import InputError
from pyprune.architectures import FAMILIES, LayerShape
from pyprune.checkpoint import CheckpointReader
from pyprune.integrations.vllm import MODELS, register
from pyprune.integrations.vllm.tensor_parallel import check_tensor_parallel
from pyprune.job.config import PruneConfig
from pyprune.modeling import PRUNED_CLASSES, pruned_config
from pyprune.pipeline.run import prune
from pyprune.runtime.progress import silent

HAS_VLLM = importlib.util.find_spec("vllm") is not None
DEVICES = torch.cuda.device_count() or len(os.sched_getaffinity(0))
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")

# What each layer keeps of 4 KV groups of 2 heads and of 160 channels. Two devices share layer 2's one group.
KV_GROUPS, CHANNELS = (4, 2, 1, 4), (160, 64, 96, 128)
DENSE_SIZES = {"hidden_size": 128, "layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 32, "intermediate_size": 160}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral-sliding": {"family": "mistral", "sliding_window": 12},
    "qwen2": {"family": "qwen2"},
    "qwen2-sliding": {
        "family": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2,
        "layer_types": None,
    },
    "qwen3-tied": {"family": "qwen3", "tie": True},
}  # fmt: skip
PROMPTS = [[(7 * i + 3) % 256 for i in range(40)], [(11 * i + 5) % 256 for i in range(23)]]
NEW_TOKENS = 12
CACHE_BYTES = 1 << 27
# Both sides round float32 products of other shapes; log-probabilities near -6 differ by up to 4e-6.
FLOAT32_TOLERANCE = 2e-5


def layer(kv_groups: int, heads_per_group: int, channels: int) -> LayerShape:
    return LayerShape(64, 16, kv_groups, heads_per_group, channels)


def pruned(
    tiny_checkpoint: Callable[..., Path],
    folder: Path,
    variant: str,
    kv_groups: tuple[int, ...] = KV_GROUPS,
    biased: bool = True,
) -> Path:
    """A random checkpoint whose layers have the sizes above, with output projection biases if `biased`."""
    reader = CheckpointReader(tiny_checkpoint(dtype="float32", **DENSE_SIZES, **VARIANTS[variant]))
    shapes = [s.kept(g, c) for s, g, c in zip(reader.shapes, kv_groups, CHANNELS, strict=True)]
    config = pruned_config(reader.family, reader.config, shapes, biased, biased)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 and (parameter == 1).all() else 0.0, 0.1, generator=generator)
    model.save_pretrained(folder / variant)
    return folder / variant


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_architecture_that_we_write_is_registered(
    family: str, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: dict[str, str] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    register()
    register()
    assert registered.keys() == {PRUNED_CLASSES[own.name][2].__name__ for own in FAMILIES.values() if own.vllm}
    reader = CheckpointReader(tiny_checkpoint(family=family))
    shapes = [s.kept(1 + number % 2, 40) for number, s in enumerate(reader.shapes)]
    (architecture,) = pruned_config(reader.family, reader.config, shapes, False, False).architectures
    module, name = registered[architecture].split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    classes = [node.name for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, ast.ClassDef)]
    assert name in classes
    assert module not in sys.modules or HAS_VLLM, "registering must not import the model"


def test_registering_needs_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError):
        register()


def test_what_vllm_reads_of_a_configuration(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """vLLM sizes its buffers by the whole model's values and its KV cache by the layers' own."""
    config = AutoConfig.from_pretrained(pruned(tiny_checkpoint, tmp_path, "qwen3-tied"))
    assert config.is_heterogeneous
    assert len(config.per_layer_config) == config.num_hidden_layers == 4
    assert [own.num_key_value_heads for own in config.per_layer_config] == list(KV_GROUPS)
    assert [own.num_attention_heads for own in config.per_layer_config] == [2 * groups for groups in KV_GROUPS]
    assert [own.intermediate_size for own in config.per_layer_config] == list(CHANNELS)
    whole = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    assert whole == (2 * max(KV_GROUPS), max(KV_GROUPS), max(CHANNELS))
    for each in (config, *config.per_layer_config):
        assert (each.head_dim, each.hidden_size, each.model_type) == (32, 128, "pyprune_qwen3")
        assert each.o_proj_bias
        assert each.down_proj_bias
    assert config.architectures[0] in MODELS


def loses_no_head(shape: LayerShape, size: int) -> bool:
    """Deal a layer out to `size` devices as vLLM does; True if every query head lies with its key and value head."""
    groups, heads = shape.kv_groups, shape.kv_groups * shape.heads_per_group
    if heads % size or shape.intermediate_channels % size:
        return False
    dealt = []
    for device in range(size):
        queries = range(device * heads // size, (device + 1) * heads // size)
        own = max(1, groups // size)  # vLLM: max(1, total_num_kv_heads // tp_size)
        first = device * own if groups >= size else device * groups // size
        needed = [head // shape.heads_per_group for head in queries]
        # The attention kernel pairs the heads on a device by their number there.
        paired = [first + head * own // len(queries) for head in range(len(queries))]
        if needed != paired:
            return False
        dealt += range(first, first + own)
    return set(dealt) == set(range(groups))


def test_a_layer_is_split_only_where_every_head_finds_its_group() -> None:
    for groups, per_group, channels, size in itertools.product(range(1, 9), (1, 2, 3, 4), (8, 12), range(1, 9)):
        shape = layer(groups, per_group, channels)
        try:
            check_tensor_parallel([shape], size)
            accepted = True
        except InputError:
            accepted = False
        assert accepted == loses_no_head(shape, size), (shape, size)


@pytest.mark.parametrize(
    ("second", "size", "obstacle", "possible"),
    [
        (layer(3, 2, 64), 2, "its 3 KV groups are neither a multiple nor a divisor of 2", "1"),
        (layer(2, 2, 64), 8, "its 4 query heads are no multiple of 8", "1, 2, 4"),
        (layer(4, 2, 66), 4, "its 66 FFN channels are no multiple of 4", "1, 2"),
    ],
)
def test_the_error_names_the_layer(second: LayerShape, size: int, obstacle: str, possible: str) -> None:
    with pytest.raises(InputError) as error:
        check_tensor_parallel([layer(8, 2, 128), second, layer(8, 2, 128)], size)
    assert str(error.value) == (
        f"layer 1 cannot be split over {size} devices: {obstacle}; tensor_parallel_size may be {possible}, and "
        "pipeline_parallel_size uses more devices"
    )


def engine(folder: Path, scratch: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Serve the prompts in a process of its own; its result is in `scratch`/result.json."""
    arguments, result = scratch / "arguments.json", scratch / "result.json"
    arguments.write_text(json.dumps({"model": str(folder), "kv_cache_memory_bytes": CACHE_BYTES} | options))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        # A process a core: without it vLLM wants a NUMA node for each.
        cores = sorted(os.sched_getaffinity(0))[: options.get("tensor_parallel_size", 1)]
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))}
    return subprocess.run(
        [sys.executable, __file__, arguments, result], cwd=scratch, env=environment, capture_output=True, text=True
    )


def log_probabilities(folder: Path, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """transformers' log-probabilities of every token but the first, on the CPU: float32 [tokens - 1, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), dim=-1)


def check_against_transformers(folder: Path, scratch: Path, dtype: str, **options: Any) -> dict[str, Any]:
    """vLLM's log-probabilities of prompts (prefill) and of its own continuations (KV cache) are transformers'.

    In another type than float32 vLLM may be three times as far from float32 as transformers is in that type.
    """
    process = engine(folder, scratch, dtype=dtype, **options)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    result = json.loads((scratch / "result.json").read_text())
    assert len(result["outputs"]) == len(PROMPTS)
    for prompt, output in zip(PROMPTS, result["outputs"], strict=True):
        ids = prompt + output["tokens"]
        assert len(output["tokens"]) == NEW_TOKENS
        expected = log_probabilities(folder, ids, torch.float32)
        chosen = torch.tensor(ids[1:])[:, None]
        tolerance = FLOAT32_TOLERANCE
        if dtype != "float32":
            rounded = log_probabilities(folder, ids, getattr(torch, dtype))
            tolerance = 3 * (rounded - expected).abs().max().item()
        found = torch.tensor(output["logprobs"])
        torch.testing.assert_close(found, expected.gather(1, chosen)[:, 0], rtol=0, atol=tolerance)
        best = expected[len(prompt) - 1 :].max(dim=-1).values
        taken = expected.gather(1, chosen)[len(prompt) - 1 :, 0]
        assert (best - taken).max() <= 2 * tolerance, "not the most likely token"
    return result


def engine_dtype() -> str:
    """vLLM's attention on a GPU wants two bytes; on a CPU float32 shows the smallest mistake."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


@needs_vllm
def test_plugin_is_an_entry_point_and_its_class_imports() -> None:
    from importlib.metadata import entry_points

    (plugin,) = entry_points(group="vllm.general_plugins", name="pyprune")
    assert plugin.load() is register
    for target in set(MODELS.values()):
        module, name = target.split(":")
        assert getattr(importlib.import_module(module), name).__mro__[1].__name__ == "LlamaForCausalLM"


@needs_vllm
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_family(variant: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = pruned(tiny_checkpoint, tmp_path, variant)
    check_against_transformers(folder, tmp_path, engine_dtype(), enforce_eager=True)


@needs_vllm
def test_half_precision_without_biases(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = pruned(tiny_checkpoint, tmp_path, "llama", biased=False)
    check_against_transformers(folder, tmp_path, "bfloat16", enforce_eager=True)


@needs_vllm
def test_kv_cache_is_of_each_layers_own_size(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """As many blocks as the memory holds when each layer takes 2 · KV groups · head_dim numbers a token."""
    folder = pruned(tiny_checkpoint, tmp_path, "llama")
    dtype = engine_dtype()
    result = check_against_transformers(folder, tmp_path, dtype, enforce_eager=True)
    bytes_per_token = sum(KV_GROUPS) * 2 * 32 * getattr(torch, dtype).itemsize
    assert result["blocks"] == CACHE_BYTES // (result["block_size"] * bytes_per_token)


@needs_vllm
def test_compiled(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = pruned(tiny_checkpoint, tmp_path, "qwen3-tied")
    check_against_transformers(folder, tmp_path, engine_dtype(), enforce_eager=False)


@needs_vllm
@pytest.mark.skipif(DEVICES < 2, reason="needs two GPUs, or two cores where there is none")
def test_two_devices(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = pruned(tiny_checkpoint, tmp_path, "llama-biases")
    options = {"enforce_eager": True, "tensor_parallel_size": 2}
    check_against_transformers(folder, tmp_path, engine_dtype(), **options)

    folder = pruned(tiny_checkpoint, tmp_path, "llama", kv_groups=(4, 3, 2, 4))
    process = engine(folder, tmp_path, dtype=engine_dtype(), **options)
    assert process.returncode != 0
    assert "layer 1 cannot be split over 2 devices: its 3 KV groups are neither" in process.stdout + process.stderr


@needs_vllm
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: vLLM 0.32 has no pipeline on CPUs")
def test_pipeline(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = pruned(tiny_checkpoint, tmp_path, "llama")
    check_against_transformers(folder, tmp_path, engine_dtype(), enforce_eager=True, pipeline_parallel_size=2)


@needs_vllm
def test_a_pruned_model(demo_model: Path, tmp_path: Path) -> None:
    """A trained model, pruned with compensation biases, in the checkpoint's own bfloat16 (the biases are float32)."""
    output = tmp_path / "pruned"
    sizes = {"samples": 24, "sequence_length": 64, "device": "cpu"}
    prune(PruneConfig(str(demo_model), output, "flap", 0.3, calibration="self", **sizes), silent)
    config = AutoConfig.from_pretrained(output)
    assert config.is_heterogeneous
    assert config.o_proj_bias
    check_against_transformers(output, tmp_path, "bfloat16", enforce_eager=True)


def serve(model: str, **options: Any) -> dict[str, Any]:
    """One vLLM engine on PROMPTS: each one's new tokens, and log-probabilities of all tokens but the first."""
    from vllm import LLM, SamplingParams

    has_tokenizer = Path(model, "tokenizer.json").exists()
    llm = LLM(model, skip_tokenizer_init=not has_tokenizer, max_model_len=128, max_num_seqs=4, **options)
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    outputs = []
    for request in llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling):
        completion = request.outputs[0]
        tokens = [*request.prompt_token_ids, *completion.token_ids][1:]
        found = [*request.prompt_logprobs[1:], *completion.logprobs]
        logprobs = [by_token[token].logprob for token, by_token in zip(tokens, found, strict=True)]
        outputs.append({"tokens": list(completion.token_ids), "logprobs": logprobs})
    cache = llm.llm_engine.vllm_config.cache_config
    return {"outputs": outputs, "blocks": cache.num_gpu_blocks, "block_size": cache.block_size}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(serve(**json.loads(Path(sys.argv[1]).read_text()))))
