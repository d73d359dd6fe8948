"""The program `pyprune`: stdout carries results, stderr progress and logs; status 2 is a wrong argument or input.

Commands are modules beside this one, imported when they run: `pyprune --help` imports no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import click

from ..runtime.allocators import configure_allocators
from . import program
from .command import SETTINGS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# command -> module of this package and its attribute, line in `pyprune --help`. None: an alias, not listed.
COMMANDS: dict[str, tuple[str, str, str | None]] = {
    "prune": ("prune", "prune", "Prune MODEL into the new folder OUTPUT."),
    "evaluate": ("evaluate", "evaluate", "Measure perplexity of MODEL on texts, its accuracy on tasks, or both."),
    "estimate": ("estimate", "estimate", "Predict sizes, time and peak memory of a pruning of MODEL."),
    "plan": ("estimate", "estimate", None),
    "export": ("export", "export", "Write the pruned MODEL in a layout that other programs load."),
    "compare": ("compare", "compare", "Put the OUTPUTs of several runs side by side."),
    "push": ("push", "push", "Upload OUTPUT to the hub."),
    "methods": ("listings", "methods", "List the pruning methods, or explain one and its options."),
    "families": ("listings", "families", "List the model families, or explain one: its units, layers and exports."),
    "backends": ("listings", "backends", "Show which backend runs each operator here."),
    "benchmark": ("benchmark", "benchmark", "Measure the operators against PyTorch and other libraries."),
    "tune": ("benchmark", "tune", "Tune the Triton kernels for this GPU."),
    "completion": ("completion", "completion", "Print the script that completes commands in a shell."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (*_, line) in COMMANDS.items() if line is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        return getattr(importlib.import_module(f".{module}", __package__), attribute)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.NoSuchCommand(name, possibilities=self.list_commands(ctx), ctx=ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands by their lines above: click would import each, and PyTorch with some."""
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        listed = {name: line for name, (*_, line) in COMMANDS.items() if line is not None}
        return [CompletionItem(name, help=line) for name, line in listed.items() if name.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (*_, line) in COMMANDS.items() if line is not None])


@click.group(cls=LazyGroup, context_settings=SETTINGS)
@click.version_option(package_name="pyprune")
def cli() -> None:
    """Structured pruning of large language models: whole attention heads and FFN channels, no retraining.

    MODEL is a checkpoint folder (safetensors) or a hub id. A first run:

    \b
        pyprune prune models/llama-6m-gqa smaller --ratio 0.3 --calibration self --sequence-length 256

    Every command has --help. pyprune completion SHELL completes commands and options.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (sys.argv unless given) and exit; one line on stderr says what went wrong."""
    configure_allocators()
    program.run(cli, arguments)


if __name__ == "__main__":
    main()
