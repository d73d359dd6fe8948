"""Record of a pruning, plan.json: what was asked, what every layer keeps and why, what it took."""

import dataclasses
import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import xxhash

from ..allocation.residual import ErrorCurves
from ..architectures import LayerShape
from ..checkpoint import Digests, FileStates
from ..checkpoint.source import ModelSource
from ..errors import InputError
from ..evaluation.roundtrip import Verification
from ..runtime.device import PassSummary
from ..runtime.files import read_json
from .entries import UNIT_NAMES, LayerEntry, UnitEntry, kept_from_entry, scores_from_entry

FORMAT = "pyprune-plan-3"
FILE = "plan.json"
_DIGEST = "digest"
_CURVE_STEPS = 32  # points of an error curve in the record, which draw it and take some kilobytes a layer
TOLERANCE = 0.005  # how far the ratio met may be from the ratio asked before the report says why
_PACKAGES = ("pyprune", "torch", "transformers", "triton", "safetensors")


class CalibrationSource(TypedDict):
    """One calibration text: its name, its share, its windows, a digest of what was read, and its commit on the hub."""

    text: str
    share: float
    windows: int
    fingerprint: str
    revision: NotRequired[str]


class Calibration(TypedDict):
    """Calibration windows: the texts in words, their number, their length in tokens, and a digest of their ids.

    packing, sources: of records since texts may be several; text_column: where one was named.
    """

    text: str
    samples: int
    sequence_length: int
    fingerprint: str
    packing: NotRequired[str]
    text_column: NotRequired[str]
    sources: NotRequired[list[CalibrationSource]]


class Ratio(TypedDict):
    """Ratio asked and met, shares of the decoder linears, and the share of the whole model; why they differ."""

    asked: float
    met: float
    of_model: float
    note: NotRequired[str]


class Parameters(TypedDict):
    """Parameters before and after, without compensation biases."""

    decoder_linears: list[int]
    model: list[int]


class DenseSizes(TypedDict):
    """Sizes of a layer before the pruning, the largest where they already differ, and the number of layers."""

    hidden_size: int
    head_dim: int
    heads_per_group: int
    kv_groups: int
    intermediate_channels: int
    layers: int


class Pass(PassSummary):
    """Seconds and memory of a pass, and whether its result came from the cache."""

    cached: bool


class Source(TypedDict):
    """States of the files that were read, and digests of the tensors in them."""

    files: FileStates
    digests: Digests


class Evaluation(TypedDict):
    """Perplexity on a text, in words, and what `pyprune.evaluate` returns of the pruned model.

    self_judged: the text was sampled from the dense model. continuations: texts that both models write.
    """

    text: str
    self_judged: NotRequired[bool]
    dense: dict[str, Any]
    pruned: dict[str, Any]
    continuations: NotRequired[dict[str, Any]]


class ErrorCurve(TypedDict):
    """Error of a layer's sublayer by the number of its units that are removed."""

    removed: list[int]
    error: list[float]


class TrainingHistory(TypedDict):
    """Loss in nats a token and share of the decoder linears kept, by step."""

    loss: list[float]
    kept: list[float]


class MetTarget(TypedDict):
    """Size in place of a ratio. kind: "size" (bytes of the weights as stored) or "parameters"."""

    kind: str
    asked: int
    met: int


@dataclass
class PruneRecord:
    """Record of a pruning: the contents of plan.json, format 3.

    model: as it was named; method, options: the method's name and all its options; seed.
    calibration: text, samples, sequence_length (tokens), fingerprint of the windows, packing, and in `sources` of each
        text its share, windows and fingerprint (and its revision on the hub); None without a text.
    target: `kind` (size in bytes, or parameters), `asked` and `met`, where one was given in place of a ratio.
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
    calibration: Calibration | None
    ratio: Ratio
    parameters: Parameters
    dense: DenseSizes
    layers: list[LayerEntry]
    threshold: float | None
    versions: dict[str, str]
    device: str
    dtype: str
    backends: dict[str, str]
    bytes: list[int]
    passes: dict[str, Pass]
    peak_memory_bytes: int
    nonfinite: dict[str, int]
    warnings: list[str]
    tokenizer: str | None
    unused_tensors: list[str]
    source: Source
    checksums: dict[str, Digests]
    verification: Verification
    seconds: float
    evaluation: Evaluation | None = None
    training: TrainingHistory | None = None
    error_curves: dict[str, list[ErrorCurve]] | None = None
    target: MetTarget | None = None
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


_OPTIONAL = ("evaluation", "training", "error_curves", "target")


def parameter_counts(source: ModelSource, after: int) -> Parameters:
    """Parameters before and after, without compensation biases: of the decoder linears (`after`), and of the model."""
    before, model = sum(s.parameters for s in source.shapes), source.parameters
    return {"decoder_linears": [before, after], "model": [model, model - before + after]}


def ratio_summary(asked: float, parameters: Parameters, shapes: list[LayerShape]) -> Ratio:
    """Ratio asked and met: share removed of the decoder linears that may go, and of the whole model.

    shapes: of the dense layers, with what the options leave alone fixed.
    """
    before, after = parameters["decoder_linears"]
    prunable = sum(s.prunable_parameters for s in shapes)
    model_before, model_after = parameters["model"]
    summary: Ratio = {"asked": asked, "met": (before - after) / prunable, "of_model": 1 - model_after / model_before}
    if abs(summary["met"] - asked) > TOLERANCE:
        largest = max(s.group_cost * s.ffn_matrices * s.hidden_size for s in shapes) / prunable
        summary["note"] = (
            f"{summary['met']:.4f} instead of {asked:g}: whole units are removed, and one KV group is {largest:.2%} of "
            "the decoder linears (steps are larger with --uniform and --round-to; flap's reference mode counts a "
            "group's cost as its authors do)"
        )
    return summary


def error_curves_entry(curves: list[ErrorCurves], layers: list[LayerEntry]) -> dict[str, list[ErrorCurve]]:
    """Entry of error curves: by kind of unit and layer, at up to 34 points. One of them is where the layer was cut.

    An error that is not finite, of activations counted as zero by --allow-nonfinite, has no point: JSON has no such
    number.
    """
    entries: dict[str, list[ErrorCurve]] = {name: [] for name in UNIT_NAMES.values()}
    for own, layer in zip(curves, layers, strict=True):
        kept = kept_from_entry(cast(UnitEntry, layer))
        for sublayer, name in UNIT_NAMES.items():
            if sublayer not in own:
                entries[name].append({"removed": [], "error": []})
                continue
            curve, last = own[sublayer].tolist(), len(own[sublayer]) - 1
            cut = min(len(scores_from_entry(cast(UnitEntry, layer))[sublayer]) - len(kept[sublayer]), last)
            points = sorted({round(last * step / _CURVE_STEPS) for step in range(_CURVE_STEPS + 1)} | {cut})
            points = [n for n in points if math.isfinite(curve[n])]
            entries[name].append({"removed": points, "error": [float(f"{curve[n]:.4g}") for n in points]})
    return entries


def dense_summary(shapes: list[LayerShape]) -> DenseSizes:
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


def write_record(record: PruneRecord, folder: Path) -> None:
    """Write plan.json, with a digest of itself, which `read_record` compares."""
    document = record.to_json()
    text = json.dumps(document | {_DIGEST: _digest(document)}, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> PruneRecord:
    """The record of an output as a run wrote it. InputError: it was changed since, is none, or has another format."""
    document = read_plan(folder)
    if document.pop(_DIGEST, None) != _digest(document):
        raise InputError(
            f"{folder / FILE}: not a plan of pyprune, or changed since it was written; name another output"
        )
    try:
        return PruneRecord.from_json(document, folder)
    except InputError as error:
        raise InputError(f"{folder / FILE}: {error}; name another output") from error


def read_plan(folder: Path) -> dict[str, Any]:
    """The document in an output's plan.json, of any format. InputError: it cannot be read, or is no JSON object."""
    plan = read_json(folder / FILE)
    if not isinstance(plan, dict):
        raise InputError(f"{folder / FILE}: not a plan of pyprune")
    return plan


def _digest(document: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())
