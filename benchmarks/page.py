"""Make benchmarks/README.md and its plots from the committed results.

    python benchmarks/page.py [--results benchmarks/results] [--output benchmarks/README.md]

Whole prunings are the files end-to-end-*.json (benchmarks/end_to_end.py), beside published figures; the other files
are listed with their script and machine.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from page_models import learned, loaders, selected_speed, semi_structured, speed, table
from page_plots import peak_bytes, plot_memory, plot_seconds

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

HEAD = """# Benchmarks

This page is made by `python benchmarks/page.py` from the JSON files in [results](results); a test compares the two.
Every script explains itself with `--help`, and every file names its machine.

## Whole prunings

```sh
python benchmarks/end_to_end.py llama-2-13b --method flap --ratio 0.2 --scratch /tmp/checkpoints \\
    --output benchmarks/results/end-to-end-llama-2-13b-flap.json
python benchmarks/end_to_end.py llama-3.3-70b --method obs --source generated
```

Random weights of a published shape (`pyprune/testing/random_checkpoint.py`), from folder to folder, the input's pages
dropped from the page cache before; with `generated` the layers are made on the device and what is written is dropped.
The floor is the higher of two: the forward of one layer times the layers, measured in the same process, and the bytes
read and written over the disk's own rates.
"""


BOUNDS = """## What bounds them

- `flap` from disk to disk: the disk. The prune pass writes at the disk's own rate. The calibration pass reads at 1.15
GB/s beside
  the forward where the same threads alone read 1.4 to 1.6 (the readers share Python's lock with the thread that feeds
  the GPU), and the two passes do not overlap. Six seconds lie outside them: tokens, embeddings, plots, last shards.
- `obs`: forwards. A layer runs 2.8 of them in the prune pass (dense stream, pruned stream before and after the choice)
  and a quarter in the calibration pass, at 650 TFLOP/s, products alone at 750. The rest is, by layer of 13 B and 70 B:
  second moments 0.09 and 0.37 s, the stream error's products 0.08 and 0.24 s, inverse, choice and fit 0.15 and 0.90 s,
  in the calibration pass 0.15 and 0.75 s (inverse in split TF32 products, elimination in single ones).
- The profiler (the runs of 6 layers, of an earlier commit than the whole ones) has the GPU busy for 91 % of the prune
  pass at 13 B, with a set of hidden states in the host and the profiler's own work included, and 97 % at 70 B. The gaps
  lie between small steps and where the host decides.
"""


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


def make_page(results: Path, plots: Path) -> str:
    """The page's text; its plots are written to `plots`, a folder beside the page."""
    runs = load_runs(results)
    sections = [HEAD, *(whole_prunings(runs, plots) if runs else ["No run is committed yet.\n"]), published_table()]
    if runs:
        sections.append(BOUNDS)
    parts = (
        plan_against_measured(runs),
        profiles(runs),
        speed(results),
        selected_speed(results),
        learned(results),
        semi_structured(results),
        loaders(results / "loaders.json"),
    )
    sections += filter(None, parts)
    return "\n".join([*sections, single_operators(results)])


def whole_prunings(runs: dict[str, dict[str, Any]], plots: Path) -> list[str]:
    plot_seconds(runs, PUBLISHED, plots / "seconds.svg")
    plot_memory(runs, PUBLISHED, plots / "memory.svg")
    rows = []
    for label, run in runs.items():
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
    images = [
        f"![seconds by stage, beside published figures]({plots.name}/seconds.svg)\n",
        f"![peak memory, beside published figures]({plots.name}/memory.svg)\n",
    ]
    return [table(head, rows), *images]


def published_table() -> str:
    rows = []
    for figure in PUBLISHED:
        low, high = figure["seconds"]
        seconds = f"{low}" if low == high else f"{low} – {high}"
        memory = "–" if figure["gigabytes"] is None else f"{figure['gigabytes']}"
        rows.append([figure["what"], figure["text"], figure["machine"], seconds, memory, figure["source"]])
    head = ["run", "tokens", "machine", "seconds", "device, GB", "source"]
    return "Published, each on its authors' machine and text, so that these differ too:\n\n" + table(head, rows)


def plan_against_measured(runs: dict[str, dict[str, Any]]) -> str:
    """What `pyprune plan` said before the run, over what the run took; empty where no run holds it."""
    rows = []
    for label, run in runs.items():
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
    if not rows:
        return ""
    return "## Plan against measured\n\nWhat `pyprune plan` says beforehand / what the run took.\n\n" + table(
        ["run", "peak memory, GB", "calibration pass, s", "prune, s"], rows
    )


def profiles(runs: dict[str, dict[str, Any]]) -> str:
    """Busy share and kernels of the runs that were profiled; empty where none was."""
    text = ""
    for label, run in runs.items():
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
    return "## Where a layer's time goes\n" + text if text else ""


def single_operators(results: Path) -> str:
    rows = []
    for file in sorted(results.glob("*.json")):
        if file.name.startswith("end-to-end-"):
            continue
        document = json.loads(file.read_text())
        rows.append([f"[{file.stem}](results/{file.name})", script_of(file.stem), machines_of(document)])
    return "## Single operators, layers and quality\n\n" + table(["result", "script", "machine"], rows)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    parser.add_argument("--output", type=Path, default=FOLDER / "README.md")
    arguments = parser.parse_args()
    page = make_page(arguments.results, arguments.output.parent / "plots")
    arguments.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
