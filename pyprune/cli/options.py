"""Options that several commands share, and those of the methods."""

from collections.abc import Callable
from typing import Any

import click

from ..allocation.depth_schedule import SCHEDULES
from ..mask_training.gates import GATES
from ..methods import METHODS, flap, obs
from ..methods import mask_learning as learned
from ..methods.base import COMPENSATIONS
from ..methods.pattern import UNSTRUCTURED

# option -> (type, help): each names the methods that have it, if not all have it, and its values. bool: a flag;
# bool | None: one that can be denied, since its default follows from other options.
METHOD_OPTIONS: dict[str, tuple[Any, str]] = {
    "uniform": (bool, "The same number of KV groups and FFN channels in every layer, as stock model classes need."),
    "round_to": (
        click.IntRange(1),
        "Keep FFN channels in multiples of this, or all of a layer's: 128 suits GPUs, 256 llama.cpp's K-quants.  "
        "[default: 1]",
    ),
    "compensation": (
        str,
        "For what was removed: " + "; ".join(f"{kind}: {names}" for kind, names in COMPENSATIONS.items()) + ".  "
        "[default: bias for flap, weights for slimgpt, obs and sparsegpt, else none]",
    ),
    "metric": (str, f"flap: {', '.join(flap.METRICS)}.  [default: WIFV]"),
    "structure": (str, f"flap: {', '.join(flap.STRUCTURES)}.  [default: AL-AM; with --uniform UL-UM]"),
    "mode": (str, f"flap: {' or '.join(flap.MODES)}.  [default: exact]"),
    "square_attention": (bool | None, "flap: square attention scores, as the authors' code does."),
    "attention_ratio": (float, "flap, UL-MM and AL-MM: the attention's own ratio."),
    "allocation": (
        str,
        f"obs: how many units each layer loses: {', '.join(obs.ALLOCATIONS)}; with --uniform, how it is split between "
        "KV groups and channels: residual (by error) or uniform (the same share).  [default: residual]",
    ),
    "target": (str, f"obs: what the output projection is fitted to: {' or '.join(obs.TARGETS)}.  [default: residual]"),
    "target_share": (
        float,
        "obs: share of the residual stream's error that an output projection makes up.  [default: 0.5]",
    ),
    "input_share": (float, "obs: share of the inputs' change that q, k, v, gate, up make up.  [default: 1]"),
    "allocation_samples": (int, "obs: calibration windows that the residual allocation looks at.  [default: 32]"),
    "pattern": (
        str,
        f"wanda, sparsegpt, dass: N:M, N weights of every M stay (2:4, 4:8), or {UNSTRUCTURED}, which takes --ratio.  "
        "[default: 2:4]",
    ),
    "damping": (float, "slimgpt, obs, sparsegpt: added to H's diagonal, as a share of its mean.  [default: 0.01]"),
    "schedule": (
        str,
        f"slimgpt: how ratios rise with depth: {', '.join(SCHEDULES)}.  [default: log; with --uniform uniform]",
    ),
    "first_share": (
        float,
        "slimgpt, obs (log, linear): the first layer's ratio as a share of --ratio.  [default: 0, if possible]",
    ),
    "steps": (click.IntRange(1), "disp, policy: steps of training.  [default: 1500]"),
    "rows": (click.IntRange(1), "disp, policy: calibration windows in a step.  [default: 1]"),
    "learning_rate": (float, "disp, policy: of AdamW or Adam.  [default: 0.001 for disp, 0.02 for policy]"),
    "gate": (str, f"disp: {' or '.join(GATES)}.  [default: reinmax]"),
    "budget_weight": (float, "disp: weight of |ln(kept / asked)| beside the loss.  [default: 6]"),
    "warm_start": (
        str,
        f"disp: what gates begin at: {', '.join(learned.WARM_STARTS)} (all open).  [default: gradients]",
    ),
    "warm_windows": (click.IntRange(1), "disp: calibration windows that the warm start looks at.  [default: 32]"),
    "start": (str, f"policy: whose scores it begins at: {', '.join(learned.STARTS)}.  [default: flap]"),
}


def method_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, (kind, text) in reversed(METHOD_OPTIONS.items()):
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            command = click.option(flag, is_flag=True, default=None, help=text)(command)
        elif kind == bool | None:
            command = click.option(f"{flag}/--no-{flag[2:]}", default=None, help=text)(command)
        else:
            command = click.option(flag, type=kind, help=text)(command)
    for option in (
        click.option("--sequence-length", type=click.IntRange(2), default=2048, help="Tokens in a calibration window."),
        click.option("--samples", type=click.IntRange(1), default=128, help="Calibration windows."),
        click.option(
            "--calibration",
            metavar="TEXT",
            help="A .txt, a .jsonl with a `text` field, or `self`: sampled from the model (loads it whole).",
        ),
        click.option(
            "--ratio", type=float, help="Share of the decoder linears to remove, (0, 1); a pattern N:M says its own."
        ),
        click.option("--method", default="flap", help=f"One of {', '.join(METHODS)}."),
    ):
        command = option(command)
    return command


def options_given(options: dict[str, Any]) -> dict[str, Any]:
    """The method options that the user typed."""
    return {name: options[name] for name in METHOD_OPTIONS if options[name] is not None}
