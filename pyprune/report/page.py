"""The report of a pruning: one HTML page that needs no network, from the plan that plan.json holds."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..job.record import FORMAT
from . import plots as plots
from .quantities import kinds
from .sparse import is_sparse, losses, zero_shares

PASSES = ("calibration", "train", "prune")  # in the order in which they are shown

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f6f8; color: #262c35;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 17px; }
h3 { margin: 18px 0 4px; font-size: 14px; font-weight: 600; }
p { margin: 4px 0 8px; color: #5b6572; }
section, .tile { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; }
section { margin-top: 20px; padding: 20px 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px;
         margin-top: 20px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 22px; font-weight: 600; }
.tile span { color: #5b6572; font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: #5b6572; }
td, th { padding: 5px 12px 5px 0; border-bottom: 1px solid #eef0f3; vertical-align: top; }
.figures td, .figures thead th:not(:first-child) { text-align: right; }
.settings th { width: 26%; } .settings td { overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
summary { cursor: pointer; font-size: 17px; font-weight: 600; } details table { margin-top: 12px; }
"""


def write_report(plan: dict[str, Any], path: str | Path) -> None:
    """Write the page for `plan` (the content of a plan.json) to `path`. The same plan gives the same bytes.

    InputError: `plan` is not of the format that this version reads.
    """
    if plan.get("format") != FORMAT:
        raise InputError(f"the plan's format is {plan.get('format')!r}: this version reads {FORMAT!r}")
    sections = [
        _section("Result", _result_table(plan)),
        *(_sparse_sections(plan) if is_sparse(plan) else _kept_sections(plan)),
        _training_section(plan),
        _section("Time and memory", _passes_table(plan) + _pass_plots(plan)),
        _section("Settings", _settings_table(plan)),
    ]
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(plan["model"])}, pruned by {escape(plan["method"])}</title>
<style>{_STYLE}</style>
</head>
<body><main>
<h1>{escape(plan["model"])}</h1>
<p>pruned by <strong>{escape(plan["method"])}</strong> {escape(_options(plan["options"]))}</p>
{_tiles(plan)}
{"".join(sections)}
</main></body>
</html>
"""
    Path(path).write_text(page, encoding="utf-8")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n"


def _table(rows: Iterable[Sequence[str]], kind: str, head: Sequence[str] = ()) -> str:
    """Cells are escaped here. The first of a row is its heading."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return f'<table class="{kind}">{top}<tbody>{body}</tbody></table>'


def _tiles(plan: dict[str, Any]) -> str:
    before, after = plan["parameters"]["model"]
    tiles = [
        (
            f"{plan['ratio']['met']:.1%}",
            f"of the decoder's linears {'zero' if is_sparse(plan) else 'removed'} (asked {plan['ratio']['asked']:.1%})",
        ),
        (_short(after), f"parameters, from {_short(before)}"),
        (_seconds(plan["seconds"]), "in all"),
        (_bytes(plan["peak_memory_bytes"]), "peak memory"),
    ]
    if plan.get("evaluation"):
        dense, pruned = (plan["evaluation"][which]["perplexity"] for which in ("dense", "pruned"))
        tiles.insert(2, (f"{pruned:.2f}", f"perplexity, from {dense:.2f}"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
        + "</div>\n"
    )


def _result_table(plan: dict[str, Any]) -> str:
    ratio, parameters = plan["ratio"], plan["parameters"]

    def sizes(name: str, pair: Sequence[int], write: Any) -> tuple[str, ...]:
        return name, write(pair[0]), write(pair[1]), f"{pair[1] / pair[0] - 1:+.2%}"

    rows = [
        sizes("Parameters of the decoder's linears", parameters["decoder_linears"], _count),
        sizes("Parameters of the model", parameters["model"], _count),
        sizes("Size of the weights", plan["bytes"], _bytes),
    ]
    evaluation = plan.get("evaluation")
    if evaluation:
        dense, pruned = evaluation["dense"], evaluation["pruned"]
        change = f"{pruned['perplexity'] / dense['perplexity'] - 1:+.2%}"
        rows.append(("Perplexity", f"{dense['perplexity']:.3f}", f"{pruned['perplexity']:.3f}", change))
        if "kl_divergence" in pruned:
            rows.append(("KL divergence from dense, nats a token", "", f"{pruned['kl_divergence']:.4f}", ""))
        if "top1_agreement" in pruned:
            rows.append(("Same most likely token as dense", "", f"{pruned['top1_agreement']:.2%}", ""))
    text = (
        f"Ratio of the decoder's linears: {ratio['asked']:.2%} asked, {ratio['met']:.2%} met, "
        f"which is {ratio['of_model']:.2%} of the whole model."
    )
    if ratio.get("note"):
        text += f" {ratio['note']}"
    html = f"<p>{escape(text)}</p>" + "".join(f"<p>Warning: {escape(w)}.</p>" for w in plan["warnings"])
    html += _table(rows, "figures", ("", "before", "after", "change"))
    if evaluation:
        where = f"{pruned['windows']} windows of {pruned['sequence_length']} tokens of {evaluation['text']}"
        html += f"<p>Evaluated on {escape(where)}.</p>"
    return html


def _kept_sections(plan: dict[str, Any]) -> list[str]:
    """Sections of a model that lost units."""
    return [
        _section("What each layer keeps", _kept_plots(plan)),
        _section("Scores of the units", _score_plots(plan)),
        _details("Layers in figures", _layer_table(plan)),
    ]


def _sparse_sections(plan: dict[str, Any]) -> list[str]:
    """Sections of a model whose linears have zeros."""
    head, rows = zero_shares(plan)
    sections = [_details("Share of zeros in each linear", _table(rows, "figures", head))]
    costs = losses(plan)
    if costs:
        text = "<p>Of the energy of each linear's output on the calibration text, the share that its zeros cost.</p>"
        sections.insert(0, _section("What the zeros cost", text + plots.losses(costs)))
    return sections


def _details(title: str, content: str) -> str:
    return f"<section><details><summary>{title}</summary>{content}</details></section>"


def _kept_plots(plan: dict[str, Any]) -> str:
    html = ""
    for kind in kinds(plan):
        kept = [len(layer[kind.key]) for layer in plan["layers"]]
        html += f"<h3>{escape(kind.title)}</h3>" + plots.kept_units(kept, kind.dense, kind.plural, kind.color)
    return html


def _score_plots(plan: dict[str, Any]) -> str:
    html = "<p>Bars: the middle half of a layer's units; line: their range; white mark: their median.</p>"
    for kind in kinds(plan):
        per_layer = [layer["scores"][kind.key] for layer in plan["layers"]]
        title = kind.title.split(":")[0]
        html += f"<h3>{escape(title)}</h3>" + plots.scores(per_layer, plan["threshold"], kind.unit, kind.color)
    return html


def _training_section(plan: dict[str, Any]) -> str:
    """The loss of a method that trains."""
    training = plan.get("training")
    if not training:
        return ""
    first, last = training["loss"][0], training["loss"][-1]
    text = f"{len(training['loss'])} steps; loss {first:.3f} at first, {last:.3f} at the end, in nats a token."
    return _section("Training", f"<p>{text}</p>" + plots.training(training["loss"], training["kept"]))


def _passes_table(plan: dict[str, Any]) -> str:
    rows = []
    for name in PASSES:
        run = plan["passes"].get(name)
        if run:
            note = "statistics from the cache" if run["cached"] else ""
            rows.append((name, _seconds(run["seconds"]), _bytes(run["peak_memory_bytes"]), note))
    rows.append(("in all", _seconds(plan["seconds"]), _bytes(plan["peak_memory_bytes"]), ""))
    return _table(rows, "figures", ("pass", "time", "peak memory", ""))


def _pass_plots(plan: dict[str, Any]) -> str:
    runs = {name: plan["passes"][name]["layers"] for name in ("calibration", "prune") if plan["passes"].get(name)}
    runs = {name: layers for name, layers in runs.items() if layers}
    if not runs:
        return ""
    seconds = {name: [layer["seconds"] for layer in layers] for name, layers in runs.items()}
    memory = {name: [layer["peak_memory_bytes"] for layer in layers] for name, layers in runs.items()}
    time_scale, time_unit = (1, "seconds") if _largest(seconds) >= 1 else (1e-3, "milliseconds")
    memory_scale, memory_unit = (1 << 30, "GiB") if _largest(memory) >= 1 << 30 else (1 << 20, "MiB")
    return (
        "<h3>Time a layer</h3>"
        + plots.per_pass(_scaled(seconds, time_scale), time_unit)
        + "<h3>Peak memory a layer</h3>"
        + plots.per_pass(_scaled(memory, memory_scale), memory_unit)
    )


def _largest(values: dict[str, list[float]]) -> float:
    return max(max(layers) for layers in values.values())


def _scaled(values: dict[str, list[float]], scale: float) -> dict[str, list[float]]:
    return {name: [value / scale for value in layers] for name, layers in values.items()}


def _settings_table(plan: dict[str, Any]) -> str:
    calibration = plan["calibration"]
    rows = [
        ("Method", plan["method"]),
        *((f"Option {name}", _plain(value)) for name, value in plan["options"].items()),
        ("Seed", str(plan["seed"])),
    ]
    if calibration is None:
        rows.append(("Calibration", "none: the method needs no data"))
    else:
        windows = f"{calibration['samples']} windows of {calibration['sequence_length']} tokens"
        rows += [
            ("Calibration text", calibration["text"]),
            ("Calibration windows", windows),
            ("Calibration fingerprint", calibration["fingerprint"]),
        ]
    rows += [("Device", plan["device"]), ("Data type", plan["dtype"])]
    rows += [(f"Backend of {operator}", backend) for operator, backend in plan["backends"].items()]
    rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in plan["versions"].items())))
    return _table(rows, "settings")


def _layer_table(plan: dict[str, Any]) -> str:
    all_kinds = kinds(plan)
    head = ["layer", *(f"{kind.column} kept of {kind.dense}" for kind in all_kinds)]
    rows = []
    for number, layer in enumerate(plan["layers"]):
        rows.append([str(number), *(_count(len(layer[kind.key])) for kind in all_kinds)])
    return _table(rows, "figures", head)


def _options(options: dict[str, Any]) -> str:
    written = ", ".join(f"{name} {_plain(value)}" for name, value in options.items())
    return f"({written})" if written else ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _count(number: int) -> str:
    return f"{number:,}"


def _short(number: int) -> str:
    """Parameters as people name models: 6.74B, 6.5M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= 0.9995 * size:  # what rounds to 1000M is 1B
            return f"{number / size:.3g}{letter}"
    return str(number)


def _bytes(number: int) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"


def _seconds(seconds: float) -> str:
    if seconds >= 120:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
