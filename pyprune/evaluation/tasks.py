"""Accuracy of a model on the tasks of lm-eval (EleutherAI's lm-evaluation-harness), or on user tasks in its YAML."""

import difflib
import logging
import math
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration.text import load_tokenizer
from ..checkpoint.load_model import load_model
from ..errors import InputError
from ..runtime import distributed

_FEW_SHOT_SEED = 1234  # lm-eval's own: the same solved examples as there


def evaluate_tasks(
    folder: Path,
    tasks: list[str],
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    *,
    device: torch.device,
    dtype: torch.dtype,
    few_shot: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Run lm-eval's tasks, groups and tags of these names on the model in a folder.

    `include_path` is searched for more tasks (*.yaml), which take precedence. `limit` is the examples of each task at
    most, `few_shot` the solved examples before each (None: as the task says; a task that says 0 keeps 0),
    `batch_size` the sequences in a forward pass.

    Returns `tasks` and, of groups that have totals, `groups`: name -> `metrics`, `examples`, `few_shot` (tasks only);
    a metric is `{"value", "standard_error", "higher_is_better"}`, the second None where it is unknown, and its name
    has lm-eval's filter behind a comma where there is one. Also `limit`, `seconds` (without loading) and `lm_eval`,
    its version.

    InputError: lm-eval is not installed, no such task or folder, data that cannot be had, a task that lm-eval cannot
    run on a text model or only by running code that the model writes, a model that `load_model` refuses, a figure
    that is not finite.
    """
    if not tasks:
        raise InputError("no task is named")
    if distributed.world_size() > 1:
        raise InputError("tasks are evaluated in one process: run it without torchrun")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"tasks need lm-eval, but there is no {error.name}: pip install 'pyprune[eval]', or evaluate on a text"
        ) from error
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"{include_path} is not a folder of tasks")
    _seed()
    loaded = _load(TaskManager(include_path=include_path), tasks, include_path)
    for task in loaded["tasks"].values():
        count = task.get_config("num_fewshot")
        if few_shot is not None and count != 0:
            count = few_shot
        task.set_config(key="num_fewshot", value=count or 0)
        task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
    model = load_model(folder, device, dtype, trust_remote_code)
    with _without_note_on_loaded_models():
        harness = HFLM(
            pretrained=model, tokenizer=load_tokenizer(folder, trust_remote_code), batch_size=batch_size, device=None
        )
    start = time.perf_counter()
    # Not simple_evaluate, which spends seconds on describing the machine and asks git about the working folder.
    results = lm_eval.evaluate(harness, loaded, limit=limit, log_samples=False)
    return {
        "tasks": {name: _entry(results, "results", name) for name in results["n-samples"]},
        "groups": {name: _entry(results, "groups", name) for name in results.get("groups", {})},
        "limit": limit,
        "seconds": time.perf_counter() - start,
        "lm_eval": lm_eval.__version__,
    }


def _seed() -> None:
    """The seeds that lm-eval's own program starts with: some tasks draw their questions, some sample answers."""
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002 (the tasks draw from the global generator)
    torch.manual_seed(1234)


def _load(manager: Any, names: list[str], include_path: Path | None) -> dict[str, dict[str, Any]]:
    """lm-eval's own objects for the names: `tasks` with their data, `groups`, and `group_map` of who is in which."""
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    source: dict[str, str] = {}
    for name in names:
        if name not in manager.task_index:
            raise InputError(_unknown(name, manager.all_tasks, include_path))
        try:
            found = manager.load([name])
        except (OSError, ValueError, KeyError) as error:  # what lm-eval and datasets raise for wrong YAML and lost data
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"task {name} or its data cannot be loaded: {reason}") from error
        for task, task_object in found["tasks"].items():
            if task in source:
                raise InputError(f"task {task} is asked for twice: by {source[task]} and by {name}")
            source[task] = name
            _check_runnable(task, task_object)
        for kind, objects in found.items():
            loaded[kind] |= objects
    return loaded


def _unknown(name: str, known: Iterable[str], include_path: Path | None) -> str:
    close = difflib.get_close_matches(name, known, n=5)
    where = "lm-eval has" if include_path is None else f"neither lm-eval nor {include_path} has"
    verb = "no" if include_path is None else "a"
    hint = f"close to it: {', '.join(close)}" if close else "`lm-eval ls tasks` lists lm-eval's"
    return f"{where} {verb} task {name!r}; {hint}"


def _check_runnable(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):  # set by lm-eval only where it holds
        raise InputError(f"task {name} runs code that the model writes; run it with lm-eval itself, in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"task {name} is not of text alone")


@contextmanager
def _without_note_on_loaded_models() -> Iterator[None]:
    """Silence lm-eval's warning that options for loading are not used with a loaded model; none is given here."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _entry(results: Any, kind: str, name: str) -> dict[str, Any]:
    """A task's or group's figures in our words."""
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in results[kind][name].items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue  # a name or a count, or the error of another metric
        if not math.isfinite(value):
            raise InputError(f"{key} of task {name} is {value}: the weights are damaged, or the dtype overflows")
        metrics[metric if chosen == "none" else key] = {
            "value": float(value),
            "standard_error": _finite(results[kind][name].get(f"{metric}_stderr,{chosen}")),
            "higher_is_better": results["higher_is_better"][name].get(metric),
        }
    entry: dict[str, Any] = {"metrics": metrics, "examples": results[kind][name]["sample_len"]}
    return entry | ({"few_shot": results["n-shot"][name]} if kind == "results" else {})


def _finite(value: Any) -> float | None:
    """lm-eval writes "N/A" or NaN for what it cannot know."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
