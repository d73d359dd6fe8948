"""Help pages, completion and suggestions of the command line."""

import re
from collections.abc import Callable

import click
import pytest
from click.shell_completion import ShellComplete
from support.command_line import run

import pyprune
from pyprune.cli.main import COMMANDS, cli
from pyprune.cli.options import SHARED
from pyprune.cli.prune import prune
from pyprune.methods import METHODS
from pyprune.methods.options import flag_of
from pyprune.methods.registry import option_names

LINES, COLUMNS = 45, 100


@pytest.fixture
def completed() -> Callable[..., list[str]]:
    """What the shell would offer for the last of some words."""

    def complete(*words: str) -> list[str]:
        completion = ShellComplete(cli, {}, "pyprune", "_PYPRUNE_COMPLETE")
        return [item.value for item in completion.get_completions(list(words[:-1]), words[-1])]

    return complete


@pytest.mark.parametrize("command", ["prune", "estimate"])
def test_help_fits_a_screen(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    lines = run(capsys, command, "--help").out.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    headings = [line.rstrip(":") for line in lines if re.fullmatch(r"\w[\w ]+:", line)]
    expected = ["Model", "Calibration", "Method", "Memory and device", "Output", "Evaluation"]
    assert headings == (expected if command == "prune" else expected[:-1])


def test_options_of_methods_are_hidden_and_taken(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "prune", "--help").out
    options = {word: own for own in prune.params if isinstance(own, click.Option) for word in own.opts}
    for name in option_names():
        assert options[flag_of(name)].hidden == (name not in SHARED)
        assert (flag_of(name) + " " in shown) == (name in SHARED)


def test_every_default_and_choice_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(run(capsys, "prune", "--help").out.split())
    for name in METHODS:
        assert name in shown
    for own in prune.params:
        if isinstance(own, click.Option) and not (own.hidden or own.is_flag) and isinstance(own.default, str | int):
            assert f"[default: {own.default}" in shown, own.name


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("",), [name for name, (*_, line) in COMMANDS.items() if line is not None]),
        (("pr",), ["prune"]),
        (("prune", "--me"), ["--method"]),
        (("prune", "--method", "wan"), ["wanda-sp", "wanda"]),
        (("prune", "--dtype", "b"), ["bfloat16"]),
        (("prune", "--device", "cu"), ["cuda", "cuda:0"]),
        (("export", "--format", "g"), ["gguf"]),
        (("estimate", "--on", "b2"), ["b200"]),
        (("methods", "sli"), ["slimgpt"]),
        (("completion", "z"), ["zsh"]),
    ],
)
def test_completion(words: tuple[str, ...], offered: list[str], completed: Callable[..., list[str]]) -> None:
    assert completed(*words) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = run(capsys, "completion", shell).out
    assert f"_PYPRUNE_COMPLETE={shell}_complete" in script


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("evalute",), "No such command 'evalute'. Did you mean 'evaluate'?"),
        (("evaluate", "m", "--txt", "x"), "No such option '--txt'. Did you mean '--text'?"),
        (
            ("export", "m", "o", "--format", "ggfu"),
            "remote-code, gguf, padded; did you mean gguf?",
        ),
        (
            ("estimate", "m", "--on", "MI300X"),
            "MI300X: no backend runs on it, only on NVIDIA GPUs and CPUs; known: ",
        ),
        (("estimate", "m", "--on", "h10"), "h10: no GPU whose rates are known; did you mean h100?"),
        (("prune", "m", "o", "--parameters", "few"), "'few' is no number of parameters; write it as 5.0B or 350M"),
    ],
)
def test_suggestions(words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, *words)
    assert (outcome.status, outcome.out) == (2, "")
    assert line in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_backends_take_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    document = run(capsys, "backends", "--json").json
    operators = {row["operator"] for row in document["operators"]}
    table = run(capsys, "backends").out.partition("operator ")[2].splitlines()[1:]
    assert [line.split()[0] for line in table] == sorted(operators)
    assert "the input is on cpu" in run(capsys, "backends", "--why").out


def test_families(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each; the JSON is the function's; one is explained, a misspelt one answered with the nearest."""
    known = pyprune.list_families()
    assert run(capsys, "families", "--json").json == known
    assert [line.split()[0] for line in run(capsys, "families").out.splitlines()[1 : 1 + len(known)]] == list(known)
    shown = run(capsys, "families", "qwen3_5_text").out
    assert "in layers of linear attention channels only" in " ".join(shown.split())
    outcome = run(capsys, "families", "cohre")
    assert (outcome.status, outcome.out) == (2, "")
    assert "unknown family 'cohre'; did you mean cohere?" in outcome.err
