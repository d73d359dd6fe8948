"""Methods that set single weights to zero, in a pattern that hardware may skip; every shape stays."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..architectures import FFN, SUBLAYERS, Family, LayerShape
from ..errors import InputError
from .base import Method
from .options import option
from .pattern import UNSTRUCTURED, Pattern, parse_pattern


@dataclass(frozen=True)
class LinearInputs:
    """Linears of a layer that read the same input, and its statistics over all tokens of all windows.

    names: of the linears within the layer. norms: [in] float32 on the device, ‖x_j‖₂ over √windows; hessian:
    [in, in] float32, Σ x xᵀ · 2 / windows, both triangles. Of the two the one that the method asks for.
    """

    names: tuple[str, ...]
    norms: Tensor | None = None
    hessian: Tensor | None = None


@dataclass(frozen=True)
class Sparse:
    """A linear after weights were set to zero.

    weight: [out, in] of the type in which it was computed. loss: δᵀ H δ / wᵀ H w over all rows, the share of the
    output's energy that the change costs (δ the change of a row), where it is known.
    """

    weight: Tensor
    loss: float | None = None


@dataclass(frozen=True)
class SemiStructuredMethod(Method):
    """A sequential method that zeroes weights of all of a layer's linears, each layer on the sparse ones before it.

    `from_hessian`: whether it needs Σ x xᵀ, or the norms of inputs.
    """

    procedure: ClassVar[str] = "sparsify"
    sequential: ClassVar[bool] = True
    shrinks: ClassVar[bool] = False
    from_hessian: ClassVar[bool] = False
    pattern: str = option(
        "2:4", help=f"N:M, N weights of every M stay (2:4, 4:8), or {UNSTRUCTURED}, which takes --ratio."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_pattern(self.pattern)

    @property
    def zeroed(self) -> Pattern:
        return parse_pattern(self.pattern)

    @property
    def implied_ratio(self) -> float | None:
        return self.zeroed.ratio

    def prunable(self, shapes: list[LayerShape]) -> list[LayerShape]:
        """Weights go wherever they are, also where units cannot."""
        return [replace(shape, fixed=()) for shape in shapes]

    def check(self, shapes: list[LayerShape], ratio: float) -> None:
        own = self.implied_ratio
        if own is not None and abs(ratio - own) > 1e-9:
            raise InputError(f"--ratio {ratio:g} does not go with --pattern {self.pattern}, which zeroes {own:g}")
        if not 0 < ratio < 1:
            raise InputError(f"ratio {ratio:g} is outside (0, 1)")

    def check_layers(self, family: Family, config: Any) -> None:
        for layer in range(config.num_hidden_layers):
            sizes = family.layer_state_shapes(config, layer)
            for name in linears_of(family):
                if name + ".weight" not in sizes:
                    raise InputError(
                        f"layer {layer} has no {name}: {self.name} needs the same linears in every layer; take obs, "
                        "flap or slimgpt"
                    )
                length = sizes[name + ".weight"][self.compared_axis(family, name)]
                self.zeroed.check_length(length, f"the weights of layer {layer} ({name}) that are compared")

    def compared_axis(self, family: Family, name: str) -> int:
        """Dimension of a linear's weight [out, in] along which its weights are compared."""
        return 1

    @abstractmethod
    def sparsify(
        self, family: Family, inputs: list[LinearInputs], weights: dict[str, Tensor], ratio: float, where: str
    ) -> dict[str, Sparse]:
        """The layer's linears, by name. weights: as stored, on the device; `where` names the layer in errors."""


class InputNormMethod(SemiStructuredMethod):
    """A method that scores each weight by the norms of channels, and leaves the other weights as they are."""

    @property
    def operators(self) -> tuple[str, ...]:
        return ("channel_moments",)

    def sparsify(
        self, family: Family, inputs: list[LinearInputs], weights: dict[str, Tensor], ratio: float, where: str
    ) -> dict[str, Sparse]:
        norms = {name: own.norms for own in inputs for name in own.names}
        middle = norms[family.output_proj(FFN)]
        assert middle is not None
        found = {}
        for name, weight in weights.items():
            own = norms[name]
            assert own is not None
            axis = self.compared_axis(family, name)
            scores = weight.to(torch.float32).abs() * self.channel_factor(family, name, own, middle)
            mask = self.zeroed.lowest(scores if axis == 1 else scores.T, ratio)
            found[name] = Sparse(weight.masked_fill(mask if axis == 1 else mask.T, 0))
        return found

    def channel_factor(self, family: Family, name: str, own: Tensor, middle: Tensor) -> Tensor:
        """Factor of |W| [out, in]. own: norms of its inputs [in]; middle: of the FFN's channels."""
        return own


def linears_of(family: Family) -> list[str]:
    """Names within a layer of its linears."""
    return [name for names in inputs_of(family) for name in names]


def inputs_of(family: Family) -> list[tuple[str, ...]]:
    """Group a layer's linears by their input: those behind each norm share one, each output projection has one."""
    return [
        names for sublayer in SUBLAYERS for names in (family.input_projs(sublayer), (family.output_proj(sublayer),))
    ]
