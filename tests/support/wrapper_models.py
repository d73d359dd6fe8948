"""One small random vision-language model of every kind that holds a text model, with an image for each."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from pyprune.architectures.wrappers import CLASS_SPELLING, WRAPPERS
from support.family_models import SIZES

IMAGE = 92  # the token in an image's place
_TEXT = SIZES | {"hidden_size": 40, "pad_token_id": 0}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 14}
_TOWER = _VISION | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
_QWEN = {
    "vision_config": _VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 40, "num_position_embeddings": 16},
    "image_token_id": IMAGE,
    "video_token_id": 93,
    "vision_start_token_id": 94,
    "vision_end_token_id": 95,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 12,
            "tie_word_embeddings": True,
        },
        "vision_config": _TOWER,
        "mm_tokens_per_image": 1,
        "boi_token_index": 90,
        "eoi_token_index": 91,
        "image_token_index": IMAGE,
        "tie_word_embeddings": True,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": _TOWER | {"model_type": "pixtral", "head_dim": 8, "image_size": 56},
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    },
    "qwen3_vl": _QWEN
    | {
        "text_config": _TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        "vision_config": _QWEN["vision_config"] | {"deepstack_visual_indexes": [0]},
    },
    "qwen3_5": _QWEN
    | {
        "text_config": _TEXT
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    },
}
CONFIGS["mistral3 around ministral3"] = CONFIGS["mistral3"] | {
    "text_config": _TEXT | {"model_type": "ministral3", "sliding_window": None}
}


def small_wrapper(name: str) -> Any:
    """A model of one of CONFIGS in float32; every tensor is drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some begin with drawn numbers
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name.split()[0], **CONFIGS[name])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(parameter + 0.2 * drawn)
            else:
                parameter.copy_(drawn / parameter.shape[-1] ** (0.25 if "language_model" in key else 0.5))
    return model


def save_wrapper(name: str, folder: Path) -> Path:
    """As it is published: with a processor's settings and a chat template, and a config.json that leaves much out."""
    small_wrapper(name).save_pretrained(folder)
    for file in ("preprocessor_config.json", "processor_config.json"):
        (folder / file).write_text(json.dumps({"do_rescale": True}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    fields = json.loads((folder / "config.json").read_text())
    if name.startswith("mistral3"):
        del fields["tie_word_embeddings"]  # the class then says that it is tied
    if name == "gemma3":  # numbers that are the class's are not there
        del fields["text_config"]["num_attention_heads"], fields["text_config"]["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def respelled(folder: Path, target: Path) -> Path:
    """A copy whose tensors have the names of transformers' class, where the files have older ones."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    wrapper = WRAPPERS[json.loads((folder / "config.json").read_text())["model_type"]]
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        inner = wrapper.spellings[0].inner(name)
        tensors["model." + name if inner is None else CLASS_SPELLING.stored(inner)] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def image_inputs(name: str) -> dict[str, Tensor]:
    """What the model is given for eight tokens, of which one, or of Mistral 3 two, are an image's."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[5, 6, 94, IMAGE, 95, 7, 8, 9]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("qwen"):
        pixels = torch.randn(4, 3 * 2 * 14 * 14, generator=generator)
        types = (ids == IMAGE).int()
        return given | {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]]), "mm_token_type_ids": types}
    if name.startswith("mistral3"):
        ids[0, 4] = IMAGE
        pixels = torch.randn(1, 3, 56, 28, generator=generator)
        return given | {"pixel_values": pixels, "image_sizes": torch.tensor([[56, 28]])}
    return given | {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
