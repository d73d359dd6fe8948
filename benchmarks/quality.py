"""Perplexity of every method on trained models: the table of the README.

    python benchmarks/quality.py MODEL... --calibration wikitext2-valid.txt --text wikitext2-test.txt \
        --output benchmarks/results/quality.json

Each row is one pruning and one evaluation on a text in this process, float32. Rows that the output file holds already
are kept, so a stopped run goes on where it was; two runs may not write one file at once.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from common import unrounded

from pyprune.benchmark.machine import describe_machine
from pyprune.calibration.source import TokenSource
from pyprune.checkpoint import CheckpointReader
from pyprune.evaluation.perplexity import evaluate
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune
from pyprune.runtime.device import select_device, select_dtype

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "wanda-sp": ("wanda-sp", {}),
    "flap reference": ("flap", {"mode": "reference"}),
    "flap": ("flap", {}),
    "flap, no bias": ("flap", {"compensation": "none"}),
    "slimgpt": ("slimgpt", {}),
    "slimgpt, uniform": ("slimgpt", {"schedule": "uniform"}),
    "obs": ("obs", {}),
    "obs, bias": ("obs", {"compensation": "bias"}),
    "obs, whole calibration pass": ("obs", {"allocation_samples": 128}),
    "obs, full share": ("obs", {"target_share": 1.0}),
    "obs, inputs as they are": ("obs", {"input_share": 0.0}),
    "obs, own target": ("obs", {"target": "weights"}),
    "obs, log ratios": ("obs", {"allocation": "log"}),
    "obs, log, own target": ("obs", {"allocation": "log", "target": "weights"}),
    "obs, linear ratios": ("obs", {"allocation": "linear"}),
    "obs, fluctuation": ("obs", {"allocation": "fluctuation"}),
    "obs, uniform": ("obs", {"allocation": "uniform"}),
}

# Methods that train: for a GPU, and in a file of their own, since more text is looked at
#     python benchmarks/quality.py MODEL --table learned --calibration wikitext2-valid.txt --text wikitext2-test.txt \
#         --samples 256 --sequence-length 1024 --dtype bfloat16 --ratios 0.3 0.5 --device cuda ...
LEARNED: dict[str, tuple[str, dict[str, Any]]] = {
    "disp": ("disp", {"rows": 2}),
    "disp, 250 steps": ("disp", {"rows": 2, "steps": 250}),
    "disp, gates open": ("disp", {"rows": 2, "warm_start": "none"}),
    "disp, gates open, 250 steps": ("disp", {"rows": 2, "warm_start": "none", "steps": 250}),
    "disp, moments": ("disp", {"rows": 2, "warm_start": "moments"}),
    "disp, moments, 250 steps": ("disp", {"rows": 2, "warm_start": "moments", "steps": 250}),
    "disp, gumbel": ("disp", {"rows": 2, "gate": "gumbel"}),
    "disp, refitted": ("disp", {"rows": 2, "compensation": "weights"}),
    "policy": ("policy", {"rows": 2, "steps": 2000}),
    "policy, bias": ("policy", {"rows": 2, "steps": 2000, "compensation": "bias"}),
    "policy from wanda-sp, bias": ("policy", {"rows": 2, "steps": 2000, "start": "wanda-sp", "compensation": "bias"}),
    "flap": ("flap", {}),
    "flap, no bias": ("flap", {"compensation": "none"}),
    "obs": ("obs", {}),
}

# Methods that zero single weights, at --ratios 0.5: the pattern says it, and an unstructured mask is asked for it.
SEMI_STRUCTURED: dict[str, tuple[str, dict[str, Any]]] = {
    f"{method} {pattern}": (method, {"pattern": pattern})
    for method in ("wanda", "sparsegpt", "dass")
    for pattern in ("2:4", "4:8", "unstructured")
}
TABLES = {"units": VARIANTS, "learned": LEARNED, "semi-structured": SEMI_STRUCTURED}

# What of the machine goes with every row: a run may be finished elsewhere.
MACHINE = ("cpu", "cpu_threads", "gpu", "torch", "commit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", choices=list(TABLES), default="units", help="which methods (default: units)")
    parser.add_argument("--variants", nargs="+", help="default: all of the table")
    parser.add_argument("--dtype", default="float32", help="compute type of the prunings; evaluation is in float32")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    table = TABLES[arguments.table]
    arguments.variants = arguments.variants or list(table)
    if unknown := set(arguments.variants) - set(table):
        parser.error(f"no variant {', '.join(sorted(unknown))} in the table {arguments.table}: {', '.join(table)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    device = select_device(arguments.device)
    rows: list[dict[str, Any]] = []
    if arguments.output.exists():
        rows = json.loads(arguments.output.read_text())["rows"]
    done = {(r["model"], r["variant"], r["ratio"], r["seed"], r["text"]) for r in rows}
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models:
            reader = CheckpointReader(model)
            dtype = select_dtype("float32", reader.dtype, device)
            windows = {
                Path(text).name: TokenSource(text, model, reader.config, device, dtype).evaluation(
                    arguments.window_length, arguments.windows, 0
                )
                for text in arguments.text
            }
            plan = [("dense", 0.0, 0)] + [
                (variant, ratio, seed)
                for seed in arguments.seeds
                for variant in arguments.variants
                for ratio in arguments.ratios
                # Only the window positions depend on the seed; magnitude looks at no text.
                if not (variant == "magnitude" and seed != arguments.seeds[0])
            ]
            for variant, ratio, seed in plan:
                missing = [text for text in windows if (model.name, variant, ratio, seed, text) not in done]
                if not missing:
                    continue
                folder, met = model, 0.0
                if variant != "dense":
                    method, options = table[variant]
                    folder = Path(scratch) / f"{model.name}-{variant}-{ratio}-{seed}"
                    result = prune(
                        PruneConfig(
                            str(model),
                            folder,
                            method,
                            ratio,
                            unrounded(method) | options,
                            arguments.calibration,
                            arguments.samples,
                            arguments.sequence_length,
                            seed,
                            arguments.device,
                            arguments.dtype,
                            Path(scratch),
                        )
                    )
                    met = result.ratio_met
                for text in missing:
                    value = evaluate(folder, windows[text], device=device, dtype=dtype)["perplexity"]
                    rows.append(
                        {
                            "model": model.name,
                            "variant": variant,
                            "ratio": ratio,
                            "ratio_met": met,
                            "seed": seed,
                            "text": text,
                            "perplexity": value,
                            "machine": {k: v for k, v in describe_machine(device).items() if k in MACHINE},
                        }
                    )
                    print(
                        f"{model.name:16} {variant:20} {ratio:.1f} ({met:.4f}) seed {seed} {text}: {value:8.2f}",
                        flush=True,
                    )
                if folder != model:
                    shutil.rmtree(folder)
                document = {
                    "protocol": {
                        "calibration": f"{arguments.samples} x {arguments.sequence_length} tokens of "
                        f"{Path(arguments.calibration).name}",
                        "evaluation": f"the first {arguments.windows} x {arguments.window_length} tokens of each text",
                        "dtype": arguments.dtype,
                    },
                    "rows": rows,
                }
                arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
