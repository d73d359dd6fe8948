"""A transformers model in memory as the source of a pruning."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ..architectures import FFN
from ..errors import InputError
from ..runtime.files import reason_of
from .content import Digests, FileStates, digest_of
from .headers import KINDS, StoredTensor
from .model_config import prunable_family, refused
from .model_in_memory import ModelInMemory
from .names import check_layer_count
from .source import ModelSource
from .special_ids import check_ids
from .wrapping import wrapper_of


class LoadedModel(ModelSource):
    """The parameters of a loaded model, which stays as it is: what is given out are copies.

    The configuration is what a saved copy of the model would have. tokenizer: of the model, for texts.
    Digests are taken once, by `fingerprint`. `memory`: as `origin`.

    InputError, beyond those of every source: not a transformers model, or not all of it is in memory.
    """

    config_name = "its configuration"

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        kind = type(model).__name__
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "to_json_string"):
            raise InputError(f"{kind}: not a transformers model: it has no configuration")
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise InputError(f"{kind}: a model without parameters")
        name = str(getattr(config, "_name_or_path", "") or kind)
        self.origin = self.memory = ModelInMemory(name, config, {}, parameter.device, parameter.dtype)
        self._given = model.state_dict()
        stored = {name: _described(name, tensor, str(self.origin)) for name, tensor in self._given.items()}
        place, fields = f"{self.origin}: its configuration", json.loads(config.to_json_string())
        if wrapper_of(place, fields) is not None:
            raise InputError(f"{self.origin}: a vision-language model in memory: save it, and name its folder")
        family = prunable_family(place, fields, stored.keys)
        check_layer_count(place, fields, stored, family.layers)
        fields["dtype"] = str(_type_of(stored, f"{family.output_proj(FFN)}.weight")).removeprefix("torch.")

        def as_saved() -> Any:
            try:
                return type(config).from_dict(fields)
            except Exception as error:
                raise refused(place, error) from error

        super().__init__(place, family, stored, as_saved)
        state = {full: self._given[tensor.name] for full, tensor in self.tensors.items()}
        generation = getattr(model, "generation_config", None)
        self.origin = self.memory = dataclasses.replace(
            self.memory, config=self.config, state=state, generation_config=generation, tokenizer=tokenizer
        )
        self._check_generation(generation)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Copies of tensors by full name, contiguous, on the CPU."""
        return {name: self.copy(name, torch.device("cpu")) for name in names}

    def copy(self, name: str, device: torch.device) -> Tensor:
        """A contiguous copy of a tensor on a device."""
        given = self._given[self.tensors[name].name]
        return given.to(device, copy=True, memory_format=torch.contiguous_format)

    def embed(self, ids: Tensor) -> Tensor:
        table = self.memory.state[self.family.embeddings]
        return table[ids.to(table.device)].cpu()

    def file_states(self) -> FileStates:
        """None: the fingerprint, which a run's identity has, is that of all the weights."""
        return {}

    def digests(self, names: Iterable[str]) -> Digests:
        return {name: digest_of(self.read([name])[name]) for name in names}

    def fingerprint(self) -> str:
        """Digest of the configuration and of every weight; enters the weights in `content`."""
        digests = self.all_digests()
        for name, digest in digests.items():
            self.content.saw(name, digest)
        document = [self.config.to_json_string(), sorted(digests.items())]
        return xxhash.xxh3_128_hexdigest(json.dumps(document).encode())

    def write_companions(self, folder: Path) -> list[str]:
        generation, tokenizer = self.memory.generation_config, self.memory.tokenizer
        if generation is not None:  # not save_pretrained: it refuses what it only warns of when it loads
            (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return []

    def _check_generation(self, generation: Any) -> None:
        """InputError: ids outside the vocabulary, or settings that transformers refuses."""
        place = f"{self.origin}: its generation settings"
        try:
            fields = {} if generation is None else generation.to_dict()
            if generation is not None:
                generation.validate()
        except Exception as error:
            raise InputError(f"{place}: transformers refuses them: {reason_of(error)}; correct them") from error
        check_ids(self.config, fields, f"{self.origin}: its configuration", place)


class LoadedLayers:
    """Copies of a loaded model's layers on a device, one at a time: what LayerPrefetcher is for files."""

    def __init__(self, model: LoadedModel, device: torch.device) -> None:
        self.model, self.device = model, device

    def layers(self, first: int = 0, stop: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The tensors of layers first, first + 1, … up to `stop` (all); each is emptied when the next is asked for."""
        for layer in range(first, self.model.layers if stop is None else stop):
            prefix = self.model.layer_prefix(layer)
            tensors = {name: self.model.copy(prefix + name, self.device) for name in self.model.layer_tensors(layer)}
            yield tensors
            tensors.clear()


def _described(name: str, tensor: Tensor, model: str) -> StoredTensor:
    """Name, shape and type of a tensor of a model. InputError: its values are not here, or not a plain tensor's."""
    if tensor.is_meta:
        raise InputError(f"{model}: tensor {name} is not in memory but offloaded; load the model without a device map")
    kind = KINDS.get(tensor.dtype, str(tensor.dtype)) if type(tensor) is Tensor else type(tensor).__name__
    return StoredTensor(Path(model), name, tuple(tensor.shape), kind, 0, tensor.nbytes)


def _type_of(stored: dict[str, StoredTensor], ending: str) -> torch.dtype:
    """Type of the first tensor whose name ends so; float32 where there is none, which is refused later."""
    found = (tensor for name, tensor in stored.items() if name.endswith(ending) and tensor.readable)
    first = next(found, None)
    return torch.float32 if first is None else first.dtype
