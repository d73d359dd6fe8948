"""Map tensor names in files, of training tools and of earlier classes, to those of the transformers class."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .headers import StoredTensor

# What torch.compile, data parallelism, FSDP and activation checkpointing put into the path of a module.
WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# Tensors that no decoder reads: caches of rotary embeddings, masks and positions that old classes saved, heads of
# reward models, scales of key-value caches.
_UNUSED = re.compile(
    r"""(^|\.)(
        rotary_emb\.(inv_freq|cos_cached|sin_cached)
      | self_attn\.(bias|masked_bias|causal_mask|[kvq]_scale|kv_scale|prob_scale)
      | (self_attn\.)?(attn|[kv]_proj)\.[kvq]_scale
      | position_ids
      | (v_head|value_head|score|reward_head)\..+
    )$""",
    re.VERBOSE,
)
_ADAPTER = re.compile(r"(^|\.)(lora_[A-Za-z_]+|base_layer|modules_to_save)\.|^base_model\.model\.")


@dataclass(frozen=True)
class EarlierNames:
    """How transformers reads the tensor names of earlier releases, and which tensors it does not read.

    renamings: of tensors, one after another. ignored: patterns of tensors that it leaves in the file.
    """

    renamings: list[Any]
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, model: Any) -> "EarlierNames":
        """Those of a causal language model, with or without its layers."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renamings = [own for own in get_model_conversion_mapping(model) if isinstance(own, WeightRenaming)]
        return cls(renamings, tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))

    def renamed(self, name: str) -> str:
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def ignores(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)


def class_name(name: str, expected: Collection[str], prefix: str, earlier: EarlierNames) -> str:
    """The name that the class has for a stored tensor; `prefix`, with its dot, is of the model inside it.

    A model that was saved without its head has the names of that inner model.
    """
    plain = WRAPPERS.sub(r"\1", name)
    if plain not in expected:
        plain = earlier.renamed(plain)
    return prefix + plain if plain not in expected and prefix + plain in expected else plain


def assign_names(
    stored: dict[str, StoredTensor], expected: Collection[str], prefix: str, described: str, earlier: EarlierNames
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensors by the names of the class, and the names, as stored, of those that it does not use.

    described: the model in words, for errors.

    Raises:
        InputError: a LoRA adapter's tensors, two tensors of one name, or one that the class does not know.
    """
    tensors: dict[str, StoredTensor] = {}
    unused = []
    for name, tensor in sorted(stored.items()):
        plain = class_name(name, expected, prefix, earlier)
        if plain in tensors:
            raise InputError(f"{tensor.file}: {name} and {tensors[plain].name} are both {plain}; delete one of them")
        if plain in expected:
            tensors[plain] = tensor
        elif _ADAPTER.search(name):
            raise InputError(
                f"{tensor.file}: tensor {name} is a LoRA adapter's; merge the adapter into its base model first "
                "(peft: merge_and_unload), and save that"
            )
        elif _UNUSED.search(plain) or earlier.ignores(plain):
            unused.append(name)
        else:
            raise InputError(f"{tensor.file}: tensor {name} is not part of {described}")
    return tensors, unused


def layer_count(names: Collection[str]) -> int:
    """One more than the highest number of a decoder layer in the names; 0 where none has one."""
    numbers = (re.search(r"(?:^|\.)layers\.(\d{1,9})\.", name) for name in names)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def check_counts(place: str, fields: dict[str, object], stored: Collection[str]) -> None:
    """InputError for more layers than tensors, and the like, before transformers makes lists as long: any model.

    place: of the configuration, for the message.
    """
    for name, most in (("num_hidden_layers", len(stored)), ("n_layer", len(stored)), ("num_labels", 1 << 20)):
        value = fields.get(name)
        if isinstance(value, int) and value > most:
            raise InputError(f"{place}: {name} is {value}: more than the checkpoint can have")


def check_layer_count(place: str, fields: dict[str, object], stored: Collection[str], layers: str) -> None:
    """Before a configuration with a billion layers is made: InputError where the tensors have fewer.

    layers: the class's name of the list of layers, for the message.
    """
    check_counts(place, fields, stored)
    asked, there = fields.get("num_hidden_layers"), layer_count(stored)
    if isinstance(asked, int) and not isinstance(asked, bool) and asked > there:
        raise InputError(
            f"{place}: num_hidden_layers is {asked}, but tensor {layers}.{there}.* is missing: "
            f"the checkpoint has tensors of {there} layers"
        )
