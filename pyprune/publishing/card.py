"""Model card of an output, README.md: the hub's metadata, the figures before and after, and how to load it."""

import shlex
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..checkpoint.links import stays_inside
from ..checkpoint.model_in_memory import IN_MEMORY
from ..report.naming import hub_id, model_name, options_text
from ..report.sparse import is_sparse
from ..report.tables import evaluation_remarks, result_rows
from ..runtime.files import read_file
from .loading import loaders_of

FILE = "README.md"
SOURCE = "https://github.com/pyprune/pyprune"
# Of a source's metadata, what is true of a pruned copy as well.
_CARRIED = ("license", "license_name", "license_link", "language", "datasets")
# Tags that name a layout or a program, which the copy may not have.
_LAYOUT_TAGS = {
    *("gguf", "mlx", "onnx", "openvino", "coreml", "safetensors", "text-generation-inference", "vllm", "sglang"),
    *("endpoints_compatible", "autotrain_compatible", "llama-cpp", "ollama"),
}


def write_card(plan: dict[str, Any], source: Path | None, folder: Path, name: str) -> list[str]:
    """Write the card of `plan` into an output's folder, whose other files are there.

    source: the checkpoint's folder, from whose card licence, languages and tags are taken; None: a model in memory.
    name: the output's.
    Returns what the user should know: metadata that could not be read.
    """
    carried, warnings = _source_metadata(source)
    loaders = loaders_of(folder)
    tags = [tag for tag in carried.pop("tags", []) if tag not in _LAYOUT_TAGS]
    data = ModelCardData(
        base_model=hub_id(plan["model"].removesuffix(IN_MEMORY)),
        library_name="transformers",
        pipeline_tag=loaders.task,
        tags=list(dict.fromkeys([*tags, "pyprune", "pruning"])),
        **carried,
    )
    evaluation = plan.get("evaluation")
    text = (
        _environment()
        .get_template(FILE)
        .render(
            name=name,
            word=shlex.quote(name),
            model=model_name(plan["model"]),
            base=data.base_model,
            verb="set to zero" if is_sparse(plan) else "removed",
            plan=plan,
            options=options_text(plan),
            text=_calibration(plan["calibration"]) if plan["calibration"] else "",
            rows=result_rows(plan),
            remarks=evaluation_remarks(evaluation | {"text": _named(evaluation["text"])}) if evaluation else [],
            loaders=loaders,
            url=SOURCE,
            licence=data.license,
        )
    )
    (folder / FILE).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
    return warnings


def _source_metadata(source: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The front matter of a source's card as far as it is carried over, and why it could not be read."""
    if source is None:
        return {}, []
    path = source / FILE
    if not path.is_file() or not stays_inside(source, path):
        return {}, []
    try:
        card = read_file(path).decode("utf-8", errors="replace").lstrip("\ufeff")
        if not card.startswith("---"):
            return {}, []
        found = ModelCard(card, ignore_metadata_errors=True).data.to_dict()  # what is in its model-index is not ours
    except Exception as error:  # of the YAML parser, or of the hub's own checks of what it found
        reason = " ".join(str(error).split())
        return {}, [f"{path}: licence and tags are not carried over: its metadata cannot be read ({reason})"]
    carried = {name: found[name] for name in _CARRIED if _is_text(found.get(name))}
    tags = found.get("tags")
    return carried | ({"tags": tags} if isinstance(tags, list) and _is_text(tags) else {}), []


def _is_text(value: Any) -> bool:
    """Whether the hub takes it: a text, or a list of them."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _calibration(calibration: dict[str, Any]) -> str:
    """The calibration texts, with their shares where they are several; a data set of the hub by its whole name."""
    sources = calibration.get("sources") or [{"text": calibration["text"]}]
    names = [own["text"] if "revision" in own else _named(own["text"]) for own in sources]
    if len(sources) == 1:
        return names[0]
    return ", ".join(f"{name} ({own['share']:.0%})" for name, own in zip(names, sources, strict=True))


def _named(text: str) -> str:
    """A text without the folder that it lies in, which is nobody else's business."""
    return Path(text).name or text


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # Markdown; `code` and `cell` keep names from being read as such
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"code": _code, "cell": _cell}
    return made


def _code(text: str) -> str:
    """A code span in one line, whatever the text holds."""
    line = " ".join(text.split())
    return f"`` {line} ``" if "`" in line else f"`{line}`"


def _cell(text: str) -> str:
    """A table's cell or a sentence in which nothing is markup."""
    line = " ".join(text.split())
    for letter in "\\`*_[]<>|":
        line = line.replace(letter, f"\\{letter}")
    return line
