"""A pruned model of one size in every layer is quantised by llm-compressor as any other, and only in whole groups.

llm-compressor runs in a process that knows nothing of pyprune: in this environment where it is installed, else in the
one whose Python PYPRUNE_LLM_COMPRESSOR names (its releases allow a narrow range of transformers, and may lag behind).
Where there is neither the tests are skipped.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune.calibration.sampling import sample_from_model
from pyprune.evaluation.perplexity import perplexity
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GROUP = 128  # columns that share a scale in the preset W4A16
PER_WORD = 8  # numbers of 4 bits in an int32
# Perplexity times 1.058 on these windows (llm-compressor 0.14.0.1); rounded to nearest instead, with scales of
# max / 7.5, times 1.087; with each row's scales taken from the row before, times 2.56.
FACTOR = 1.1

# The whole of what a user of llm-compressor writes, and then the model's reload. Arguments: model, output, windows.
PROGRAM = """
import json
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

source, output, file = sys.argv[1:]
windows = load_file(file)


def perplexity(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.double() for row in windows["evaluation"]]
    return type(model).__name__, torch.stack(losses).mean().exp().item()


model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
rows = windows["calibration"]
dataset = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
oneshot(model=model, dataset=dataset, recipe=recipe, num_calibration_samples=len(rows), max_seq_length=rows.shape[1])
model.save_pretrained(output, save_compressed=True)
result = {"pruned": perplexity(source), "quantised": perplexity(output)}
print(json.dumps(result | {"pyprune": any(name.split(".")[0] == "pyprune" for name in sys.modules)}))
"""


@pytest.fixture(scope="module")
def llm_compressor() -> str:
    """A Python that has llm-compressor."""
    python = os.environ.get("PYPRUNE_LLM_COMPRESSOR", sys.executable)
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"
    if subprocess.run([python, "-I", "-c", find], check=False).returncode:
        if python != sys.executable:
            pytest.fail(f"PYPRUNE_LLM_COMPRESSOR={python} has no llm-compressor")
        pytest.skip("llm-compressor is not installed; PYPRUNE_LLM_COMPRESSOR may name a Python that has it")
    return python


@pytest.fixture(scope="module")
def windows(demo_model: Path) -> dict[str, Tensor]:
    """Text of the model's own, int64: `calibration` [32, 128] and `evaluation` [16, 128]."""
    return {
        name: sample_from_model(demo_model, samples, 128, seed, CPU, torch.float32)
        for name, samples, seed in (("calibration", 32, 1), ("evaluation", 16, 2))
    }


def quantise(python: str, model: Path, output: Path, windows: dict[str, Tensor]) -> subprocess.CompletedProcess[str]:
    file = output.with_suffix(".safetensors")
    save_file(windows, file)
    return subprocess.run(
        [python, "-I", "-c", PROGRAM, model, output, file],
        capture_output=True,
        text=True,
        check=False,
        cwd=output.parent,  # it writes a folder of logs
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (the file is no mapping)
                yield name, tensors.get_tensor(name)


def decoded(packed: Tensor, scale: Tensor) -> Tensor:
    """Weights [out, in] of int32 words [out, in / 8], lowest bits first and 8 for zero, and scales [out, in / 128]."""
    numbers = torch.stack([(packed >> (4 * place)) & 15 for place in range(PER_WORD)], dim=-1)  # [out, in / 8, 8]
    return (numbers.flatten(1) - 8).float() * scale.float().repeat_interleave(GROUP, dim=1)


def test_gptq_of_a_pruned_model(
    llm_compressor: str, demo_model: Path, windows: dict[str, Tensor], tmp_path: Path
) -> None:
    pruned, output = tmp_path / "pruned", tmp_path / "quantised"
    options: dict[str, Any] = {"uniform": True, "allocation": "uniform", "round_to": GROUP}
    prune(
        PruneConfig(str(demo_model), pruned, "obs", 0.5, options, "self", samples=32, sequence_length=128, device="cpu")
    )
    sizes = AutoConfig.from_pretrained(pruned)
    assert (sizes.model_type, sizes.num_key_value_heads, sizes.intermediate_size) == ("llama", 2, 3 * GROUP)

    finished = quantise(llm_compressor, pruned, output, windows)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert not result["pyprune"], "that a stock class loads it is the point"
    assert result["pruned"][0] == result["quantised"][0] == "LlamaForCausalLM"

    # Every decoder linear is in 4-bit numbers with a scale for each group, and in nothing else.
    quantisation = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (quantisation["quant_method"], quantisation["format"]) == ("compressed-tensors", "pack-quantized")
    weights = quantisation["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, GROUP, True)
    before, after = dict(stored(pruned)), dict(stored(output))
    linears = [name for name in before if name.endswith("_proj.weight")]
    assert len(linears) == 7 * sizes.num_hidden_layers
    state = {name: tensor.float() for name, tensor in before.items() if name not in linears}
    for name in linears:
        rows, columns = before[name].shape
        packed, scale = after.pop(f"{name}_packed"), after.pop(f"{name}_scale")
        assert after.pop(f"{name}_shape").tolist() == [rows, columns]
        assert (packed.dtype, packed.shape) == (torch.int32, (rows, columns // PER_WORD))
        assert scale.shape == (rows, columns // GROUP)
        state[name] = decoded(packed, scale)
    assert after.keys() == before.keys() - set(linears)

    # Transformers computes what the words on the disk say, and that is near to the pruned model.
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    own = perplexity(model, windows["evaluation"])
    model.load_state_dict(state, strict=False)
    of_words = perplexity(model, windows["evaluation"])
    assert result["pruned"][1] == pytest.approx(own, rel=1e-4)
    assert result["quantised"][1] == pytest.approx(of_words, rel=1e-4)
    assert of_words != own
    assert of_words < FACTOR * own


def test_widths_that_no_group_divides(llm_compressor: str, demo_model: Path, tmp_path: Path) -> None:
    """llm-compressor refuses them before it computes anything, so any tokens do: hence --round-to."""
    pruned, output = tmp_path / "pruned", tmp_path / "quantised"
    prune(PruneConfig(str(demo_model), pruned, "magnitude", 0.5, {"uniform": True}, device="cpu"))
    sizes = AutoConfig.from_pretrained(pruned)
    assert sizes.intermediate_size % GROUP
    tokens = torch.arange(2 * GROUP).view(2, GROUP)
    finished = quantise(llm_compressor, pruned, output, {"calibration": tokens, "evaluation": tokens.clone()})
    assert finished.returncode == 1
    assert not output.exists()
    named = re.findall(r"- model\.layers\.(\d+)\.mlp\.down_proj \(columns=(\d+), group_size=(\d+)\)", finished.stderr)
    expected = [(str(n), str(sizes.intermediate_size), str(GROUP)) for n in range(sizes.num_hidden_layers)]
    assert named == expected, finished.stderr
