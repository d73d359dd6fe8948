"""Vision-language models: which text model each holds, and under which names its files have that."""

from dataclasses import dataclass

from .family import Family
from .gemma3 import GEMMA3
from .ministral3 import MINISTRAL3
from .mistral import MISTRAL
from .qwen3_5 import QWEN3_5
from .qwen3_vl import QWEN3_VL

# What the names of a text model's tensors begin with where it stands alone.
_BODY, _HEAD = "model.", "lm_head."


@dataclass(frozen=True)
class Spelling:
    """What the names of the text model's tensors begin with in files: those of its body, and those of its head."""

    body: str
    head: str

    def inner(self, stored: str) -> str | None:
        """The name that the text model alone has for a stored tensor; None for a tensor of something else."""
        for prefix, own in ((self.body, _BODY), (self.head, _HEAD)):
            if stored.startswith(prefix):
                return own + stored.removeprefix(prefix)
        return None

    def stored(self, inner: str) -> str:
        """The name in files of a tensor of the text model, or of what begins such names."""
        body = inner.startswith(_BODY)
        return self.body + inner.removeprefix(_BODY) if body else self.head + inner.removeprefix(_HEAD)


# The first is that of transformers' classes, the other that of files since transformers 4: many classes still write it.
CLASS_SPELLING = Spelling("model.language_model.", "lm_head.")
OLDER_SPELLING = Spelling("language_model.model.", "language_model.lm_head.")


@dataclass(frozen=True)
class Wrapper:
    """A vision-language model of transformers that holds a text model.

    name: its `model_type`. texts: families of the text model; the first where `text_config` names none. spellings: that
    its files may have. left_out: what the names of tensors begin with that are as large as `text_config` says, and that
    transformers does not use.
    """

    name: str
    texts: tuple[Family, ...]
    spellings: tuple[Spelling, ...] = (CLASS_SPELLING,)
    left_out: tuple[str, ...] = ()


_BOTH = (OLDER_SPELLING, CLASS_SPELLING)
WRAPPERS = {
    wrapper.name: wrapper
    for wrapper in (
        Wrapper("gemma3", (GEMMA3,), _BOTH),
        Wrapper("mistral3", (MISTRAL, MINISTRAL3), _BOTH),
        Wrapper("qwen3_vl", (QWEN3_VL,)),
        # `mtp`: layers that predict further tokens; vLLM builds them in the sizes of the others.
        Wrapper("qwen3_5", (QWEN3_5,), left_out=("mtp.",)),
    )
}
