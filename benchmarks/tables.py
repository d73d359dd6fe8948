"""Tables of README.md and docs/, from the committed results and the methods' declarations; page.py puts them in place.

Each function takes the folder of results and returns a Markdown table, empty where the file is missing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from page_models import table

from pyprune.architectures import list_families
from pyprune.benchmark.case import OTHER, PYTORCH
from pyprune.benchmark.results import duration, headline, median, share_of_floor, times_faster
from pyprune.methods import METHODS, list_methods

Rows = list[dict[str, Any]]

RATIOS = (0.2, 0.3, 0.5)
MODELS = {"mha": "llama-24m-mha", "gqa": "llama-23m-gqa"}
METHOD_VARIANTS = ("magnitude", "wanda-sp", "flap", "slimgpt", "obs")
ALL_VARIANTS = ("magnitude", "wanda-sp", "flap reference", "flap", "flap, no bias", "slimgpt", "obs")
PARTS_OF_OBS = (
    *("obs", "obs, bias", "obs, inputs as they are", "obs, full share", "obs, own target", "obs, log ratios"),
    *("obs, log, own target", "obs, linear ratios", "obs, fluctuation", "obs, uniform", "slimgpt, uniform"),
)
SECOND_ORDER = ("spd_inverse", "spd_inverse_factor", "grouped_cholesky_errors", "eliminate", "sparsify")
SELECTIONS = ("rms_norm_gather", "scatter_add", "scatter_add_rms_norm_gather")
PATTERNS = ("2:4", "4:8", "unstructured")


def load(results: Path, name: str) -> dict[str, Any]:
    """The document of a result, without rows where it is missing."""
    file = results / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {"rows": [], "results": [], "passes": {}}


def cell(text: str) -> str:
    """Text of a table's cell: on one line, with its bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def perplexities(rows: Rows, **where: Any) -> list[float]:
    """Perplexities of the rows whose fields have these values, one a seed."""
    return [row["perplexity"] for row in rows if all(row[key] == value for key, value in where.items())]


def figures(rows: Rows, ratios: tuple[float, ...], **where: Any) -> str:
    """Means over seeds at several ratios, as "78.0 / 79.2 / 87.2"; a dash where a ratio was not measured."""
    found = [perplexities(rows, ratio=ratio, **where) for ratio in ratios]
    return " / ".join(f"{mean(values):.1f}" if values else "–" for values in found)


def seeds(rows: Rows, variant: str) -> str:
    """Number of seeds of a variant, by model where the models differ."""
    counts = [len({r["seed"] for r in rows if (r["variant"], r["model"]) == (variant, m)}) for m in MODELS.values()]
    return ", ".join(str(count) for count in dict.fromkeys(counts))


def quality(results: Path, variants: tuple[str, ...]) -> str:
    """Perplexity at 20, 30 and 50 % by variant and model, means over seeds."""
    rows = load(results, "quality")["rows"]
    if not rows:
        return ""
    head = [f"{m} (dense {mean(perplexities(rows, model=m, variant='dense')):.2f})" for m in MODELS.values()]
    body = [
        [v, seeds(rows, v), *(figures(rows, RATIOS, model=model, variant=v) for model in MODELS.values())]
        for v in variants
    ]
    return table(["method", "seeds", *head], body)


def zeros(results: Path) -> str:
    """Perplexity with half of the weights zero, by pattern, beside `obs` with half of the units removed."""
    rows, units = load(results, "quality-semi-structured")["rows"], load(results, "quality")["rows"]
    if not rows or not units:
        return ""
    body = [
        [
            method,
            *(
                " / ".join(f"{mean(perplexities(rows, model=m, variant=f'{method} {p}')):.1f}" for p in PATTERNS)
                for m in MODELS.values()
            ),
        ]
        for method in ("wanda", "dass", "sparsegpt")
    ]
    body.append(["obs, units removed", *(figures(units, (0.5,), model=m, variant="obs") for m in MODELS.values())])
    return table(["2:4 / 4:8 / unstructured", *MODELS.values()], body)


def domains(results: Path) -> str:
    """Perplexity at 20, 30 and 50 % after calibration on another domain."""
    rows = load(results, "quality-domains")["rows"]
    if not rows:
        return ""
    columns = [(model, text) for model in MODELS for text in ("reviews", "textbooks")]
    where = [{"model": MODELS[model], "text": f"{text}-test.jsonl"} for model, text in columns]
    dense = [mean(perplexities(rows, variant="dense", **column)) for column in where]
    head = [f"{m}, {text} (dense {value:.1f})" for (m, text), value in zip(columns, dense, strict=True)]
    body = [
        [method, *(figures(rows, RATIOS, variant=method, **column) for column in where)]
        for method in ("flap", "slimgpt", "obs")
    ]
    return table(["method", *head], body)


def trained(results: Path) -> str:
    """Perplexity at 30 and 50 % of methods that train masks, on WikiText-2 and on reviews, by calibration text."""
    head, columns = [], []
    for name, calibration in (("quality-learned", "WikiText-2"), ("quality-learned-reviews", "reviews")):
        rows = load(results, name)["rows"]
        for short, model in MODELS.items():
            for file, text in (("wikitext2-test.txt", "WikiText-2"), ("reviews-test.jsonl", "reviews")):
                if rows and (calibration, text) != ("reviews", "WikiText-2"):
                    head.append(f"{short}, {calibration} → {text}")
                    columns.append((rows, {"model": model, "text": file}))
    body = [
        [method, *(figures(rows, (0.3, 0.5), variant=method, **where) for rows, where in columns)]
        for method in ("flap", "obs", "policy", "disp")
    ]
    return table(["method", *head], body) if head else ""


def pruned_speed(results: Path) -> str:
    """Prefill and decode of models cut by half against dense ones, batch 1."""
    body = []
    for name in ("inference-llama-2-7b-h100", "inference-llama-2-7b-compile-h100", "inference-llama-3.1-8b-h100"):
        report = load(results, name)
        for row in report["rows"]:
            if (row["batch"], row["ratio"]) == (1, 0.5):
                times = [f"{row[f'{phase}_against_dense']:.2f} ×" for phase in ("prefill", "decode")]
                body.append([report["shape"], row["layout"], row["mode"], *times, report["machine"]["gpu"]])
    for row in (report := load(results, "inference-selected-h100"))["rows"]:
        if row["layout"] != "dense":
            times = [f"{row[f'{phase}_against_dense']:.2f} ×" for phase in ("prefill", "decode")]
            what = f"disp, batch {row['batch']}"
            body.append([report["shape"], what, row["mode"], *times, report["machine"]["gpu"]])
    return table(["shape", "layers", "mode", "prefill", "decode", "machine"], body) if body else ""


def operators(results: Path, *names: str) -> str:
    """Rows of `pyprune benchmark`: the device's floor, the fastest way in plain PyTorch, other tools' formulations."""
    body = []
    for row in load(results, "benchmark-h100")["rows"]:
        own, floor = headline(row), share_of_floor(row)
        if row["operator"] not in names or own is None or floor is None:
            continue
        times = [times_faster(row, PYTORCH, OTHER), times_faster(row, OTHER)]
        body.append(
            [
                f"`{row['operator']}`",
                row["where"],
                row["size"],
                f"`{own['name']}`",
                duration(median(own)),
                f"{floor:.0%}, {row['bound']}",
                *("–" if faster is None else f"{faster:.2f} ×" for faster in times),
            ]
        )
    head = ["operator", "where", "size", "backend", "time", "of the floor", "against PyTorch", "against the other tool"]
    return table(head, body) if body else ""


def layer(results: Path) -> str:
    """A whole layer against SlimGPT in plain PyTorch."""
    body = [
        [row["shape"], percent(row["ratio"]), f"{row['ours']['total']:.2f} s", f"{row['speedup']:.1f} ×"]
        for row in load(results, "layer-h200")["rows"]
    ]
    return table(["shape", "removed", "time", "times faster"], body) if body else ""


def whole_runs(results: Path) -> str:
    """Seconds and device memory of whole prunings, whole shapes only."""
    body = []
    for file in sorted(results.glob("end-to-end-*.json")):
        if file.stem.endswith("-layers"):
            continue
        run = json.loads(file.read_text())
        budget = f", `--device-memory {run['device_memory_gb']:g}GB`" if run["device_memory_gb"] else ""
        body.append(
            [
                f"`{run['method']}`, {run['shape']} at {percent(run['ratio'])}, {run['source']}{budget}",
                f"{run['compute_seconds']:.1f}",
                f"{run['seconds']:.1f}",
                f"{run['peak_memory']['device_reserved_bytes'] / 1e9:.1f} GB",
                run["machine"]["gpu"],
            ]
        )
    head = ["run", "seconds in the passes", "seconds in all", "peak device memory", "machine"]
    return table(head, body) if body else ""


def integrations(results: Path) -> str:
    """Hessians and inverse factors of a layer's seven linears, by who computes them."""
    names = {
        "tools": "the tools' formulation",
        "ours": "pyprune",
        "ours, shared inputs": "pyprune, once for linears that share an input",
    }
    body = [
        [
            names.get(row["candidate"], row["candidate"]),
            f"{row['hessians_s']:.3f}",
            f"{row['factors_s']:.3f}",
            f"{row['total_s']:.2f}",
            f"{row['ratio']:.1f} ×",
        ]
        for row in load(results, "integrations-h100")["rows"]
    ]
    return table(["", "Hessians, s", "inverse factors, s", "both, s", "times faster"], body) if body else ""


def memory(results: Path) -> str:
    """Peak resident memory of pruning on a CPU."""
    report = load(results, "memory-cpu")
    body = [
        [f"`{row['method']}`", f"{row['peak_bytes'] / 1e6:.0f} MB", f"{row['share_of_dense']:.1%}"]
        for row in report["rows"]
    ]
    return table(["method", "peak", "without hidden states, of the dense model's bytes"], body) if body else ""


def methods(results: Path) -> str:
    """The pruning methods: the first line of each docstring, what it removes, and whether it reads a text."""
    body = [
        [
            f"`{name}`",
            cell((method.__doc__ or "").split("\n", 1)[0].rstrip(".")),
            "units" if method.shrinks else "single weights",
            "yes" if method.needs_text else "no",
        ]
        for name, method in METHODS.items()
    ]
    return table(["method", "what it does", "removes", "reads a text"], body)


def method_options(results: Path) -> str:
    """The methods' options: who has each, with which default, its choices and its meaning, as they are declared."""
    owners: dict[str, dict[str, list[str]]] = {}
    meanings: dict[str, list[str]] = {}
    for name, method in list_methods().items():
        for option, declared in method["options"].items():
            value = "–" if declared["default"] is None else f"`{declared['default']}`"
            default = declared["default_text"] or value
            owners.setdefault(option, {}).setdefault(default, []).append(name)
            meaning = cell(declared["help"])
            if declared["choices"] and option != "compensation":  # which differ by method
                meaning += f" One of {', '.join(f'`{choice}`' for choice in declared['choices'])}."
            meanings.setdefault(option, []).append(meaning)
    body = [
        [
            f"`--{option.replace('_', '-')}`",
            "; ".join(f"{default}: {', '.join(names)}" for default, names in defaults.items()),
            " / ".join(dict.fromkeys(meanings[option])),
        ]
        for option, defaults in owners.items()
    ]
    return table(["option", "default: methods", "meaning"], body)


def families(results: Path) -> str:
    """The model families from their declarations."""
    rows = []
    for own in list_families().values():
        groups = "KV groups" if own["heads_in_stock"] else "KV groups (in pyprune's class)"
        units = [{"kv-groups": groups, "channels": "FFN channels"}[unit] for unit in own["units"]]
        kinds = "; linear attention in some layers" if own["linear_attention"] else ""
        rows.append([f"`{own['name']}`", ", ".join(units), own["wiring"] + kinds, ", ".join(own["exports"])])
    return table(["family", "units that may go", "attention and FFN", "exports"], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "families": families,
    "results": lambda results: quality(results, METHOD_VARIANTS),
    "quality": lambda results: quality(results, ALL_VARIANTS),
    "quality-obs": lambda results: quality(results, PARTS_OF_OBS),
    "quality-zeros": zeros,
    "quality-domains": domains,
    "quality-trained": trained,
    "pruned-speed": pruned_speed,
    "whole-runs": whole_runs,
    "hessian": lambda results: operators(results, "hessian", "hessian_finish"),
    "moments": lambda results: operators(results, "channel_moments"),
    "second-order": lambda results: operators(results, *SECOND_ORDER),
    "layer-steps": lambda results: operators(results, "rms_norm", "rotary", "swiglu"),
    "selections": lambda results: operators(results, *SELECTIONS),
    "layer": layer,
    "integrations": integrations,
    "memory": memory,
    "methods": methods,
    "method-options": method_options,
}
