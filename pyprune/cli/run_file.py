"""`--config FILE`: options of a command from a YAML file, such as the run.yaml that a run leaves in its output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import OUTPUT, Command, option, suggestion

if TYPE_CHECKING:
    import yaml

# How much to remove is said in one of these ways: one that is typed replaces another in the file.
TARGETS = ("ratio", "target_size", "parameters")
# Of the command line alone.
UNNAMED = ("config", "help", "dry_run")

config_option = option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    group=OUTPUT,
    expose_value=False,
    help="Options from a YAML file, such as a run.yaml; those typed here win.",
)


class FileCommand(Command):
    """A command that takes its parameters, by their names, from a file too; what is typed wins."""

    def prepare(self, ctx: click.Context, args: list[str], given: Mapping[str, Any]) -> list[str]:
        file = given.get("config")
        if not isinstance(file, str | Path):
            return args
        values = self.read(Path(file), ctx)
        arguments = [own for own in self.params if isinstance(own, click.Argument)]
        typed = [own for own in arguments if isinstance(given.get(str(own.name)), str)]
        if len(arguments) == 2 and len(typed) == 1 and "model" in values:
            # One name beside a file that names the model is that of the output.
            model = values.pop("model")
            args = [model if not model.startswith("-") else f"./{model}", *args]
        if any(own in given for own in TARGETS):
            values = {name: value for name, value in values.items() if name not in TARGETS}
        ctx.default_map = {**(ctx.default_map or {}), **values}
        return args

    def read(self, file: Path, ctx: click.Context) -> dict[str, Any]:
        """The parameters that the file names, by click's names. UsageError: it names others, or cannot be read."""
        known = self.names(ctx)
        values: dict[str, Any] = {}
        for name, value, line in entries(file):
            flag = name.replace("_", "-")
            if flag not in known:
                if flag in SIBLINGS.get(str(self.name), ()):
                    continue
                raise click.UsageError(f"{file}, line {line}: no option {name!r}{suggestion(flag, known)}", ctx)
            own = known[flag]
            if own.name in values:
                raise click.UsageError(f"{file}, line {line}: {name} is given twice", ctx)
            repeatable = isinstance(own, click.Option) and own.multiple
            if isinstance(value, list) and not repeatable:
                raise click.UsageError(f"{file}, line {line}: {name} takes one value", ctx)
            values[str(own.name)] = [value] if repeatable and isinstance(value, str) else value
        return {name: value for name, value in values.items() if value is not None}

    def names(self, ctx: click.Context) -> dict[str, click.Parameter]:
        """Parameters as a file names them: an option without its dashes, an argument as in the usage."""
        found: dict[str, click.Parameter] = {}
        for own in self.get_params(ctx):
            if own.name is None or own.name in UNNAMED:
                continue
            spellings = own.opts if isinstance(own, click.Option) else [own.name]
            found |= {word.lstrip("-"): own for word in spellings if not word.startswith("-") or len(word) > 2}
        return found


# Options of `prune` that an estimate does not depend on: the file of a run serves both.
SIBLINGS = {
    "estimate": (
        *("output", "cache", "resume", "allow-other-bits", "allow-nonfinite", "verify", "verbose", "log-file"),
        *("evaluate", "evaluation-length", "max-windows"),
    )
}


def entries(file: Path) -> list[tuple[str, Any, int]]:
    """(name, value, line) of a YAML mapping of words or lists of words. UsageError: it is none."""
    import yaml

    from ..runtime.files import read_file

    try:
        # Words as they stand: YAML 1.1 would make a number of 2:4 and true of `on`.
        document = yaml.compose(read_file(file).decode("utf-8-sig"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise click.UsageError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return []
    if not isinstance(document, yaml.MappingNode):
        raise click.UsageError(f"{file}: not a mapping of options: write each as `name: value`")
    return [(str(key.value), value_of(file, key, node), key.start_mark.line + 1) for key, node in document.value]


def value_of(file: Path, key: yaml.Node, node: yaml.Node) -> Any:
    """A word, None for an empty one, or a list of words."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return None if node.value in ("", "null", "~") and node.style is None else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(own, yaml.ScalarNode) for own in node.value):
        return [own.value for own in node.value]
    raise click.UsageError(f"{file}, line {key.start_mark.line + 1}: {key.value} takes one value, or a list of them")
