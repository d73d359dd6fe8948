"""A whole model of a checkpoint folder on one device, for the steps that need all layers at once."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import modeling as modeling  # registers the classes of pruned models
from .errors import InputError


def load_model(folder: str | Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model in `folder`, in `dtype`, for inference, with SDPA attention.

    InputError: no such folder or no model in it, or tensors that are missing, have another shape, or are not
    used by the model's class (transformers would start the first two at random and drop the last).
    """
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, in a line
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    problems = {
        "lacks": loading["missing_keys"],
        "has tensors that its class does not use:": loading["unexpected_keys"],
        "has tensors of another shape than its config.json says:": [name for name, *_ in loading["mismatched_keys"]],
    }
    for problem, names in problems.items():
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder} {problem} {min(names)}{rest} ({type(model).__name__})")
    return model.to(device).eval().requires_grad_(False)
