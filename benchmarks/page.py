"""Rewrite the tables of README.md, docs/*.md and benchmarks/README.md, and the plots, from the committed results.

    python benchmarks/page.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; ALL_TABLES has the names.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from page_models import learned, loaders, selected_speed, semi_structured, speed, table
from page_plots import peak_bytes, plot_memory, plot_quality, plot_seconds
from tables import TABLES

from pyprune.testing.random_checkpoint import SHAPES

FOLDER = Path(__file__).resolve().parent
KERNELS = 6  # of a profile that are shown

# Seconds as (low, high); gigabytes of device memory; each as its authors give it.
PUBLISHED: list[dict[str, Any]] = [
    {"what": "FLAP, LLaMA-7B, 20 %", "seconds": (180, 300), "gigabytes": None, "machine": "one GPU, not named",
     "text": "1024 windows", "source": "\"3 to 5 minutes\", github.com/CASIA-IVA-Lab/FLAP"},
    *(
        {"what": f"SlimGPT, LLaMA-{size}, {ratio} %", "seconds": (seconds, seconds), "gigabytes": gigabytes,
         "machine": "one A100", "text": "256 × 2048", "source": "arXiv 2412.18110"}
        for size, ratio, seconds, gigabytes in
        (("7B", 20, 678, 7.4), ("7B", 50, 1074, 7.4), ("13B", 20, 1417, 11.6), ("13B", 50, 2475, 11.6))
    ),
]  # fmt: skip

REGION = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load_runs(results: Path) -> dict[str, dict[str, Any]]:
    """The whole prunings by their label, in the order of the files' names."""
    runs: dict[str, dict[str, Any]] = {}
    for file in sorted(results.glob("end-to-end-*.json")):
        run = json.loads(file.read_text())
        label = f"{run['method']}, {run['shape']}, {100 * run['ratio']:g} %"
        layers = run["sizes"]["layers"]
        if layers != SHAPES[run["shape"]]["layers"]:
            label += f", {layers} layers"
        if run["source"] != "disk":
            label += f", {run['source']}"
        if label in runs:
            label += f" ({file.stem.removeprefix('end-to-end-')})"
        runs[label] = run
    return runs


def pages(root: Path) -> list[Path]:
    """The pages with marked regions."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "benchmarks" / "README.md"]


def regions(text: str) -> list[tuple[str, str]]:
    """Names and contents of the marked regions of a page."""
    return [
        (match[2], match[0].removeprefix(match[1]).removesuffix(match[3]).strip()) for match in REGION.finditer(text)
    ]


def fill(text: str, results: Path) -> str:
    """Rewrite the marked regions of a page from the results."""

    def filled(region: re.Match[str]) -> str:
        content = ALL_TABLES[region[2]](results).strip("\n")
        return f"{region[1]}{content}\n{region[3]}" if content else f"{region[1]}{region[3]}"

    return REGION.sub(filled, text)


def make_page(results: Path, plots: Path) -> str:
    """The text of benchmarks/README.md with its tables made from `results`; its plots are written to `plots`."""
    make_plots(results, plots)
    return fill((FOLDER / "README.md").read_text(encoding="utf-8"), results)


def make_plots(results: Path, plots: Path) -> None:
    """Write the plots of all pages, those whose results are there."""
    if runs := load_runs(results):
        plot_seconds(runs, PUBLISHED, plots / "seconds.svg")
        plot_memory(runs, PUBLISHED, plots / "memory.svg")
    if (results / "quality.json").is_file():
        plot_quality(json.loads((results / "quality.json").read_text())["rows"], plots / "quality.svg")


def whole_prunings(results: Path) -> str:
    rows = []
    for label, run in load_runs(results).items():
        floor = run["floor"]
        disk = f"{floor['disk_seconds']:.1f}" if "disk_seconds" in floor else "–"
        passes = ", ".join(f"{name} {own['seconds']:.1f}" for name, own in run["passes"].items())
        peaks = run["peak_memory"]
        device = f"{peaks['device_reserved_bytes'] / 1e9:.1f}" if "device_reserved_bytes" in peaks else "–"
        rows.append(
            [
                label + (", profiled" if run["profiled"] else ""),
                f"{run['samples']} × {run['sequence_length']}",
                machine_name(run["machine"]),
                f"{run['seconds']:.1f}",
                passes,
                f"{floor['forward_seconds']:.1f}",
                disk,
                f"{run['times_floor']:.2f} ×",
                device,
                f"{peaks['host_bytes'] / 1e9:.1f}",
            ]
        )
    head = ["run", "tokens", "machine", "seconds", "of these, in passes", "forward floor, s", "disk floor, s",
            "of the floor", "device, GB", "host, GB"]  # fmt: skip
    return table(head, rows) if rows else ""


def published(results: Path) -> str:
    """Published times and memory, each on its authors' machine and text."""
    rows = []
    for figure in PUBLISHED:
        low, high = figure["seconds"]
        seconds = f"{low}" if low == high else f"{low} – {high}"
        memory = "–" if figure["gigabytes"] is None else f"{figure['gigabytes']}"
        rows.append([figure["what"], figure["text"], figure["machine"], seconds, memory, figure["source"]])
    head = ["run", "tokens", "machine", "seconds", "device, GB", "source"]
    return table(head, rows)


def estimated(results: Path) -> str:
    """Estimate before the run over what the run took; empty where no run holds an estimate."""
    rows = []
    for label, run in load_runs(results).items():
        if "predicted" not in run:
            continue
        said, measured = run["predicted"]["peak_memory_bytes"], peak_bytes(run)
        row = [label, f"{said / 1e9:.2f} / {measured / 1e9:.2f} = {said / measured:.2f}"]
        of_pass = {entry["pass"]: entry["seconds"] for entry in run["predicted"]["passes"]}
        row += [
            f"{of_pass[name]:.1f} / {run['passes'][name]['seconds']:.1f}"
            if name in of_pass and name in run["passes"]
            else "–"
            for name in ("calibration", "prune")
        ]
        rows.append(row)
    return table(["run", "peak memory, GB", "calibration pass, s", "prune, s"], rows) if rows else ""


def profiles(results: Path) -> str:
    """Busy share and kernels of the runs that were profiled; empty where none was."""
    text = ""
    for label, run in load_runs(results).items():
        profile = run.get("profile")
        if not profile:
            continue
        first, last = profile["layers"]
        text += (
            f"\n{label}: layers {first} to {last} of the prune pass, {profile['seconds']:.2f} s, "
            f"the device busy {profile['busy_share']:.1%} of it.\n\n"
        )
        rows = [
            [f"`{kernel['name']}`", f"{kernel['seconds']:.3f}", str(kernel["calls"])]
            for kernel in profile["kernels"][:KERNELS]
        ]
        text += table(["kernel", "seconds", "calls"], rows)
    return text


def result_files(results: Path) -> str:
    """The other results, each with its script and machine."""
    rows = []
    for file in sorted(results.glob("*.json")):
        if file.name.startswith("end-to-end-"):
            continue
        document = json.loads(file.read_text())
        rows.append([f"[{file.stem}](results/{file.name})", script_of(file.stem), machines_of(document)])
    return table(["result", "script", "machine"], rows)


def script_of(stem: str) -> str:
    """The script that made a result: the one whose name begins the result's."""
    if stem.startswith("benchmark-"):
        made = f"pyprune benchmark --page benchmarks/results/{stem}.json --output page.html"
        return f"`pyprune benchmark`; its page: `{made}`"
    names = [path.stem for path in FOLDER.glob("*.py") if stem.startswith(path.stem.replace("_", "-"))]
    return f"[{(name := max(names, key=len))}.py]({name}.py)" if names else "–"


def machines_of(document: dict[str, Any]) -> str:
    """The machine of a result, or those of its rows."""
    machines = [document["machine"]] if "machine" in document else [row["machine"] for row in document["rows"]]
    return "; ".join(dict.fromkeys(machine_name(machine) for machine in machines))


def machine_name(machine: dict[str, Any]) -> str:
    if "gpu" in machine:
        return machine["gpu"]
    threads = f", {machine['cpu_threads']} threads" if "cpu_threads" in machine else ""
    return f"{machine['cpu']}{threads}"


ALL_TABLES: dict[str, Callable[[Path], str]] = TABLES | {
    "whole-prunings": whole_prunings,
    "published": published,
    "estimated": estimated,
    "profiles": profiles,
    "speed": speed,
    "selected-speed": selected_speed,
    "learned": learned,
    "semi-structured": semi_structured,
    "loaders": loaders,
    "result-files": result_files,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=FOLDER.parent, help="the repository (default: this one)")
    root = parser.parse_args().root
    results = root / "benchmarks" / "results"
    make_plots(results, root / "benchmarks" / "plots")
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text, results)) != text:
            page.write_text(filled, encoding="utf-8")
            print(f"rewritten: {page.relative_to(root)}")


if __name__ == "__main__":
    main()
