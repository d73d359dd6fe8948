"""Statistics of what the linear layers of any model read, gathered by forward pre-hooks while a model runs.

    with CalibrationStatistics(model, moments=True, share_inputs=True) as statistics:
        for batch in batches:
            model(**batch)
    factor = statistics["model.layers.0.mlp.down_proj"].inverse_factor(damping=0.01).factor

A Hessian takes 4·in_features² bytes of float32 on the device that the layer reads from: 64 MiB for 4096 channels,
462 MiB for 11008, once a layer, or once for all the layers that share their inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from ..ops import ChannelMoments, InverseFactor, inverse_factor
from ..ops.moments import row_count
from .shared_inputs import Accumulators, Sums

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Which layers: these names, or those for which f(name, layer) is true, or all of them.
LayerFilter = Iterable[str] | Callable[[str, nn.Linear], bool] | None


class LinearStatistics:
    """Statistics of one layer's inputs so far, in the block or after it.

    Every method raises InputError for a layer that has read no rows, and RuntimeError where shared inputs were changed
    in place before all had read them, so that rows are missing.
    """

    def __init__(self, name: str, accumulators: Accumulators) -> None:
        self._name, self._accumulators = name, accumulators

    @property
    def rows(self) -> int:
        """Rows read; 0 for a layer that was never called."""
        with self._accumulators.lock:
            sums = self._accumulators[self._name].sums
            return 0 if sums is None else sums.count

    @property
    def shared_with(self) -> frozenset[str]:
        """The other layers that have read the very same tensors, and whose statistics these are as well."""
        with self._accumulators.lock:
            return frozenset(self._accumulators[self._name].members - {self._name})

    @property
    def moments(self) -> ChannelMoments:
        """Count, mean and centred sum of squares of each channel: the state itself, which more rows change."""
        moments = self._sums().moments
        if moments is None:
            raise ValueError(f"{self._name}: moments were not asked for; use CalibrationStatistics(..., moments=True)")
        return moments

    def hessian(self) -> Tensor:
        """H = Σ x xᵀ in full, float32 [in_features, in_features]: the state itself, which more rows change."""
        with self._accumulators.lock:  # no rows are added while it is completed
            hessian = self._sums().hessian
            if hessian is None:
                raise ValueError(
                    f"{self._name}: Hessians were not asked for; use CalibrationStatistics(..., hessian=True)"
                )
            return hessian.finish()

    def inverse_factor(self, damping: float = 0.01) -> InverseFactor:
        """U upper triangular, UᵀU = (H + damping·mean(diag H)·I)^-1, as pyprune.ops.inverse_factor makes it."""
        return inverse_factor(self.hessian(), damping, self._name)

    def _sums(self) -> Sums:
        accumulator = self._accumulators[self._name]
        if accumulator.incomplete:
            raise RuntimeError(
                f"{self._name}: an input was changed in place before every layer had read it; use share_inputs=False"
            )
        if accumulator.sums is None or not accumulator.sums.count:
            raise InputError(f"{self._name}: the layer has read no rows; run the model in the block, on more text")
        return accumulator.sums


class CalibrationStatistics(Mapping[str, LinearStatistics]):
    """Hooks on the linear layers of a model, in force inside `with`: name of a layer -> LinearStatistics.

    modules: which torch.nn.Linear (subclasses too): all of them, those with these names, or those for which
    modules(name, layer) is true. hessian, moments: what is accumulated. share_inputs: layers that read the very same
    tensor (q, k, v; gate, up) share one accumulation, one product and one memory for all; a layer that stops to do so
    gets its own, with a warning (shared_inputs.py). Inputs in inference mode cannot be told apart from changed ones
    and are not shared: use torch.no_grad().

    Forwards may run in several threads. Layers share where the first forward is through before a second one begins.

    On leaving, also by an exception, the hooks are gone; what was read stays. Entering again goes on with it.
    Raises InputError for names of no linear layer, and where no layer is chosen.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: LayerFilter = None,
        *,
        hessian: bool = True,
        moments: bool = False,
        share_inputs: bool = False,
    ) -> None:
        if not hessian and not moments:
            raise ValueError("calibration statistics: neither Hessians nor moments are asked for")
        self._layers = chosen_layers(model, modules)
        widths = {name: layer.in_features for name, layer in self._layers.items()}
        self._accumulators = Accumulators(widths, hessian, moments)
        self._share_inputs = share_inputs
        # Indices of the rows that count, of how many: of threads that have called keep_rows, and of all others.
        self._own_rows = threading.local()
        self._rows: tuple[Tensor | None, int] = (None, 0)
        self._maker = threading.get_ident()
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> CalibrationStatistics:
        if self._hooks:
            raise RuntimeError("calibration statistics: the hooks are in place already; leave the block first")
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._hook(name, layer), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._accumulators.settle()

    def keep_rows(self, mask: Tensor | None) -> None:
        """Count only these rows of the inputs from now on; None: all of them.

        Called by the thread that made the statistics, in every thread that has not called it; else in this thread.
        mask: [batch, sequence] bool or int as a tokeniser's attention mask, 0 for padding. A layer that reads another
        number of rows than the mask has elements (as an expert does) is then a ValueError. The host waits for the
        mask's device.
        """
        rows = (None, 0) if mask is None else (mask.reshape(-1).nonzero().squeeze(1), mask.numel())
        if threading.get_ident() == self._maker:
            self._rows = rows
        else:
            self._own_rows.value = rows

    def __getitem__(self, name: str) -> LinearStatistics:
        if name not in self._layers:
            raise KeyError(f"{name} is none of the {len(self)} chosen linear layers")
        return LinearStatistics(name, self._accumulators)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def _hook(self, name: str, layer: nn.Linear) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def read(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x: Tensor = arguments[0] if arguments else named["input"]
            # Here and not when it is added: a shared input is held until others have read it.
            if x.shape[-1:] != (layer.in_features,) or x.dtype not in DTYPES:
                raise ValueError(
                    f"{name}: reads {x.dtype} {list(x.shape)}; it needs {layer.in_features} channels of 16 bits or more"
                )
            kept, mask_size = getattr(self._own_rows, "value", self._rows)
            if kept is not None and row_count(x) != mask_size:
                raise ValueError(f"{name}: reads {row_count(x)} rows, and the mask has {mask_size} elements")
            if self._share_inputs and not x.is_inference():
                self._accumulators.read_shared(name, x, kept)
            else:
                self._accumulators.read_alone(name, x, kept)

        return read


def chosen_layers(model: nn.Module, modules: LayerFilter) -> dict[str, nn.Linear]:
    """The linear layers that CalibrationStatistics(model, modules) looks at, by name, in the model's order."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if callable(modules):
        layers = {name: layer for name, layer in layers.items() if modules(name, layer)}
    elif modules is not None:
        names = {modules} if isinstance(modules, str) else set(modules)
        unknown = sorted(names - layers.keys())
        if unknown:
            known = next(iter(layers), None)
            raise InputError(f"calibration statistics: {unknown[0]} is no torch.nn.Linear of the model; {known} is one")
        layers = {name: layer for name, layer in layers.items() if name in names}
    if not layers:
        raise InputError("calibration statistics: no torch.nn.Linear is chosen")
    return layers
