"""Base class of the models that are pruned: configuration, family, and tensors by name, read when asked for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..architectures import FFN, Family, LayerShape
from ..errors import InputError
from .content import Content, Digests, FileStates, digest_of
from .headers import StoredTensor
from .model_config import check_rotary, checked_config, refused
from .model_in_memory import ModelInMemory
from .names import EarlierNames, assign_names
from .wrapping import Parts, with_taken_counts


class ModelSource(ABC):
    """A dense model, in files or in memory.

    `tensors` go by the names of transformers' class, whatever they are called where they lie; `unused` names those that
    it does not use. A head that is stored beside tied embeddings and differs from them is the model's: then
    `config.tie_word_embeddings` becomes False. `content` is what has been read. `origin`: what `load_model` and
    `load_tokenizer` take, and the model's name in messages. Of a vision-language model, `wrapping`, it is the text
    model; `beside` names the tensors of everything else, which are in `tensors` by the names that they have in files.

    InputError, naming the tensor, if anything that the configuration calls for is missing, of another shape, or of a
    type other than float32, bfloat16 or float16. Of the weights only a head beside tied embeddings is read for that.
    """

    origin: Path | ModelInMemory
    config_name: ClassVar[str]  # the configuration in messages about tensors

    def __init__(
        self,
        place: str,
        family: Family,
        stored: dict[str, StoredTensor],
        make_config: Callable[[], Any],
        parts: Parts | None = None,
    ) -> None:
        """place: of the configuration, for messages. stored: by the names that the tensors have there."""
        self.wrapping = None if parts is None else parts.wrapping
        self.family = family
        self.config = checked_config(place, family, make_config)
        self.shapes: list[LayerShape]
        try:
            self.shapes = family.shapes(self.config)
            if parts is not None:
                self.shapes = with_taken_counts(family, self.config, self.shapes)
            # Kept: each is found by building a layer, which takes milliseconds.
            outside = family.build_outside(self.config)
            self.outside = family.outside_shapes(outside)
            self.layer_state_shapes = [family.layer_state_shapes(self.config, layer) for layer in range(self.layers)]
            expected = self._expected()
        except Exception as error:
            raise refused(place, error) from error
        described = f"a {self.config.model_type} model as {self.config_name} describes it"
        earlier = EarlierNames.of(outside)
        self.tensors, self.unused = assign_names(stored, expected, family.body + ".", described, earlier)
        self._settle_head()
        self._check(expected)
        check_rotary(place, family, self.config)
        self.beside: list[str] = []
        if parts is not None:
            self._add_beside(parts)
        self.content = Content(self.origin)

    @property
    def layers(self) -> int:
        return len(self.shapes)

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head is none of its tensors."""
        return sum(t.bytes // t.dtype.itemsize for t in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """Stored type of the decoder linears."""
        return self.tensors[f"{self.layer_prefix(0)}{self.family.output_proj(FFN)}.weight"].dtype

    @property
    def biased(self) -> bool:
        """Whether every output projection has a bias."""
        return not self.missing_biases

    @property
    def missing_biases(self) -> int:
        """Output projections without a bias."""
        return sum(
            f"{self.family.output_proj(sublayer)}.bias" not in names
            for shape, names in zip(self.shapes, self.layer_state_shapes, strict=True)
            for sublayer in shape.sublayers
        )

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    def stored_name(self, name: str) -> str:
        """The name in files of one of the model's tensors, or what begins such names; not for those in `beside`."""
        return name if self.wrapping is None else self.wrapping.spelling.stored(name)

    def layer_prefix(self, layer: int) -> str:
        return f"{self.family.layers}.{layer}."

    def layer_tensors(self, layer: int) -> dict[str, StoredTensor]:
        """Places of a decoder layer's tensors, named within the layer."""
        prefix = self.layer_prefix(layer)
        return {name: self.tensors[prefix + name] for name in self.layer_state_shapes[layer]}

    def outside_layers(self) -> list[str]:
        """Names of the tensors that pruning copies as they are: embeddings, final norm, output head, and others."""
        return [name for name in self.outside if not (self.tied and name == self.family.head)]

    @abstractmethod
    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by full name, in their stored type, on the CPU; changing them changes no model."""

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Tensors of one decoder layer, named within the layer, in their stored type, on the CPU."""
        prefix = self.layer_prefix(layer)
        read = self.read([prefix + name for name in self.layer_tensors(layer)])
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    def stream_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Read a layer one tensor at a time: a caller that converts and drops each holds one stored tensor at most."""
        for name in self.layer_tensors(layer):
            full = self.layer_prefix(layer) + name
            yield name, self.read([full])[full]

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids [...] -> [..., hidden_size], stored type; touches only the rows that occur."""
        table = self.read([self.family.embeddings])[self.family.embeddings]
        return table[ids]

    def read_outside(self) -> dict[str, Tensor]:
        """The tensors outside the layers, as `read`, entered in `content`."""
        tensors = self.read(self.outside_layers())
        for name, tensor in tensors.items():
            self.content.saw(name, digest_of(tensor))
        return tensors

    @abstractmethod
    def file_states(self) -> FileStates:
        """States of the files with the weights; the weights count as unchanged while these are."""

    @abstractmethod
    def digests(self, names: Iterable[str]) -> Digests:
        """Read tensors by full name, and return the digest of each."""

    def all_digests(self) -> Digests:
        """Read every tensor, and return the digest of each."""
        return self.digests(self.tensors)

    def differing(self, digests: Digests) -> str | None:
        """Find the first tensor whose bytes have another digest, or None. Reads them all."""
        found = self.digests(name for name in digests if name in self.tensors)
        return next((name for name in digests if found.get(name) != digests[name]), None)

    @abstractmethod
    def fingerprint(self) -> str:
        """What tells this model from others in the names of a run's caches."""

    @abstractmethod
    def write_companions(self, folder: Path) -> list[str]:
        """Write what a checkpoint has beside weights and config.json: tokenizer, generation settings, licence.

        Returns what the user should know. InputError: something cannot be read.
        """

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the class may have, the head always among them."""
        expected = dict(self.outside)
        for layer, shapes in enumerate(self.layer_state_shapes):
            for name, shape in shapes.items():
                expected[self.layer_prefix(layer) + name] = shape
        return expected

    def _add_beside(self, parts: Parts) -> None:
        self.unused += parts.left_out
        self.beside = sorted(parts.beside)
        for name in self.beside:
            stored = parts.beside[name]
            if name in self.tensors:
                raise InputError(f"{stored.file}: {stored.name} and {self.tensors[name].name} are one tensor's names")
            if not stored.readable:
                raise InputError(f"{stored.file}: tensor {stored.name} is stored as {stored.kind}, which is not copied")
            self.tensors[name] = stored

    def _settle_head(self) -> None:
        """Choose embeddings and head of a tied model as transformers does if there is a head as well, or alone."""
        if not self.tied:
            return
        embeddings, head = (self.tensors.get(name) for name in (self.family.embeddings, self.family.head))
        if embeddings is None and head is not None:
            self.tensors[self.family.embeddings] = self.tensors.pop(self.family.head)
        elif embeddings is not None and head is not None and not self._same_values(embeddings, head):
            self.config.tie_word_embeddings = False
        elif head is not None:
            del self.tensors[self.family.head]

    def _same_values(self, one: StoredTensor, other: StoredTensor) -> bool:
        if one.shape != other.shape or not (one.readable and other.readable):
            return False
        pair = self.read([self.family.embeddings, self.family.head])
        rows = zip(*(tensor.split(8192) for tensor in pair.values()), strict=True)
        return all(bool(torch.equal(a.float(), b.float())) for a, b in rows)

    def _check(self, expected: dict[str, tuple[int, ...]]) -> None:
        for name in expected:
            if name == self.family.head and self.tied:
                continue
            stored = self.tensors.get(name)
            if stored is None:
                raise InputError(f"{self.origin}: tensor {name} is missing from the checkpoint")
            check_type(stored)
            if stored.shape != expected[name]:
                raise InputError(
                    f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, "
                    f"but {self.config_name} calls for {list(expected[name])}"
                )


def check_type(stored: StoredTensor) -> None:
    """InputError: the tensor is of a type that no linear is computed with."""
    if not stored.readable or not stored.dtype.is_floating_point:
        raise InputError(
            f"{stored.file}: tensor {stored.name} is stored as {stored.kind}; float32, bfloat16 or float16 is needed"
        )
