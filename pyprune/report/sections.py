"""Sections of a report with plots."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from . import plots
from .quantities import kinds
from .sparse import is_sparse, losses, zero_shares
from .tables import layer_rows


@dataclass(frozen=True)
class Plot:
    """An SVG element, and the heading above it."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    """A section of the page: plots, or a table to unfold."""

    title: str
    text: str = ""
    plots: Sequence[Plot] = ()
    folded: bool = False
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default=())


def plot(title: str, svg: str) -> Plot:
    """`svg` is of `plots`, which lets nothing but numbers and names of ours into it."""
    return Plot(title, Markup(svg))


def layer_sections(plan: dict[str, Any]) -> list[Section]:
    """What the layers lost, and why."""
    sections = _sparse_sections(plan) if is_sparse(plan) else _kept_sections(plan)
    return [*sections, *_training_sections(plan)]


def _kept_sections(plan: dict[str, Any]) -> list[Section]:
    kept, scored = [], []
    for kind in kinds(plan):
        counts = [len(layer[kind.key]) for layer in plan["layers"]]
        kept.append(plot(kind.title, plots.kept_units(counts, kind.dense, kind.plural, kind.color)))
        values = [layer["scores"][kind.key] for layer in plan["layers"]]
        title = kind.title.split(":")[0]
        scored.append(plot(title, plots.scores(values, plan["threshold"], kind.unit, kind.color)))
    head, rows = layer_rows(plan)
    legend = "Bars: the middle half of a layer's units; line: their range; mark: their median."
    return [
        Section("What each layer keeps", plots=kept),
        *_curve_sections(plan),
        Section("Scores of the units", legend, scored),
        Section("Layers in figures", folded=True, head=head, rows=rows),
    ]


def _curve_sections(plan: dict[str, Any]) -> list[Section]:
    """Error curves of an allocation that measured them, with the cuts."""
    curves = plan.get("error_curves")
    if not curves:
        return []
    drawn = []
    for kind in kinds(plan):
        units = [len(layer["scores"][kind.key]) for layer in plan["layers"]]
        cuts = [count - len(layer[kind.key]) for count, layer in zip(units, plan["layers"], strict=True)]
        svg = plots.error_curves(curves[kind.key], units, cuts, f"curves {kind.unit}")
        drawn.append(plot(kind.title.split(":")[0], svg))
    text = (
        "Error that the loss of a layer's least important units leaves in the dense model once the others are "
        "refitted, as a share of the residual stream's energy. The allocation cuts where the next unit costs the same "
        "everywhere; a dot is a layer's cut, and a layer without one keeps all."
    )
    return [Section("Error by units removed", text, drawn)]


def _sparse_sections(plan: dict[str, Any]) -> list[Section]:
    """Sections of a model whose linears have zeros."""
    head, rows = zero_shares(plan)
    sections = [Section("Share of zeros in each linear", folded=True, head=head, rows=rows)]
    costs = losses(plan)
    if costs:
        text = "Of the energy of each linear's output on the calibration text, the share that its zeros cost."
        drawn = [plot("Loss by layer", plots.lines(costs, "share of the energy", "losses", logarithmic=True))]
        sections.insert(0, Section("What the zeros cost", text, drawn))
    return sections


def _training_sections(plan: dict[str, Any]) -> list[Section]:
    """The loss of a method that trains."""
    training = plan.get("training")
    if not training:
        return []
    first, last = training["loss"][0], training["loss"][-1]
    text = f"{len(training['loss'])} steps; loss {first:.3f} at first, {last:.3f} at the end, in nats a token."
    return [Section("Training", text, [plot("Loss by step", plots.training(training["loss"], training["kept"]))])]


def pass_plots(plan: dict[str, Any]) -> list[Plot]:
    """Time and memory of each layer in the passes."""
    runs = {name: plan["passes"][name]["layers"] for name in ("calibration", "prune") if plan["passes"].get(name)}
    runs = {name: layers for name, layers in runs.items() if layers}
    if not runs:
        return []
    seconds = {name: [layer["seconds"] for layer in layers] for name, layers in runs.items()}
    memory = {name: [layer["peak_memory_bytes"] for layer in layers] for name, layers in runs.items()}
    time_scale, time_unit = (1.0, "seconds") if _largest(seconds) >= 1 else (1e-3, "milliseconds")
    memory_scale, memory_unit = (1e9, "GB") if _largest(memory) >= 1e9 else (1e6, "MB")
    return [
        plot("Time a layer", plots.per_pass(_scaled(seconds, time_scale), time_unit)),
        plot("Peak memory a layer", plots.per_pass(_scaled(memory, memory_scale), memory_unit)),
    ]


def _largest(values: dict[str, list[float]]) -> float:
    return max(max(layers) for layers in values.values())


def _scaled(values: dict[str, list[float]], scale: float) -> dict[str, list[float]]:
    return {name: [value / scale for value in layers] for name, layers in values.items()}
