"""A whole model of a checkpoint folder on one device, for the steps that need all layers at once."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import modeling as modeling  # registers the classes of pruned models
from .errors import InputError


def load_model(folder: str | Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model in `folder`, in `dtype`, for inference, with SDPA attention.

    InputError: no such folder or no model in it, or tensors that are missing or that the model's class
    does not use (transformers would start the former at random and drop the latter).
    """
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    for problem, fate in (("missing_keys", "lacks"), ("unexpected_keys", "has tensors that its class ignores:")):
        if loading[problem]:
            names = sorted(loading[problem])
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder} {fate} {names[0]}{rest}: it does not fit {type(model).__name__}")
    return model.to(device).eval().requires_grad_(False)
