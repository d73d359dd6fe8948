"""Classification and question answering with the bodies of pruned models, for transformers' Auto classes of them."""

from typing import Any

from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ..architectures import Family
from ..errors import InputError

HEADS = {
    AutoModelForSequenceClassification: "ForSequenceClassification",
    AutoModelForTokenClassification: "ForTokenClassification",
    AutoModelForQuestionAnswering: "ForQuestionAnswering",
}


def register_heads(family: Family, config_class: Any, *bases: type) -> None:
    """Register the family's classes, after `bases`, over the body that AutoModel builds from the configuration.

    Where transformers has none for the family, what is registered says so: otherwise the user reads a list of all
    configurations but his own.
    """
    for auto, suffix in HEADS.items():
        own = getattr(family.source(), family.prefix + suffix, None)
        made = _refusing(family, config_class, suffix) if own is None else _head(family, config_class, *bases, own)
        made.__name__ = made.__qualname__ = config_class.__name__.removesuffix("Config") + suffix
        globals()[made.__name__] = made  # where pickle looks for a class
        auto.register(config_class, made, exist_ok=True)


def _head(family: Family, config_class: Any, *bases: Any) -> Any:
    class Head(*bases):  # type: ignore[misc]
        config: config_class
        # As in checkpoints of language models. Some classes for question answering have another name for the body,
        # with which they leave the weights of such a checkpoint out and begin at random.
        base_model_prefix = family.body

    return Head


def _refusing(family: Family, config_class: Any, suffix: str) -> Any:
    class Refusing:
        """Stand-in for a model class that transformers lacks."""

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            raise InputError(
                f"no {suffix.removeprefix('For')} with a {config_class.model_type} model: transformers has no "
                f"{family.prefix}{suffix}; AutoModel and AutoModelForCausalLM load it"
            )

        _from_config = from_pretrained

    Refusing.config_class = config_class  # type: ignore[attr-defined]
    return Refusing
