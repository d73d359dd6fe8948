"""Record of a pruning, plan.json: what was asked, what every layer keeps and why, what it took."""

import dataclasses
import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..allocation.budget import KeptUnits, UnitScores
from ..allocation.residual import ErrorCurves
from ..architectures import ATTENTION, FFN, LayerShape
from ..architectures.channel_selection import ChannelSelection
from ..checkpoint import CheckpointReader
from ..errors import InputError
from ..runtime.files import read_json

FORMAT = "pyprune-plan-3"
FILE = "plan.json"
_DIGEST = "digest"
TOLERANCE = 0.005  # how far the ratio met may be from the ratio asked before the report says why
_KEYS = {ATTENTION: "kv_groups", FFN: "intermediate_channels"}
_CURVE_STEPS = 32  # points of an error curve in the plan, which draw it and take some kilobytes a layer
_PACKAGES = ("pyprune", "torch", "transformers", "triton", "safetensors")


@dataclass
class PruneRecord:
    """Record of a pruning: the contents of plan.json, format 3.

    model: as it was named; method, options: the method's name and all its options; seed.
    calibration: text, samples, sequence_length (tokens) and fingerprint of the windows; None without a text.
    ratio: `asked`, `met` (share of the decoder linears' parameters), `of_model`, and a `note` where they differ.
    parameters: before and after, of the decoder linears and of the model. bytes: before and after.
    dense: sizes of a layer of the model that was pruned. layers: by layer, indices of the kept units and scores.
    threshold: the score that separates kept from removed, where there is one for the whole model.
    identity: what the output's bits follow from. source, checksums: digests of tensors read and written.
    passes: by pass its seconds and stages. seconds: of the whole run. peak_memory_bytes: of the device.
    nonfinite: by output projection, NaN and Inf that were counted as zero. warnings: in words.
    verification: largest difference of logits in a fresh process, or why there was none.
    evaluation: perplexity of the dense and of the pruned model and continuations by both, where asked for. training:
    loss by step, of methods that train. error_curves: error by units removed, of allocations that measured it. output:
    the folder, pruned_model: the model in memory, where one was given; neither is in plan.json.
    """

    format: str
    identity: dict[str, Any]
    model: str
    method: str
    options: dict[str, Any]
    seed: int
    calibration: dict[str, Any] | None
    ratio: dict[str, Any]
    parameters: dict[str, list[int]]
    dense: dict[str, int]
    layers: list[dict[str, Any]]
    threshold: float | None
    versions: dict[str, str]
    device: str
    dtype: str
    backends: dict[str, str]
    bytes: list[int]
    passes: dict[str, dict[str, Any]]
    peak_memory_bytes: int
    nonfinite: dict[str, int]
    warnings: list[str]
    tokenizer: Any
    unused_tensors: list[str]
    source: dict[str, Any]
    checksums: dict[str, dict[str, str]]
    verification: dict[str, Any]
    seconds: float
    evaluation: dict[str, Any] | None = None
    training: dict[str, list[float]] | None = None
    error_curves: dict[str, list[dict[str, Any]]] | None = None
    output: Path | None = dataclasses.field(default=None, metadata={"stored": False})
    pruned_model: Any = dataclasses.field(default=None, metadata={"stored": False}, repr=False)

    @property
    def ratio_met(self) -> float:
        """Share of the decoder linears' parameters that was removed."""
        return self.ratio["met"]

    def to_json(self) -> dict[str, Any]:
        """Return the document that plan.json holds."""
        stored = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("stored", True)}
        return {name: value for name, value in stored.items() if name not in _OPTIONAL or value is not None}

    @classmethod
    def from_json(cls, document: dict[str, Any], output: Path | None = None) -> "PruneRecord":
        """Read a document of format 3. InputError: another format, or entries are missing; later keys are ignored."""
        if document.get("format") != FORMAT:
            raise InputError(f"the record's format is {document.get('format')!r}: this version reads {FORMAT!r}")
        stored = [f.name for f in dataclasses.fields(cls) if f.metadata.get("stored", True)]
        missing = [name for name in stored if name not in document and name not in _OPTIONAL]
        if missing:
            raise InputError(f"not a record of pyprune: {missing[0]} is missing")
        return cls(**{name: document[name] for name in stored if name in document}, output=output)


_OPTIONAL = ("evaluation", "training", "error_curves")


def kept_shapes(shapes: list[LayerShape], choice: KeptUnits) -> list[LayerShape]:
    return [s.kept(len(k[ATTENTION]), len(k[FFN])) for s, k in zip(shapes, choice.layers, strict=True)]


def parameter_counts(reader: CheckpointReader, after: int) -> dict[str, tuple[int, int]]:
    """Parameters before and after, without compensation biases: of the decoder linears (`after`), and of the model."""
    before = sum(s.parameters for s in reader.shapes)
    spare = {reader.family.head} if reader.tied else set()
    model = sum(t.bytes // t.dtype.itemsize for name, t in reader.tensors.items() if name not in spare)
    return {"decoder_linears": (before, after), "model": (model, model - before + after)}


def ratio_summary(asked: float, parameters: dict[str, tuple[int, int]], shapes: list[LayerShape]) -> dict[str, Any]:
    """Ratio asked and met: share of the decoder linears removed, and of the whole model."""
    met, of_model = (1 - after / before for before, after in parameters.values())
    summary: dict[str, Any] = {"asked": asked, "met": met, "of_model": of_model}
    if abs(met - asked) > TOLERANCE:
        before, _ = parameters["decoder_linears"]
        largest = max(s.group_cost * 3 * s.hidden_size for s in shapes) / before
        summary["note"] = (
            f"{met:.4f} instead of {asked:g}: whole units are removed, and one KV group is {largest:.2%} of the "
            "decoder linears (steps are larger with --uniform and --round-to; flap's reference mode counts a group's "
            "cost as its authors do)"
        )
    return summary


def layer_entry(kept: dict[str, torch.Tensor], scores: UnitScores) -> dict[str, Any]:
    """JSON form of one layer: indices of the kept units and the scores of all, six significant digits."""
    return {name: kept[sublayer].tolist() for sublayer, name in _KEYS.items()} | {
        "scores": {name: [float(f"{s:.6g}") for s in scores[sublayer].tolist()] for sublayer, name in _KEYS.items()}
    }


def curves_entry(curves: list[ErrorCurves], layers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """JSON form of error curves: by kind of unit and layer `removed` and `error`, at up to 34 points.

    One of the points is where the layer was cut; `layers` holds the plan's entries.
    """
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in _KEYS.values()}
    for own, layer in zip(curves, layers, strict=True):
        for sublayer, name in _KEYS.items():
            curve, last = own[sublayer].tolist(), len(own[sublayer]) - 1
            cut = len(layer["scores"][name]) - len(layer[name])
            points = sorted({round(last * step / _CURVE_STEPS) for step in range(_CURVE_STEPS + 1)} | {min(cut, last)})
            entries[name].append({"removed": points, "error": [float(f"{curve[n]:.4g}") for n in points]})
    return entries


def selection_entry(selection: ChannelSelection, logits: dict[str, torch.Tensor]) -> dict[str, Any]:
    """JSON form of one layer of a DISP model: indices of each selection and the logits of all its channels."""
    scores = {name: [float(f"{one:.6g}") for one in own.tolist()] for name, own in logits.items()}
    return {name: kept.tolist() for name, kept in selection.items()} | {"scores": scores}


def sparse_entry(linears: dict[str, tuple[int, int, float | None]]) -> dict[str, Any]:
    """JSON form of one layer with zeros: of each linear its weights, how many are zero, and the loss where known."""
    return {
        "linears": {
            name: {"weights": weights, "zeros": zeros} | ({} if loss is None else {"loss": float(f"{loss:.6g}")})
            for name, (weights, zeros, loss) in linears.items()
        }
    }


def kept_from_entry(entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {sublayer: torch.tensor(entry[name], dtype=torch.int64) for sublayer, name in _KEYS.items()}


def dense_summary(shapes: list[LayerShape]) -> dict[str, int]:
    """Sizes of the model before this pruning; the largest over the layers where they already differ."""
    return {
        "hidden_size": shapes[0].hidden_size,
        "head_dim": shapes[0].head_dim,
        "heads_per_group": shapes[0].heads_per_group,
        "kv_groups": max(s.kv_groups for s in shapes),
        "intermediate_channels": max(s.intermediate_channels for s in shapes),
        "layers": len(shapes),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def write_plan(plan: dict[str, Any], folder: Path) -> None:
    """With a digest of itself, which `whole_plan` compares."""
    text = json.dumps(plan | {_DIGEST: _digest(plan)}, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def whole_plan(folder: Path) -> dict[str, Any]:
    """The plan of an output as a run wrote it. InputError: it was changed since, or is none."""
    plan = read_plan(folder)
    if plan.pop(_DIGEST, None) != _digest(plan):
        raise InputError(
            f"{folder / FILE}: not a plan of pyprune, or changed since it was written; name another output"
        )
    return plan


def _digest(plan: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(plan, sort_keys=True).encode())


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of an output. InputError: it cannot be read, or is no JSON object."""
    plan = read_json(folder / FILE)
    if not isinstance(plan, dict):
        raise InputError(f"{folder / FILE}: not a plan of pyprune")
    return plan
