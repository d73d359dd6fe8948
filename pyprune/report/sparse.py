"""Report of a model with zeros: their share in every linear, and the loss of each."""

from typing import Any


def is_sparse(plan: dict[str, Any]) -> bool:
    """Whether the plan's layers hold zeros, and not fewer units."""
    return "linears" in plan["layers"][0]


def zero_shares(plan: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: by layer, the share of zeros in each linear."""
    names = list(plan["layers"][0]["linears"])
    rows = [
        [str(number), *(f"{own['zeros'] / own['weights']:.2%}" for own in layer["linears"].values())]
        for number, layer in enumerate(plan["layers"])
    ]
    return ["layer", *(name.rpartition(".")[2] for name in names)], rows


def losses(plan: dict[str, Any]) -> dict[str, list[float]]:
    """Of each linear by layer the share of its output's energy that its zeros cost; empty where it is not known."""
    found: dict[str, list[float]] = {}
    for layer in plan["layers"]:
        for name, own in layer["linears"].items():
            if "loss" in own:
                found.setdefault(name.rpartition(".")[2], []).append(own["loss"])
    return found
