"""The command line. stdout carries results, stderr progress and logs; status 2 is a wrong argument or input."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import transformers
from click.core import ParameterSource

from ..errors import InputError
from ..estimation.time import GPU_RATES
from ..methods import METHODS
from ..runtime.device import configure_allocators
from ..runtime.names import split_names
from ..runtime.stopping import Stopped
from . import program
from .benchmark import benchmark, tune
from .console import Console
from .options import SETTINGS, Group, MemorySize, device_options, method_options, options_given


@click.group(cls=Group, context_settings=SETTINGS)
@click.version_option(package_name="pyprune")
def cli() -> None:
    """Structured pruning of large language models: whole attention heads and FFN channels, no retraining.

    MODEL is a checkpoint folder (safetensors) or a hub id. A first run:

        pyprune prune models/llama-6m-gqa smaller --ratio 0.3 --calibration self --sequence-length 256
    """


@cli.command(context_settings=SETTINGS)
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@method_options
@click.option("--device-memory", type=MemorySize(), help="Prune within so much GPU memory, e.g. 24GB.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder of calibration passes.  [default: beside OUTPUT]"
)
@click.option("--resume", is_flag=True, help="Finish a run that was killed or ran out of disk space.")
@click.option("--allow-other-bits", is_flag=True, help="With --resume: on another processor or other versions too.")
@click.option("--allow-nonfinite", is_flag=True, help="Count NaN and Inf activations as zero.")
@click.option(
    "--verify/--no-verify",
    default=None,
    envvar="PYPRUNE_VERIFY",
    show_envvar=True,
    help="Load OUTPUT in a fresh process and compare its logits.  [default: up to 8 GiB in float32]",
)
@click.option("--evaluate", "text", metavar="TEXT", help="Perplexity before and after on a text, or `self`.")
@click.option("--evaluation-length", type=click.IntRange(2), default=1024, help="Tokens in an evaluation window.")
@click.option("--max-windows", type=click.IntRange(1), help="Evaluation windows at most.")
@device_options
def prune(model: str, output: Path, **options: Any) -> None:
    """Prune MODEL into the new folder OUTPUT, which holds a checkpoint, plan.json and report.html.

    OUTPUT appears whole or not at all. Load it with `import pyprune` and
    AutoModelForCausalLM.from_pretrained(OUTPUT).

    Started by torchrun, processes split the calibration windows, each on its own GPU:

        torchrun --nproc-per-node=8 -m pyprune prune MODEL OUTPUT ...
    """
    from ..job.config import EvaluationConfig, PruneConfig
    from ..pipeline.run import prune as run_pruning

    evaluation = None
    if options["text"]:
        fits = _is_default("evaluation_length")
        evaluation = EvaluationConfig(options["text"], options["evaluation_length"], options["max_windows"], fits)
    shared = {
        name: options[name]
        for name in (
            *("method", "ratio", "calibration", "samples", "sequence_length", "seed", "device", "dtype"),
            *("device_memory", "cache", "resume", "allow_other_bits", "allow_nonfinite", "trust_remote_code", "verify"),
        )
    }
    console = Console(options["as_json"])
    with console.progress() as progress, _resumable(output):
        plan = run_pruning(
            PruneConfig(
                model,
                output,
                method_options=options_given(options),
                fits=_is_default("sequence_length"),
                evaluation=evaluation,
                **shared,
            ),
            progress,
        )
    console.pruned(plan, output)


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """A run that is stopped within it says how to go on, once there is something to go on with."""
    from ..checkpoint import JOURNAL
    from ..checkpoint.writer import partial_of

    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        partial = partial_of(output)
        if (partial / JOURNAL).is_file():
            stop.add_note(f"{partial} keeps what is finished: repeat with --resume")
        raise


@cli.command(context_settings=SETTINGS)
@click.argument("model")
@click.option("--text", metavar="TEXT", help="A .txt, a .jsonl, or `self` (sampled).")
@click.option("--sequence-length", type=click.IntRange(2), default=2048, help="Tokens in a window.")
@click.option("--max-windows", type=click.IntRange(1), help="Windows at most.  [default: all; 64 for `self`]")
@click.option("--reference", metavar="DENSE", help="Also KL divergence and top-1 agreement with this model; its tasks.")
@click.option("--tasks", metavar="NAME,NAME", help="Tasks of lm-eval (pip install 'pyprune[eval]').")
@click.option("--include-path", type=click.Path(path_type=Path), help="Folder of more tasks, in lm-eval's YAML.")
@click.option("--limit", type=click.IntRange(1), help="Examples of each task at most.")
@click.option("--few-shot", type=click.IntRange(0), help="Solved examples before each.  [default: as the task says]")
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Sequences of a task in a forward pass.")
@device_options
def evaluate(model: str, **options: Any) -> None:
    """Perplexity of MODEL in consecutive windows of a text, its accuracy on tasks, or both.

    Perplexity is exp of the mean over windows of each window's mean cross-entropy. `self` samples the text from DENSE
    if it is given, else from MODEL.
    """
    from ..checkpoint import checkpoint_folder
    from ..checkpoint.load_model import evaluation_model
    from ..runtime.device import select_device, select_dtype

    if options["text"] is None and options["tasks"] is None:
        raise InputError("there is nothing to evaluate on: give --text TEXT, --tasks NAME,NAME or both")
    console = Console(options["as_json"])
    folder = checkpoint_folder(model)
    reference = checkpoint_folder(options["reference"]) if options["reference"] else None
    if reference is not None:
        evaluation_model(reference, options["trust_remote_code"])  # says what is wrong with it in our words
    device = select_device(options["device"])
    config, stored = evaluation_model(folder, options["trust_remote_code"])
    dtype = select_dtype(options["dtype"], stored, device)
    result: dict[str, Any] = {}
    if options["tasks"] is not None:
        result |= _evaluate_on_tasks(folder, reference, device, dtype, options)
    if options["text"] is not None:
        result = _evaluate_on_text(folder, reference, config, device, dtype, options, console) | result
    console.evaluated(result)


def _is_default(option: str) -> bool:
    return click.get_current_context().get_parameter_source(option) is ParameterSource.DEFAULT


def _fitted(length: int, config: Any, console: Console) -> int:
    """The command's --sequence-length, a default cut to the model's positions, which is said."""
    from ..calibration.windows import fit_length

    length, note = fit_length(length, not _is_default("sequence_length"), config)
    if note is not None:
        console.note(note)
    return length


def _evaluate_on_text(
    folder: Path,
    reference: Path | None,
    config: Any,
    device: Any,
    dtype: Any,
    options: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    from ..calibration.windows import evaluation_windows
    from ..evaluation import perplexity as evaluation

    with console.progress() as progress:
        windows = evaluation_windows(
            options["text"],
            reference or folder,
            config,
            _fitted(options["sequence_length"], config, console),
            options["max_windows"],
            options["seed"] + 1,  # sampled text must not be what a pruning with this seed was calibrated on
            device,
            dtype,
            options["trust_remote_code"],
            lambda done, total: progress("sampling text", done, total),
        )
        return evaluation.evaluate(
            folder,
            windows,
            reference_folder=reference,
            device=device,
            dtype=dtype,
            trust_remote_code=options["trust_remote_code"],
            progress=lambda done, total: progress("evaluate", done, total),
        )


def _evaluate_on_tasks(
    folder: Path, reference: Path | None, device: Any, dtype: Any, options: dict[str, Any]
) -> dict[str, Any]:
    from ..evaluation.tasks import evaluate_tasks

    tasks = split_names(options["tasks"])
    shared = {name: options[name] for name in ("include_path", "limit", "batch_size", "few_shot", "trust_remote_code")}
    models = {"task_evaluation": folder} | ({"reference_task_evaluation": reference} if reference else {})
    return {key: evaluate_tasks(each, tasks, device=device, dtype=dtype, **shared) for key, each in models.items()}


@cli.command(context_settings=SETTINGS)
@click.argument("model")
@method_options
@click.option("--on", "named", type=click.Choice(list(GPU_RATES)), help="Ask about a GPU that is not here.")
@click.option("--device-memory", type=MemorySize(), help="As in `pyprune prune`.")
@device_options
def plan(model: str, **options: Any) -> None:
    """What a pruning of MODEL would do: sizes, parameters, time, peak memory. Reads no weights, writes nothing."""
    from ..checkpoint import CheckpointReader, checkpoint_folder
    from ..estimation.estimate import estimate
    from ..methods import make_method, resolve_ratio
    from ..runtime.device import select_device, select_dtype

    named = options["named"]
    device = select_device(options["device"])
    if options["device_memory"] is not None and named is None and device.type == "cpu":
        raise InputError("--device-memory is for a GPU: one that is here, or one named with --on")
    method = make_method(options["method"], options_given(options))
    reader = CheckpointReader(checkpoint_folder(model))
    dtype = (
        reader.dtype if named and options["dtype"] == "auto" else select_dtype(options["dtype"], reader.dtype, device)
    )
    console = Console(options["as_json"])
    length = options["sequence_length"]
    if method.needs_text:
        length = _fitted(length, reader.config, console)
    sizes = (resolve_ratio(method, options["ratio"]), options["samples"], length)
    result = estimate(reader, method, *sizes, device, dtype, options["device_memory"], named)
    console.estimated(result)


@cli.command(context_settings=SETTINGS)
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--format", "layout", required=True, help="stock, padded, remote-code or gguf.")
@click.option("--dtype", help="gguf: f32, f16, bf16 or q8_0.  [default: f16]")
@click.option("--no-verify", is_flag=True, help="Do not load the result and compare its logits with MODEL's.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def export(model: str, output: Path, layout: str, dtype: str | None, no_verify: bool, as_json: bool) -> None:
    """Write the pruned MODEL as OUTPUT in a layout that other programs load.

    \b
    stock        a transformers class that every engine knows; needs the same sizes in every layer
    remote-code  as it is, with its model code beside it: loads with trust_remote_code=True, without pyprune
    gguf         one file for llama.cpp and Ollama; layers may differ
    padded       zeros up to the widest layer, in a stock class: to evaluate it, no smaller and no faster

    OUTPUT appears whole or not at all, once a fresh process has loaded it and its logits are those of MODEL.
    """
    from ..checkpoint import checkpoint_folder
    from ..exporters import export as run_export

    console = Console(as_json)
    with console.progress() as progress:
        result = run_export(checkpoint_folder(model), output, layout, dtype, progress, verified=not no_verify)
    console.exported(result)


@cli.command(context_settings=SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def backends(as_json: bool) -> None:
    """Which backend would run each operator here, and why the others would not."""
    from ..ops.dispatch import describe, describe_installation

    Console(as_json).backends(describe(), describe_installation())


@cli.command(context_settings=SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def methods(as_json: bool) -> None:
    """The pruning methods and their options."""
    Console(as_json).methods(METHODS)


cli.add_command(benchmark)
cli.add_command(tune)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (sys.argv unless given) and exit; one line on stderr says what went wrong."""
    configure_allocators()
    # transformers' notes on reading a pruned configuration's global sizes, and its own bars, say nothing to our user.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    program.run(cli, arguments)


if __name__ == "__main__":
    main()
