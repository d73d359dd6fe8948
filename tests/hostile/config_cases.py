"""Damage to config.json: its JSON, its values, and what they mean together."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import EITHER, REFUSED, SAME, Case, Damage, called, evaluate, every_command, export, plan, prune
from documents import WHOLE, Change, Place, replace, value_damages, with_value

FILE = "model/config.json"
NAMES = (
    "architectures", "attention_bias", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act",
    "hidden_size", "intermediate_size", "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "vocab_size", "initializer_range",
)  # fmt: skip
FIELDS: tuple[Place, ...] = (
    *((name,) for name in NAMES),
    ("rope_parameters", "rope_theta"),
    ("rope_parameters", "rope_type"),
)
LAYERED: tuple[Place, ...] = (
    ("per_layer_config",), ("allow_global_per_layer_attribute_access",), ("o_proj_bias",), ("num_attention_heads",)
)  # fmt: skip


def changed(**values: Any) -> Damage:
    """config.json with other values; None drops one (`Null` stands for JSON's)."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / FILE).read_text()) | values
        document = {key: value for key, value in document.items() if value is not None}
        replace(folder / FILE, json.dumps(document).encode())

    return damage


def by(change: Change, file: str = FILE) -> Damage:
    def damage(folder: Path) -> None:
        replace(folder / file, change((folder / file).read_bytes()))

    return damage


# Refused whatever the command: the sizes cannot be those of the tensors, or no model has them.
IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "layers-1e9": {"num_hidden_layers": 10**9},
    "layers-2-to-63": {"num_hidden_layers": 2**63},
    "one-layer-too-many": {"num_hidden_layers": 3},
    "one-layer-too-few": {"num_hidden_layers": 1},
    "no-layers": {"num_hidden_layers": 0},
    "heads-not-dividing": {"num_attention_heads": 3},
    "more-kv-heads-than-heads": {"num_key_value_heads": 8},
    "kv-heads-not-dividing": {"num_key_value_heads": 3},
    "no-kv-heads": {"num_key_value_heads": 0},
    "no-heads": {"num_attention_heads": 0},
    "head-dim-odd": {"head_dim": 7},
    "head-dim-0": {"head_dim": 0},
    "hidden-1e9": {"hidden_size": 10**9},
    "intermediate-1e12": {"intermediate_size": 10**12},
    "vocabulary-1e9": {"vocab_size": 10**9},
    "vocabulary-smaller": {"vocab_size": 8191},
    "vocabulary-larger": {"vocab_size": 8193},
    "vocabulary-0": {"vocab_size": 0},
    "tied-flag-off": {"tie_word_embeddings": False},
    "biases-that-are-not-there": {"attention_bias": True},
    "another-family": {"model_type": "qwen3"},
    "no-family": {"model_type": "mamba"},
    "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "eps-string": {"rms_norm_eps": "small"},
    "eps-negative": {"rms_norm_eps": -1.0},
    "eps-nan": {"rms_norm_eps": float("nan")},
    "eps-infinite": {"rms_norm_eps": float("inf")},
    "positions-0": {"max_position_embeddings": 0},
    "positions-negative": {"max_position_embeddings": -5},
    "activation-unknown": {"hidden_act": "../../etc/passwd"},
}
# A model may be like that, or not: it is refused, or what comes of it is whole.
DOUBTFUL: dict[str, dict[str, Any]] = {
    "positions-15": {"max_position_embeddings": 15},
    "positions-1e18": {"max_position_embeddings": 10**18},
    "eps-huge": {"rms_norm_eps": 1e30},
    "theta-0": {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
    "theta-negative": {"rope_parameters": {"rope_type": "default", "rope_theta": -10000.0}},
    "theta-nan": {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
    "theta-string": {"rope_parameters": {"rope_type": "default", "rope_theta": "much"}},
    "rope-unknown": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
    "rope-empty": {"rope_parameters": {}},
    "rope-list": {"rope_parameters": [1, 2]},
    "rope-linear-0": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
    "rope-linear-negative": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}},
    "rope-linear-without": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    "rope-linear-string": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}},
    "rope-linear-nan": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}},
    "rope-dynamic-infinite": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": float("inf")}},
    "rope-yarn-bare": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "rope-yarn-negative": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": -4.0,
                                               "beta_fast": -1, "beta_slow": 0}},
    "rope-longrope-short": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
                                                "short_factor": [1.0], "long_factor": [1.0],
                                                "original_max_position_embeddings": 16}},
    "rope-llama3-bare": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
    "rope-llama3-equal": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                                              "low_freq_factor": 1.0, "high_freq_factor": 1.0,
                                              "original_max_position_embeddings": 16}},
    "rope-scaling-old": {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "su", "factor": 2}},
    "rope-partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": -1}},
    "bos-beyond": {"bos_token_id": 10**6},
    "eos-beyond": {"eos_token_id": [1, 10**9]},
    "eos-negative": {"eos_token_id": -7},
    "pad-beyond": {"pad_token_id": 8192},
    "pad-huge": {"pad_token_id": 2**70},
    "dtype-unknown": {"dtype": "int3"},
    "dtype-attribute": {"dtype": "nn"},
    "architectures-other": {"architectures": ["MambaForCausalLM"]},
    "auto-map": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    "pruned-heads": {"pruned_heads": {"0": [0, 1]}},
    "labels": {"num_labels": 10**9},
    "layer-overrides": {"per_layer_config": {"0": {"intermediate_size": 10**9}}},
    "layer-beyond": {"per_layer_config": {"7": {"intermediate_size": 64}}},
    "attention-unknown": {"_attn_implementation": "no_such_thing", "attn_implementation": "no_such_thing"},
    "pretraining-tp": {"pretraining_tp": 0},
}  # fmt: skip
WINDOWED = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
SLIDING: dict[str, dict[str, Any]] = {
    "window-0": WINDOWED | {"sliding_window": 0},
    "window-negative": WINDOWED | {"sliding_window": -3},
    "window-string": WINDOWED | {"sliding_window": "wide"},
    "window-fraction": WINDOWED | {"sliding_window": 2.5},
    "window-huge": WINDOWED | {"sliding_window": 10**30},
    "layer-types-short": WINDOWED | {"sliding_window": 4, "layer_types": ["sliding_attention"]},
    "layer-types-long": WINDOWED | {"sliding_window": 4, "layer_types": ["full_attention"] * 5},
    "layer-types-unknown": WINDOWED | {"layer_types": ["full_attention", "no_attention"]},
    "layer-types-numbers": WINDOWED | {"layer_types": [0, 1]},
}
# The same model, said otherwise.
HARMLESS: dict[str, dict[str, Any]] = {
    "another-key": {"a_key_of_tomorrow": {"a": [1, None, "ü"]}},
    "no-version": {"transformers_version": None},
    "old-dtype-key": {"dtype": None, "torch_dtype": "bfloat16"},
    "use-cache-off": {"use_cache": False},
}
COMMANDS = (prune("magnitude"), prune("flap"), plan(), evaluate(), export("padded"), export("gguf"))


def valued(place: Place, raw: str) -> Change:
    return lambda text: with_value(text, place, raw)


def semantic() -> Iterator[Case]:
    commands = every_command()
    for name, values in IMPOSSIBLE.items():
        yield Case(f"impossible-{name}", changed(**values), next(commands), expected=REFUSED)
    # What was a hang must be none in any command.
    for command in COMMANDS:
        yield Case(f"layers-1e9-in-{called(command)}", changed(num_hidden_layers=10**9), command,
                   expected=REFUSED)  # fmt: skip
    for kind, all_values, expected in (("doubtful", DOUBTFUL | SLIDING, EITHER), ("harmless", HARMLESS, SAME)):
        for name, values in all_values.items():
            command = next(commands) if expected == EITHER else prune("flap")
            yield Case(f"{kind}-{name}", changed(**values), command, expected=expected)


def layered() -> Iterator[Case]:
    """The model is a pruned one, whose layers differ."""
    commands = every_command()
    for name, change in value_damages(LAYERED, 32, "layered"):
        yield Case(f"pruned-model-{name}", by(change), next(commands), scene="pruned", generated=True)
    first: Place = ("per_layer_config",)
    for name, raw in {
        "beyond": '{"9": {"intermediate_size": 40}}',
        "negative-layer": '{"-1": {"intermediate_size": 40}}',
        "negative-size": '{"0": {"intermediate_size": -40}}',
        "size-0": '{"0": {"intermediate_size": 0, "num_key_value_heads": 0}}',
        "string-size": '{"0": {"intermediate_size": "40"}}',
        "huge-size": '{"0": {"intermediate_size": 1000000000000}}',
        "not-a-number": '{"first": {"intermediate_size": 40}}',
        "null-layer": '{"0": null, "1": null}',
        "unknown-key": '{"0": {"hidden_size": 40}}',
    }.items():
        damage = by(valued(first, raw))
        yield Case(f"pruned-model-layers-{name}", damage, next(commands), scene="pruned")


def cases() -> Iterator[Case]:
    commands = every_command()
    for name, change in WHOLE.items():
        yield Case(f"config-{name}", by(change), next(commands), generated=True)
    for name, change in value_damages(FIELDS, 88, "config"):
        yield Case(f"config-{name}", by(change), next(commands), generated=True)
    yield from semantic()
    yield from layered()
