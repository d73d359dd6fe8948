"""The indices of a DISP model's selections are what they must be, however they came into it.

Kernels on a GPU read and write the channels that they name and look at no bound: an index that is not a channel's is
memory of somebody else.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..architectures.channel_selection import ATTENTION_IN, ATTENTION_OUT, FFN_IN, FFN_OUT
from ..errors import InputError

INDEXED = (ATTENTION_IN, ATTENTION_OUT, FFN_IN, FFN_OUT)  # of the FFN's channels no index is needed


def check_index(where: str, index: Tensor, count: int, channels: int) -> None:
    """InputError unless `index` is int32 or int64 [count], ascending, without duplicates, within [0, channels)."""
    if index.dtype not in (torch.int32, torch.int64) or index.shape != (count,):
        raise InputError(
            f"{where} is {index.dtype} {list(index.shape)}; config.json calls for {count} indices, int32: the "
            "checkpoint is damaged, or is another model's"
        )
    values = index.detach().to("cpu", torch.int64)
    wrong = (values < 0) | (values >= channels)
    wrong[1:] |= values[1:] <= values[:-1]
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise InputError(
            f"{where}[{at}] is {int(values[at])}" + (f" after {int(values[at - 1])}" if at else "") + ": indices of "
            f"channels ascend without duplicates from 0 to at most {channels - 1}: the checkpoint is damaged"
        )


class CheckedLayer:
    """A decoder layer with a buffer for each of INDEXED, each looked at before it is first used.

    The check waits for a GPU once for every tensor that becomes a buffer, by whatever way; it remembers which were
    looked at. Changes within a tensor are `load_state_dict`'s, which has a hook.
    """

    def register_indices(self: Any, counts: dict[str, int], channels: int, where: str) -> None:
        self.index_counts, self.channels, self.where = counts, channels, where
        self.checked: tuple[Tensor, ...] = ()
        for name in INDEXED:
            self.register_buffer(name, torch.arange(counts[name], dtype=torch.int32))
        self.register_load_state_dict_post_hook(check_again)

    def check_indices(self: Any) -> None:
        """InputError, with the buffer's name, for one that was not looked at and is not as it must be."""
        present = tuple(self._buffers[name] for name in INDEXED)
        if len(self.checked) == len(present) and all(a is b for a, b in zip(self.checked, present, strict=True)):
            return
        # Tensors without values (on the meta device, or traced) cannot be checked, and nothing is indexed with them.
        if any(index.is_meta or type(index) is not Tensor for index in present):
            return
        for name, index in zip(INDEXED, present, strict=True):
            check_index(f"{self.where}.{name}", index, self.index_counts[name], self.channels)
        self.checked = present


def check_again(layer: Any, _: object) -> None:
    """Check again after `load_state_dict`, which changes a tensor's values."""
    layer.checked = ()
    layer.check_indices()


class CheckedModel:
    """A model of such layers: what `from_pretrained` returns has been looked at."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load as transformers does; InputError for damaged or missing indices.

        Missing ones pass with `output_loading_info`, which reports them: a model without them runs no forward.
        """
        informed = options.pop("output_loading_info", False)
        base: Any = super()
        model, information = base.from_pretrained(*arguments, output_loading_info=True, **options)
        lost = [*information["missing_keys"], *(name for name, *_ in information["mismatched_keys"])]
        indices = sorted(name for name in lost if name.endswith(INDEXED))
        if indices and not informed:
            raise InputError(f"{indices[0]} is missing or has another shape than config.json calls for")
        if not indices:
            check_layers(model.modules())
        return (model, information) if informed else model


def check_layers(modules: Iterable[Any]) -> None:
    for module in modules:
        if isinstance(module, CheckedLayer):
            module.check_indices()
