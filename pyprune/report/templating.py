"""The pages' templates: jinja2 with every value escaped."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_FOLDER = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """A page of `templates/`, with the style sheet in it: it needs nothing else."""
    style = (_FOLDER / "style.css").read_text(encoding="utf-8").strip()
    return _environment().get_template(template).render(style=style, **values)
