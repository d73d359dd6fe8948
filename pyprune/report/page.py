"""The report of a pruning: one HTML page that needs no network, from the plan that plan.json holds."""

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..job.record import FORMAT
from .commands import RUN_FILE, next_steps, prune_command, run_file_command
from .naming import is_self_judged, model_name, options_text
from .quantities import is_selected
from .sections import layer_sections, pass_plots
from .tables import evaluation_remarks, pass_rows, ratio_text, result_rows, setting_rows, tiles
from .templating import render


def write_report(plan: dict[str, Any], path: str | Path, output: str = "OUTPUT") -> None:
    """Write the page for `plan` (the content of a plan.json) to `path`. The same plan gives the same bytes.

    output: the folder's name in the page's commands. InputError: `plan` is not of the format that this version reads.
    """
    if plan.get("format") != FORMAT:
        raise InputError(f"the plan's format is {plan.get('format')!r}: this version reads {FORMAT!r}")
    evaluation = plan.get("evaluation")
    page = render(
        "report.html",
        title=model_name(plan["model"]),
        method=plan["method"],
        options=options_text(plan),
        tiles=tiles(plan),
        ratio=ratio_text(plan),
        warnings=plan["warnings"],
        result=result_rows(plan),
        remarks=evaluation_remarks(evaluation) if evaluation else [],
        continuations=_continuations(evaluation) if evaluation else None,
        sections=layer_sections(plan),
        passes=pass_rows(plan),
        pass_plots=pass_plots(plan),
        command=prune_command(plan, output),
        has_run_file=Path(path).with_name(RUN_FILE).is_file(),
        run_file_command=run_file_command(plan, output),
        settings=setting_rows(plan),
        steps=next_steps(plan, output, exports=not is_selected(plan)),
    )
    Path(path).write_text(page, encoding="utf-8")


def _continuations(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """The sampled continuations, and a sentence on how they were drawn."""
    drawn = evaluation.get("continuations")
    if not drawn:
        return None
    text = (
        f"{drawn['new_tokens']} tokens after the first {drawn['prompt_tokens']} of {len(drawn['samples'])} windows of "
        f"the evaluation text, sampled at temperature {drawn['temperature']:g} with seed {drawn['seed']}. Both models "
        "draw by the same random numbers."
    )
    if is_self_judged(evaluation):
        text += " The prompts are the dense model's own."
    return {"text": text, "samples": drawn["samples"]}
