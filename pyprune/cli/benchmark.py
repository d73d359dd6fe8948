"""`pyprune benchmark` and `pyprune tune`: their options. What computes is imported when they run."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import InputError, VerificationError
from ..runtime import streams
from ..runtime.names import split_names
from .command import SETTINGS, Command
from .console import Console


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--operators", metavar="NAME,NAME", help="Only these.  [default: all]")
@click.option("--shapes", metavar="MODEL,MODEL", help="Sizes of these models.  [default: 4 on a GPU, a small one else]")
@click.option("--quick", is_flag=True, help="A small model and few tokens, as on a CPU.")
@click.option("--sweep", is_flag=True, help="Sizes beside the models', and the drift of H over many updates.")
@click.option("--row", "row_ids", metavar="ID", multiple=True, help="Only this row; may be repeated.")
@click.option("--backends", "backend_names", metavar="NAME,NAME", help="Ours.  [default: all but the reference]")
@click.option("--compile", "compiled", is_flag=True, help="Baselines under torch.compile too, which takes long.")
@click.option("--repeat", type=click.IntRange(1), help="Repetitions at most.  [default: 30 on a GPU, 5 on a CPU]")
@click.option("--output", type=click.Path(path_type=Path), help="FILE.json, or a folder; a page is written beside it.")
@click.option("--resume", is_flag=True, help="Go on with OUTPUT: leave out rows that it holds.")
@click.option("--history", is_flag=True, help="Show FILES, earlier results or folders of them, on the page.")
@click.option("--page", "page_only", is_flag=True, help="Measure nothing: make the page OUTPUT from FILES.")
@click.option("--list", "list_only", is_flag=True, help="Only name the rows.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def benchmark(files: tuple[Path, ...], **options: Any) -> None:
    """Check and time every operator on the sizes of real models, against plain PyTorch and other tools' ways.

    \b
        pyprune benchmark --output results.json             and results.html
        pyprune benchmark --row hessian/llama-2-7b-down/32768x11008/bf16
        pyprune benchmark --sweep --operators hessian       few and many rows, the drift of the diagonal
        pyprune benchmark --output new.json --history earlier/*.json
        pyprune benchmark --page results/*.json --output page.html

    Every result is compared with float64 before anything is timed. A wrong one is reported and makes the exit status 1.
    """
    if files and not (options["history"] or options["page_only"]):
        raise InputError(f"{files[0]}: give earlier results with --history or --page")
    if options["page_only"]:
        make_page(files, options["output"])
        return
    from ..runtime.device import select_device

    device = select_device(options["device"])
    cases = choose(device, options)
    if options["list_only"]:
        ids = [case.id for case in cases]
        print(json.dumps(ids, indent=1) if options["as_json"] else "\n".join(ids))
        return
    measure(device, cases, files, options)


def make_page(files: tuple[Path, ...], output: Path | None) -> None:
    from ..benchmark.page import write_page
    from ..benchmark.results import read_documents

    if not files or output is None:
        raise InputError("--page makes one from results: give FILES and --output PAGE.html")
    documents = read_documents(files)
    if not documents:
        raise InputError(f"{', '.join(map(str, files))}: no results there")
    write_page(documents, output)
    streams.forgive()
    print(output)


def choose(device: Any, options: dict[str, Any]) -> list[Any]:
    """The cases of a run, each with somebody of ours to compete."""
    from ..benchmark.catalogue import case_named, choose_cases
    from ..ops.declaration import BACKENDS

    wanted = split_names(options["backend_names"])
    for name in wanted:
        if name not in BACKENDS:
            raise InputError(f"unknown backend {name!r}; one of {', '.join(BACKENDS)}")
    if options["row_ids"] and (options["operators"] or options["shapes"] or options["sweep"]):
        raise InputError("--row names whole rows: leave --operators, --shapes and --sweep out")
    if options["sweep"] and options["shapes"]:
        raise InputError("--sweep has sizes of no model: leave --shapes out")
    if options["row_ids"]:
        cases = [case_named(row) for row in options["row_ids"]]
    else:
        operators, models = split_names(options["operators"]), split_names(options["shapes"])
        cases = choose_cases(device, operators, models, options["quick"], options["sweep"])
    cases = [case for case in cases if case.backends(device, tuple(wanted))]
    if not cases:
        raise InputError(f"no row runs on {', '.join(wanted)} here; `pyprune backends` says why")
    return cases


def measure(device: Any, cases: list[Any], files: tuple[Path, ...], options: dict[str, Any]) -> None:
    from ..benchmark.run import Run

    run = Run(device, options, files)
    if run.output is not None and not options["as_json"]:
        streams.forgive()  # every line is in OUTPUT too
    show = line_printer(options["as_json"])
    try:
        with Console(options["as_json"]).progress() as progress:
            faults = run.measure(cases, show, progress)
    except BaseException as stop:  # whatever a signal became on its way through libraries
        if run.output is not None and run.document is not None:
            stop.add_note(f"{run.output} keeps the rows that are finished: repeat with --resume")
        raise
    finally:
        page = run.write_page()
    if options["as_json"]:
        print(json.dumps(run.document, indent=1))
    elif page is not None:
        print(f"{run.output}\n{page}")
    if faults:
        raise VerificationError(f"{len(faults)} of {len(cases)} rows are not correct: {'; '.join(faults)}")


def line_printer(silent: bool) -> Callable[[str], None]:
    """Prints a line on stdout; where nobody will read it, the work ends.

    The progress bars put their own stream in the place of stdout, which leads to a terminal.
    """
    if silent:
        return lambda line: None
    stream = sys.stdout
    put = print if stream.isatty() else functools.partial(print, file=stream, flush=True)

    def show(line: str) -> None:
        put(line)
        if streams.is_lost():
            raise SystemExit(0)  # the program finds out why, and says so

    return show


@click.command(cls=Command, context_settings=SETTINGS)
@click.option("--device", default="auto", help="auto, cuda or cuda:N.")
@click.option("--operators", metavar="NAME,NAME", help="channel_moments, hessian.  [default: both]")
@click.option("--quick", is_flag=True, help="One shape and few candidates of each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def tune(**options: Any) -> None:
    """Time the Triton kernels' configurations on this GPU and keep what is faster than the shipped ones.

    Every candidate is compared with float64 first. The table lies in ~/.cache/pyprune/tuning (XDG_CACHE_HOME);
    PYPRUNE_TUNING names another file, or is `off`. Results may then differ in their last bits.
    """
    from ..benchmark.tune import tune_operators, what_to_tune

    chosen = what_to_tune(options["device"], split_names(options["operators"]))
    if not options["as_json"]:
        streams.forgive()  # what counts is the table on the disk
    show = line_printer(options["as_json"])
    with Console(options["as_json"]).progress() as progress:
        report = tune_operators(*chosen, options["quick"], show, progress)
    if options["as_json"]:
        print(json.dumps(report, indent=1))
