"""Rows of a terminal's tables: perplexities with their standard errors, and a continuation before and after."""

from typing import Any

WORDS = 10  # of a continuation


def perplexity_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of `pyprune evaluate`."""
    rows = [("perplexity", _figure(result, "perplexity"))]
    if "reference_perplexity" in result:
        rows += [
            ("reference", _figure(result, "reference_perplexity")),
            ("paired difference", _figure(result, "perplexity_difference", "+")),
            ("KL divergence", f"{result['kl_divergence']:.6g} nats a token"),
            ("top-1 agreement", f"{result['top1_agreement']:.2%}"),
        ]
    windows = f"{result['windows']} of {result['sequence_length']} tokens"
    speed = f"{result['tokens_per_second']:,.0f} tokens a second"
    return [*rows, ("windows", windows), ("time", f"{result['seconds']:.3g} s, {speed}")]


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """Perplexity before and after a pruning, and the first words of one continuation."""
    dense, pruned = evaluation["dense"], evaluation["pruned"]
    judged = ", self-judged" if evaluation.get("self_judged") else ""
    pair = " → ".join(_figure(own, "perplexity", digits=2) for own in (dense, pruned))
    rows = [("perplexity", f"{pair} ({evaluation['text']}{judged})")]
    if pruned.get("perplexity_difference") is not None:
        rows.append(("", f"paired difference {_figure(pruned, 'perplexity_difference', '+', digits=2)}"))
    samples = evaluation.get("continuations", {}).get("samples", [])
    if samples:
        first = samples[0]
        rows.append(("prompt", _words(first["prompt"], last=True)))
        rows += [("before", "… " + _words(first["dense"])), ("after", "… " + _words(first["pruned"]))]
    return rows


def _figure(figures: dict[str, Any], name: str, sign: str = "", digits: int = 4) -> str:
    """A figure and its standard error, where it has one."""
    error = figures.get(f"{name}_standard_error")
    return f"{figures[name]:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _words(text: str, last: bool = False) -> str:
    """The first or the last words of a text, in one line that a terminal can show."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    words = printable.split()
    return " ".join(words[-WORDS:] if last else words[:WORDS])
