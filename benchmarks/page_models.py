"""Tables of benchmarks/README.md on pruned models: their speed, learned masks, and the programs that load them."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def reports(results: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for file in sorted(results.glob(pattern)):
        yield json.loads(file.read_text())


def ratio(row: dict[str, Any], figure: str) -> str:
    return f"{row[figure]:.2f}" if figure in row else "–"


def speed(results: Path) -> str:
    """Prefill and decode of pruned shapes under transformers; empty where they were not measured."""
    text = ""
    for report in reports(results, "inference-llama-[0-9]*.json"):
        rows = [
            [
                row["layout"],
                f"{row['ratio']:.0%}",
                row["mode"],
                str(row["batch"]),
                f"{row['prefill_tokens_per_second']:,.0f}",
                ratio(row, "prefill_against_dense"),
                ratio(row, "prefill_against_uniform"),
                f"{row['decode_tokens_per_second']:,.0f}",
                ratio(row, "decode_against_dense"),
                ratio(row, "decode_against_uniform"),
            ]
            for row in report["rows"]
        ]
        machine = report["machine"]
        text += f"\n{report['shape']}, {machine['gpu']}, transformers {machine['transformers']}:\n\n"
        text += table(
            ["layers", "removed", "mode", "batch", "prefill, tokens/s", "/ dense", "/ uniform", "decode, tokens/s",
             "/ dense", "/ uniform"],
            rows,
        )  # fmt: skip
    for report in reports(results, "inference-llama-cpp-*.json"):
        text += llama_cpp(report)
    return text


def llama_cpp(report: dict[str, Any]) -> str:
    rows = []
    for row in report["rows"]:
        cells = [f"{row[f'{phase}_tokens_per_second']:,.0f}" for phase in ("prefill", "decode")]
        ratios = [ratio(row, f"{phase}_against_dense") for phase in ("prefill", "decode")]
        rows.append([row["layout"], row["architecture"], cells[0], ratios[0], cells[1], ratios[1]])
    head = ["layers", "architecture", "prefill, tokens/s", "/ dense", "decode, tokens/s", "/ dense"]
    machine = report["machine"]
    about = f"llama.cpp (llama-cpp-python {machine['llama_cpp_python']}), {report['model']} in {report['dtype']} "
    about += f"pruned by {report['ratio']:.0%}, {machine['cpu']}, {report['threads']} threads; "
    about += "`benchmarks/inference_llama_cpp.py`"
    return f"\n{about}:\n\n" + table(head, rows)


def selected_speed(results: Path) -> str:
    """DISP models beside their dense one; empty where they were not measured."""
    text = ""
    for report in reports(results, "inference-selected-*.json"):
        rows = [
            [
                row["layout"],
                str(row["batch"]),
                f"{row['prefill_tokens_per_second']:,.0f}",
                ratio(row, "prefill_against_dense"),
                f"{row['decode_tokens_per_second']:,.0f}",
                ratio(row, "decode_against_dense"),
            ]
            for row in report["rows"]
        ]
        text += (
            f"{report['shape']}, {report['ratio']:.0%} removed, the same share of every selection, in multiples of "
            f"{report['multiple']}; {report['machine']['gpu']}; `python benchmarks/inference_selected.py`.\n\n"
        )
        text += table(["model", "batch", "prefill, tokens/s", "/ dense", "decode, tokens/s", "/ dense"], rows)
    for report in reports(results, "training-*.json"):
        text += f"\nTraining on {report['shape']}, windows of {report['sequence_length']} tokens, "
        text += f"{report['machine']['gpu']}; `python benchmarks/training.py`.\n\n"
        rows = [
            [
                row["method"] + (", activations computed twice" if row["recomputed_activations"] else ""),
                f"{row['seconds_a_step']:.3f}",
                f"{row['hours_of_10000_steps']:.2f}",
                f"{row['predicted_memory_bytes'] / 1e9:.1f} / {row['peak_memory_bytes'] / 1e9:.1f}",
            ]
            for row in report["rows"]
        ]
        text += table(["method", "seconds a step", "hours of 10 000 steps", "memory predicted / taken, GB"], rows)
    return text


def learned(results: Path) -> str:
    """Perplexity of methods that train masks, on their own text and on another; empty where it was not measured."""
    text = ""
    for report in reports(results, "quality-learned*.json"):
        rows = report["rows"]
        columns = sorted({(row["model"], row["text"]) for row in rows})
        found = {(row["variant"], row["ratio"], row["model"], row["text"]): row["perplexity"] for row in rows}
        lines = []
        for variant, removed in sorted({key[:2] for key in found}, key=lambda key: (key[1], key[0])):
            cells = [found.get((variant, removed, *column)) for column in columns]
            lines.append([variant, f"{removed:.0%}", *("–" if cell is None else f"{cell:.1f}" for cell in cells)])
        text += f"\nCalibrated on {report['protocol']['calibration']}:\n\n"
        text += table(["variant", "removed", *(f"{model}, {name}" for model, name in columns)], lines)
    return text


def semi_structured(results: Path) -> str:
    """Perplexity with half of the weights zero, beside units removed at half; empty where it was not measured."""
    file, units = results / "quality-semi-structured.json", results / "quality.json"
    if not file.is_file() or not units.is_file():
        return ""
    report = json.loads(file.read_text())
    found: dict[tuple[str, str], list[float]] = {}
    for row in report["rows"]:
        found.setdefault((row["variant"], row["model"]), []).append(row["perplexity"])
    for row in json.loads(units.read_text())["rows"]:
        if row["variant"] in BESIDE and row["ratio"] == 0.5:
            found.setdefault((BESIDE[row["variant"]], row["model"]), []).append(row["perplexity"])
    models = list(dict.fromkeys(model for _, model in found))
    rows = []
    for variant in dict.fromkeys(variant for variant, _ in found):
        cells = [found[variant, model] for model in models]
        rows.append([variant, *(f"{mean(own):.2f} ({len(own)})" for own in cells)])
    return table(["", *models], rows)


# Variants of quality.json that are shown beside.
BESIDE = {
    "flap": "flap, units removed",
    "slimgpt": "slimgpt, units removed",
    "obs": "obs, units removed",
}


def loaders(results: Path) -> str:
    """Perplexity of pruned models under every program that loads them; empty where it was not measured."""
    file = results / "loaders.json"
    if not file.is_file():
        return ""
    report = json.loads(file.read_text())
    rows = []
    for row in report["rows"]:
        cells = {name: f"{found['perplexity']:.3f} (`{found['class']}`)" for name, found in row["loaders"].items()}
        what = f"{row['model']}, {row['method']}, compensation {row['compensation']}"
        rows.append(
            [
                what,
                row["layout"],
                *(cells.get(name, "–") for name in ("pyprune", "stock", "padded", "gguf")),
                f"{row['largest_deviation']:.4%}",
            ]
        )
    return table(["model", "layers", "pyprune", "stock", "padded", "gguf", "largest deviation"], rows)
