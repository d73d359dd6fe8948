"""A whole model of a checkpoint folder on one device, for the steps that need all layers at once."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from .. import modeling as modeling  # registers the classes of pruned models
from ..architectures.wrappers import WRAPPERS as WRAPPING
from ..errors import InputError
from ..runtime.files import read_json, reason_of
from .headers import INDEX, SINGLE, read_headers, weight_files
from .model_in_memory import ModelInMemory
from .names import WRAPPERS, check_counts

_FLOATING = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Tensors that no causal language model computes with: tables of rotary embeddings and of masks that were saved once,
# the head of a value model, scales of a quantised KV cache.
_UNUSED = re.compile(r"rotary_emb\.\w+$|\.masked_bias$|^v_head\.|\.[kqv]_scale$|\.kv_cache\.")


def load_model(
    folder: str | Path | ModelInMemory, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the causal language model in `folder`, in `dtype`, for inference, with SDPA attention where it has it.

    One in memory gets modules of its own; their tensors are the given ones where device and type are the same.
    Whatever transformers loads from safetensors, quantised models too (on their own terms about the device).
    InputError: no such folder or no model in it, whatever transformers says against it, or tensors that are missing,
    have another shape, or are not used by the model's class (transformers would start the first two at random and
    drop the last).
    """
    if not isinstance(folder, ModelInMemory) and not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    try:
        if isinstance(folder, ModelInMemory):
            model, loading = _from_memory(folder, device, dtype)
        else:
            model, loading = _from_pretrained(Path(folder), device, dtype, trust_remote_code)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of safetensors, of a quantiser that is not installed, of a damaged file, ...
        raise InputError(f"{folder} cannot be loaded: {reason_of(error)}") from error
    unused = [name for name in loading["unexpected_keys"] if not _UNUSED.search(name)]
    problems = {
        "lacks": loading["missing_keys"],
        "has tensors that its class does not use:": unused,
        "has tensors of another shape than its config.json says:": [name for name, *_ in loading["mismatched_keys"]],
    }
    for problem, names in problems.items():
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder} {problem} {min(names)}{rest} ({type(model).__name__})")
    return model.eval().requires_grad_(False)


def _from_pretrained(
    folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    fields = read_json(folder / "config.json")
    quantised = isinstance(fields, dict) and bool(fields.get("quantization_config"))
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "local_files_only": True,
        "use_safetensors": True,  # never a pickle
        "trust_remote_code": trust_remote_code,
        "ignore_mismatched_sizes": True,  # reported by the caller, in a line
        "output_loading_info": True,
    }
    if any(WRAPPERS.search(name) for name in read_headers(weight_files(folder, fields))):
        arguments["key_mapping"] = {WRAPPERS.pattern: r"\1"}
    if quantised:  # cannot be moved afterwards
        arguments["device_map"] = {"": device}
    auto = AutoModelForCausalLM
    if isinstance(fields, dict) and fields.get("model_type") in WRAPPING:
        auto = AutoModelForImageTextToText
    try:
        model, loading = auto.from_pretrained(folder, attn_implementation="sdpa", **arguments)
    except (ValueError, ImportError) as error:
        if "attention" not in str(error):
            raise
        model, loading = auto.from_pretrained(folder, **arguments)  # a class without SDPA
    return model if quantised else model.to(device), loading


def _from_memory(
    given: ModelInMemory, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """By transformers' own loading, so that the modules are those that a saved copy would have."""
    config = copy.deepcopy(given.config)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, loading = model_class.from_pretrained(
        None,
        config=config,
        state_dict=dict(given.state),
        dtype=dtype,
        attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if given.generation_config is not None:
        model.generation_config = copy.deepcopy(given.generation_config)
    return model.to(device), loading


def evaluation_model(folder: Path, trust_remote_code: bool) -> tuple[Any, torch.dtype]:
    """Configuration and stored type of any causal language model, of those too that pyprune cannot prune.

    InputError: no folder, no config.json in it, or one that transformers refuses.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a checkpoint folder or a hub id such as org/name")
    if not path.is_file():
        raise InputError(f"{folder}: no config.json there; a Hugging Face checkpoint folder is needed")
    fields = read_json(path)  # says in our words what is wrong with the file
    if isinstance(fields, dict) and (folder / SINGLE).is_file() | (folder / INDEX).is_file():
        check_counts(str(path), fields, read_headers(weight_files(folder, fields)))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        vocabulary_size(config)
    except Exception as error:  # bare ones too, of the code of a checkpoint
        raise InputError(f"{path}: transformers refuses this configuration: {reason_of(error)}") from error
    return config, _stored_dtype(folder, config)


def vocabulary_size(config: Any) -> int:
    """Vocabulary size of the text part of a configuration."""
    return int(config.get_text_config().vocab_size)


def _stored_dtype(folder: Path, config: Any) -> torch.dtype:
    """The type of most stored numbers, among those that are computed with; else what the configuration says."""
    counts = dict.fromkeys(_FLOATING, 0)
    for file in filter(Path.is_file, folder.glob("*.safetensors")):  # a pipe would be waited for
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    part = stored.get_slice(name)
                    if part.get_dtype() in counts:
                        counts[part.get_dtype()] += torch.Size(part.get_shape()).numel()
        except Exception:  # a damaged file is the loading's to name
            continue
    most = max(counts, key=lambda name: counts[name])
    if counts[most]:
        return _FLOATING[most]
    said = getattr(config.get_text_config(), "dtype", None)
    return next((dtype for dtype in _FLOATING.values() if dtype == said), torch.float32)
