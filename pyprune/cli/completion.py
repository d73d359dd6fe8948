"""`pyprune completion`."""

import click

from .command import SETTINGS, Choice, Command


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("shell", type=Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print the script with which SHELL (bash, zsh or fish) completes commands, options and their choices.

    \b
        bash   eval "$(pyprune completion bash)"        in ~/.bashrc
        zsh    eval "$(pyprune completion zsh)"         in ~/.zshrc, after compinit
        fish   pyprune completion fish | source         in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    from .main import cli

    made = get_completion_class(shell)
    assert made is not None, "click has a class for each of the three"
    # Not source(): for bash it starts one to ask its version.
    script = made(cli, {}, "pyprune", "_PYPRUNE_COMPLETE")
    click.echo(script.source_template % script.source_vars())
