"""`pyprune methods`, `pyprune families` and `pyprune backends`."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from .command import SETTINGS, Command, suggestion

if TYPE_CHECKING:
    from ..ops.dispatch import BackendRow

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


class Name(click.ParamType):
    """The name of a method or family; only completion looks at the list here."""

    name = "name"

    def __init__(self, known: Callable[[], Iterable[str]]) -> None:
        self.known = known

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self.known() if name.startswith(incomplete)]


def method_names() -> Iterable[str]:
    from ..methods import list_methods

    return list_methods()


def family_names() -> Iterable[str]:
    from ..architectures import FAMILIES

    return FAMILIES


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("name", required=False, type=Name(method_names))
@JSON
def methods(name: str | None, as_json: bool) -> None:
    """List the pruning methods, or explain the method NAME: what it does, its source, its cost and its options."""
    from ..errors import InputError
    from ..methods import list_methods

    known = list_methods()
    if name is not None and name not in known:
        raise InputError(f"unknown method {name!r}; known: {', '.join(known)}{suggestion(name, known)}")
    if as_json:
        chosen = known if name is None else {name: known[name]}
        print(json.dumps({each: method_document(own) for each, own in chosen.items()}, indent=1))
    elif name is None:
        print_methods(known)
    else:
        print_method(known[name])


def method_document(described: dict[str, Any]) -> dict[str, Any]:
    """JSON of one method: its options' defaults by name, and in `option_details` all that the options say."""
    from ..estimation.typical import typical_cost
    from ..methods import make_method

    defaults = {name: own["default"] for name, own in described["options"].items()}
    cost = typical_cost(make_method(described["name"], {}))
    return described | {"options": defaults, "option_details": described["options"], "cost": cost}


def page() -> click.HelpFormatter:
    """A formatter as wide as the terminal, as help pages are."""
    return click.get_current_context().make_formatter()


def print_methods(known: dict[str, dict[str, Any]]) -> None:
    formatter = page()
    formatter.write_dl([(name, own["summary"]) for name, own in known.items()])
    formatter.write_paragraph()
    formatter.write_text("pyprune methods NAME explains one, with its options, cost and source.")
    click.echo(formatter.getvalue(), nl=False)


def print_method(described: dict[str, Any]) -> None:
    from inspect import cleandoc

    from ..methods import METHODS, make_method

    name = described["name"]
    summary, _, explanation = cleandoc(METHODS[name].__doc__ or "").partition("\n")
    formatter = page()
    formatter.write_text(f"{name}: {summary}")
    if explanation.strip():
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(explanation.strip())
    formatter.write_paragraph()
    facts = [("Source", described["source"] or "not stated"), ("Cost", cost_in_words(make_method(name, {})))]
    formatter.write_dl(facts)
    formatter.write_paragraph()
    formatter.write("Options of pyprune prune and estimate:\n")
    with formatter.indentation():
        formatter.write_dl([option_row(option, own) for option, own in described["options"].items()])
    click.echo(formatter.getvalue(), nl=False)


def cost_in_words(method: Any) -> str:
    from ..estimation.typical import typical_cost

    cost = typical_cost(method)
    seconds = ", ".join(f"{name} pass {own:g} s" for name, own in cost["seconds"].items())
    text = f"{cost['samples']} windows of {cost['sequence_length']} tokens" if method.needs_text else "no text"
    memory = f"{cost['peak_memory_bytes'] / 1e9:.1f} GB"
    run = f"{cost['model']} at ratio {cost['ratio']:g} on an {cost['gpu'].upper()}, {text}"
    return f"{run}: {seconds or 'reading and writing alone'}; {memory}."


def option_row(name: str, own: dict[str, Any]) -> tuple[str, str]:
    """An option and its value, what it means, its choices and default."""
    from ..methods.options import flag_of

    kind = own["type"].split()[0]
    value = {"bool": "", "int": " N", "float": " NUMBER"}.get(kind, " NAME" if own["choices"] else " TEXT")
    choices = f" One of {', '.join(own['choices'])}." if own["choices"] else ""
    default = own["default_text"] or ("" if own["default"] is None or kind == "bool" else f"{own['default']}")
    return flag_of(name) + value, own["help"] + choices + (f"  [default: {default}]" if default else "")


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("name", required=False, type=Name(family_names))
@JSON
def families(name: str | None, as_json: bool) -> None:
    """List the model families, or explain the family NAME: what it loses, how its layers are wired, and its exports."""
    from ..architectures import list_families
    from ..errors import InputError

    known = list_families()
    if name is not None and name not in known:
        raise InputError(f"unknown family {name!r}{suggestion(name, known)}; pyprune families lists them")
    if as_json:
        print(json.dumps(known if name is None else {name: known[name]}, indent=1))
    elif name is None:
        print_families(known)
    else:
        print_family(known[name])


def print_families(known: dict[str, dict[str, Any]]) -> None:
    from .console import Console

    cells = [(name, ", ".join(own["units"]), own["wiring"], ", ".join(own["exports"])) for name, own in known.items()]
    Console(False).table(("family", "units that may go", "attention and FFN", "exports"), cells)
    formatter = page()
    formatter.write_paragraph()
    formatter.write_text("pyprune families NAME explains one. A family is its model_type in config.json.")
    click.echo(formatter.getvalue(), nl=False)


def print_family(described: dict[str, Any]) -> None:
    units = ", ".join(described["units"])
    if "kv-groups" in described["units"]:
        units += "; heads where all query heads share one key and value head"
    if described["linear_attention"]:
        units += "; in layers of linear attention channels only"
    formatter = page()
    formatter.write_text(f"{described['name']}: {described['class']} of transformers")
    formatter.write_paragraph()
    norms = {"rms": "RMSNorm", "rms + 1": "RMSNorm times 1 + w", "layer": "LayerNorm"}[described["norm"]]
    heads = {None: "no", "shared": "shared by heads", "own": "of each head's own", "whole": "over all heads at once"}
    facts = [
        ("Units that may go", units),
        ("Attention and FFN", described["wiring"]),
        ("Attention", ", ".join(described["attention"])),
        ("FFN", ", ".join(described["ffn"])),
        ("Norms", f"{norms}; of queries and keys: {heads[described['head_norms']]}"),
        ("Exports", ", ".join(described["exports"])),
    ]
    formatter.write_dl(facts)
    click.echo(formatter.getvalue(), nl=False)


@click.command(cls=Command, context_settings=SETTINGS)
@click.option("--why", is_flag=True, help="Also print, for each type of numbers, why the other backends do not run.")
@JSON
def backends(why: bool, as_json: bool) -> None:
    """Show which backend runs each operator here: cuda, triton and cpu are kernels, reference is plain PyTorch."""
    from ..ops.dispatch import describe, describe_installation
    from .console import Console

    rows, installation = describe(), describe_installation()
    if as_json:
        operators = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"installation": installation, "operators": operators}, indent=1))
        return
    console = Console(as_json)
    console.rows(list(installation.items()))
    if why:
        cells = [(row.operator, row.device, row.dtype, row.backend, reasons(row)) for row in rows]
        console.table(("operator", "device", "dtype", "runs on", "why not the others"), cells)
        return
    by_place: dict[str, dict[str, list[BackendRow]]] = {}
    for row in rows:
        by_place.setdefault(row.operator, {}).setdefault(row.device, []).append(row)
    devices = list(dict.fromkeys(row.device for row in rows))
    lines = [(name, *(choices(own[device]) for device in devices)) for name, own in by_place.items()]
    console.table(("operator", *(f"on {device}" for device in devices)), lines)


def reasons(row: "BackendRow") -> str:
    return "\n".join(f"{backend}: {reason}" for backend, reason in row.reasons.items())


def choices(rows: "list[BackendRow]") -> str:
    """Backends of one operator on one device, with the dtypes that each runs where they are several."""
    by_backend: dict[str, list[str]] = {}
    for row in rows:
        by_backend.setdefault(row.backend, []).append(row.dtype)
    if len(by_backend) == 1:
        return next(iter(by_backend))
    return "; ".join(f"{backend} ({', '.join(dtypes)})" for backend, dtypes in by_backend.items())
