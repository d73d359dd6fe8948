"""What the contract of families is tested on: one small model of a family, and its prunings, each made once."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyprune
from pyprune.allocation.budget import Kept
from pyprune.architectures import ATTENTION, FFN, Family, expand
from pyprune.checkpoint import CheckpointReader
from pyprune.job.record import read_record
from support.family_models import VOCABULARY, AutoModelForCausalLM, save_small_model

# Calibration windows [windows, tokens], longer than a sliding window of 16; and text that nothing was calibrated on.
WINDOWS = torch.randint(3, VOCABULARY, (8, 40), generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(2))
RATIO = 0.3  # one of four KV groups
# What the checks prune with: nothing but slices; and a refit whose target is the projection's output alone.
SLICED = {"method": "flap", "compensation": "none"}
REFITTED = {"method": "obs", "target": "weights", "allocation": "uniform", "compensation": "weights"}


@dataclass(frozen=True)
class Subject:
    """The family's dense model in `folder`, float32, beside which its prunings are written."""

    family: Family
    folder: Path

    @classmethod
    def made(cls, family: Family, folder: Path, **changes: Any) -> "Subject":
        return cls(family, save_small_model(family, folder / "dense", **changes))

    @cached_property
    def reader(self) -> CheckpointReader:
        return CheckpointReader(self.folder)

    @cached_property
    def model(self) -> Any:
        """transformers' own model of it."""
        return loaded(self.folder, attn_implementation=self.family.attention_backend)

    def dense(self) -> Any:
        """A copy of the model to be changed."""
        return copy.deepcopy(self.model)

    def prune(self, name: str, **options: Any) -> Path:
        """The folder of a pruning, made if it is not there."""
        output = self.folder.with_name(name)
        if not output.exists():
            asked = {"ratio": RATIO, "calibration": WINDOWS, "device": "cpu"} | options
            pyprune.prune(self.folder, output, **asked)
        return output

    @property
    def adaptive(self) -> Path:
        return self.prune("adaptive", **SLICED)

    @property
    def stock_units(self) -> dict[str, str]:
        """The option `units` where a stock class takes no fewer heads."""
        return {} if self.family.heads_in_stock else {"units": "channels"}

    @property
    def fits_stock(self) -> Path:
        """As adaptive, with all heads where the stock class takes no fewer."""
        return self.prune("fits_stock", **self.stock_units, **SLICED) if self.stock_units else self.adaptive

    @property
    def uniform(self) -> Path:
        return self.prune("uniform", uniform=True, **self.stock_units, **SLICED)

    @property
    def refitted(self) -> Path:
        return self.prune("refitted", **REFITTED)

    def kept(self, output: Path) -> list[Kept]:
        """Units that a pruning kept, by layer, as its record has them."""
        names = {ATTENTION: "kv_groups", FFN: "intermediate_channels"}
        layers = read_record(output).layers
        return [{m: torch.tensor(own[name], dtype=torch.int64) for m, name in names.items()} for own in layers]

    def columns(self, kept: Kept, layer: int, sublayer: str) -> Tensor:
        """Input columns of the sublayer's output projection that kept units own."""
        return expand(kept[sublayer], self.reader.shapes[layer].unit_width(sublayer))

    @torch.no_grad()
    def masked(self, output: Path) -> Any:
        """The dense model with zeros in the columns that a pruning's removed units own."""
        model, removed = self.dense(), 0
        for layer, kept in enumerate(self.kept(output)):
            for sublayer in self.reader.shapes[layer].sublayers:
                weight = self.output_proj(model, layer, sublayer).weight
                columns = torch.ones(weight.shape[1], dtype=torch.bool)
                columns[self.columns(kept, layer, sublayer)] = False
                weight[:, columns] = 0
                removed += int(columns.sum())
        assert removed, "nothing was removed"
        return model

    def output_proj(self, model: Any, layer: int, sublayer: str) -> nn.Linear:
        found = model.get_submodule(f"{self.family.layers}.{layer}.{self.family.output_proj(sublayer)}")
        assert isinstance(found, nn.Linear)
        return found


def loaded(folder: Path, **options: Any) -> Any:
    """The model in a folder by transformers; every tensor of the file has a place and the other way round."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not loading["missing_keys"], f"missing in the file: {loading['missing_keys']}"
    assert not loading["unexpected_keys"], f"unknown to the class: {loading['unexpected_keys']}"
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits[0]  # type: ignore[no-any-return]


def assert_same(found: Tensor, expected: Tensor, what: str, roundings: float = 16) -> None:
    """The two differ by no more than float32 roundings, relative to their size."""
    assert found.shape == expected.shape, f"{what}: {list(found.shape)} instead of {list(expected.shape)}"
    difference = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    bound = roundings * 2**-24
    assert difference <= bound, f"{what}: they differ by {difference:.2g} of their size, roundings by {bound:.2g}"


@torch.no_grad()
def refitted_naively(model: Any, projection: nn.Linear, norm: Any, kept: Tensor, damping: float) -> Tensor:
    """The least-squares weight [out, kept] of a projection within a model, in float64: W H_:K H_KK^-1, H damped.

    H sums x xᵀ over WINDOWS; where a norm follows, each by 1 / rms(y)², its root rounded to a power of two. kept:
    columns.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    hook = projection.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    model(WINDOWS)
    hook.remove()
    [(x, y)] = seen
    rows = x.reshape(-1, x.shape[-1]).double()
    if norm is not None:
        epsilon = getattr(norm, "variance_epsilon", None) or norm.eps  # as transformers' norms have it
        rms = (y.reshape(len(rows), -1).double().square().mean(-1) + epsilon).sqrt()
        rows = rows * 0.5 ** rms.log2().round()[:, None]
    hessian = rows.T @ rows
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    weight = projection.weight.double()
    return weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
