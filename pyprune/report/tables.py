"""Rows of a report's tables, from a plan."""

from collections.abc import Callable, Sequence
from typing import Any

from ..runtime.units import bytes_text, count_text, seconds_text
from .naming import chosen_options, is_self_judged, plain
from .quantities import kinds
from .sparse import is_sparse

PASSES = ("calibration", "train", "prune")  # in the order in which they are shown
SELF_JUDGED = (
    "Self-judged: the text was sampled from the dense model. It shows how far the pruned model has moved from the "
    "dense one, not how well either knows other texts."
)


def tiles(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures at the top of the page, each with its words."""
    before, after = plan["parameters"]["model"]
    verb = "zero" if is_sparse(plan) else "removed"
    found = [
        (f"{plan['ratio']['met']:.1%}", f"of the decoder's linears {verb} (asked {plan['ratio']['asked']:.1%})"),
        (count_text(after), f"parameters, from {count_text(before)}"),
        (seconds_text(plan["seconds"]), "in all"),
        (bytes_text(plan["peak_memory_bytes"]), "peak memory"),
    ]
    evaluation = plan.get("evaluation")
    if evaluation:
        dense, pruned = (evaluation[which]["perplexity"] for which in ("dense", "pruned"))
        judged = ", self-judged" if is_self_judged(evaluation) else ""
        found.insert(2, (f"{pruned:.2f}", f"perplexity, from {dense:.2f}{judged}"))
    return found


def result_rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """Name, before, after, change."""

    def sizes(name: str, pair: Sequence[int], write: Callable[[int], str]) -> tuple[str, ...]:
        return name, write(pair[0]), write(pair[1]), f"{pair[1] / pair[0] - 1:+.2%}"

    parameters, evaluation = plan["parameters"], plan.get("evaluation")
    rows: list[tuple[str, ...]] = [
        sizes("Parameters of the decoder's linears", parameters["decoder_linears"], "{:,}".format),
        sizes("Parameters of the model", parameters["model"], "{:,}".format),
        sizes("Size of the weights", plan["bytes"], bytes_text),
    ]
    return rows + evaluation_rows(evaluation) if evaluation else rows


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """As `result_rows`, of an evaluation."""
    dense, pruned = evaluation["dense"], evaluation["pruned"]
    change = f"{pruned['perplexity'] / dense['perplexity'] - 1:+.2%}"
    judged = ", self-judged" if is_self_judged(evaluation) else ""
    rows: list[tuple[str, ...]] = [(f"Perplexity{judged}", with_error(dense), with_error(pruned), change)]
    if pruned.get("perplexity_difference_standard_error") is not None:
        rows.append(("Paired difference of the perplexities", "", difference_text(pruned), ""))
    if "kl_divergence" in pruned:
        rows.append(("KL divergence from dense, nats a token", "", f"{pruned['kl_divergence']:.4f}", ""))
    if "top1_agreement" in pruned:
        rows.append(("Same most likely token as dense", "", f"{pruned['top1_agreement']:.2%}", ""))
    return rows


def with_error(figures: dict[str, Any], name: str = "perplexity") -> str:
    """A figure with its standard error, where that is known."""
    error = figures.get(f"{name}_standard_error")
    return f"{figures[name]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def difference_text(pruned: dict[str, Any]) -> str:
    """The paired difference of perplexities with its standard error."""
    return f"{pruned['perplexity_difference']:+.3f} ± {pruned['perplexity_difference_standard_error']:.3f}"


def ratio_text(plan: dict[str, Any]) -> str:
    """The ratio asked and met."""
    ratio = plan["ratio"]
    text = (
        f"Ratio of the decoder's linears: {ratio['asked']:.2%} asked, {ratio['met']:.2%} met, "
        f"which is {ratio['of_model']:.2%} of the whole model."
    )
    return f"{text} {ratio['note']}" if ratio.get("note") else text


def evaluation_remarks(evaluation: dict[str, Any]) -> list[str]:
    """On what was evaluated, and what the figures say and do not say."""
    pruned = evaluation["pruned"]
    where = f"{pruned['windows']} windows of {pruned['sequence_length']} tokens of {evaluation['text']}"
    remarks = [f"Evaluated on {where}."]
    if pruned.get("perplexity_standard_error") is not None:
        remarks[0] += " ± is one standard error over windows."
    return [*remarks, SELF_JUDGED] if is_self_judged(evaluation) else remarks


def pass_rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """Pass, time, peak memory, remark."""
    rows: list[tuple[str, ...]] = []
    for name in PASSES:
        run = plan["passes"].get(name)
        if run:
            note = "statistics from the cache" if run["cached"] else ""
            rows.append((name, seconds_text(run["seconds"]), bytes_text(run["peak_memory_bytes"]), note))
    return [*rows, ("in all", seconds_text(plan["seconds"]), bytes_text(plan["peak_memory_bytes"]), "")]


def setting_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that matter: of the options, those that are not the method's defaults."""
    calibration = plan["calibration"]
    chosen = chosen_options(plan)
    rows = [("Method", plan["method"]), *((f"Option {name}", plain(value)) for name, value in chosen.items())]
    if len(chosen) < len(plan["options"]):
        rows.append(("Other options", "the defaults, which plan.json holds"))
    rows.append(("Seed", str(plan["seed"])))
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
    return rows


def layer_rows(plan: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: units that each layer keeps."""
    all_kinds = kinds(plan)
    head = ["layer", *(f"{kind.column} kept of {kind.dense}" for kind in all_kinds)]
    rows = [
        [str(number), *(f"{len(layer[kind.key]):,}" for kind in all_kinds)]
        for number, layer in enumerate(plan["layers"])
    ]
    return head, rows
