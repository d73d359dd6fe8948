"""The pages name commands, options, files and links that exist, and their tables are made by the generator."""

import ast
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import page as generator
import pytest
from support.forked import run_script
from support.paths import ROOT
from test_style import FLOORS

from pyprune.cli.main import COMMANDS, cli

PAGES = generator.pages(ROOT)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
DOCS = (
    "index",
    "quickstart",
    "texts",
    "methods",
    "families",
    "loading",
    "backend",
    "architecture",
    "quality",
    "speed",
    "versions",
    "memory",
)


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None, f"there is no command pyprune {name}"
    return found


def option_names(name: str) -> set[str]:
    return {word for option in command(name).params for word in (*option.opts, *option.secondary_opts)}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def shell_lines(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line:
                yield shlex.split(line)


def inline_commands(page: Path) -> Iterator[list[str]]:
    """`pyprune ...` between single backticks; an ellipsis or a placeholder may end it."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for code in re.findall(r"`(pyprune [^`]+)`", text):
        yield code.split()


def test_pages() -> None:
    assert {page.stem for page in PAGES if page.parent.name == "docs"} == {*DOCS, "measurements"}


@each_page
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of a shell block is taken by the command line as far as its options and their values go."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smaller").mkdir()
    (tmp_path / "smaller" / "run.yaml").write_text("model: dense\nratio: 0.3\n")
    for words in shell_lines(page):
        if words[0] == "pyprune":
            command(words[1]).make_context(words[1], words[2:]).close()


@each_page
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    for words in inline_commands(page):
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= option_names(words[1]), shlex.join(words)


@each_page
def test_options_named_alone_exist(page: Path) -> None:
    """`--option` between backticks is one of some command of pyprune or of a script of benchmarks/."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    known = set().union(*(option_names(name) for name in COMMANDS))
    scripts = "\n".join(script.read_text() for script in (ROOT / "benchmarks").glob("*.py"))
    for option in re.findall(r"(?<=[`\s])--[a-z][a-z-]+", " ".join(re.findall(r"`[^`]*`", text))):
        assert option in known or f'"{option}"' in scripts or option in ("--help", "--nproc-per-node"), option


@each_page
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_paths_exist(page: Path) -> None:
    for path in re.findall(
        r"(?<![\w/.-])(?:pyprune|benchmarks|tests|csrc|triton_kernels|examples)/[\w./-]*", page.read_text()
    ):
        name = path.rstrip(".")
        assert (ROOT / name).exists() or name.startswith("benchmarks/results/"), f"{page.name} names {name}"


@each_page
def test_code_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)


@pytest.mark.slow
def test_code_of_the_backend_page_runs(tmp_path: Path) -> None:
    for number, code in enumerate(blocks(ROOT / "docs" / "backend.md", "python")):
        script = tmp_path / f"{number}.py"
        script.write_text(code)
        ended = run_script(tmp_path, script)
        assert ended.status == 0, ended.err.read_text()


@pytest.mark.slow
def test_scripts_of_benchmarks_explain_themselves(tmp_path: Path) -> None:
    """Each script that a page's shell block runs has --help; argparse knows the options that the page gives it."""
    named: dict[str, set[str]] = {}
    for page in PAGES:
        for words in shell_lines(page):
            if words[0] == "python":
                named.setdefault(words[1], set()).update(word for word in words if word.startswith("--"))
    assert named
    for script, options in named.items():
        ended = run_script(tmp_path, ROOT / script, "--help")
        assert ended.status == 0, ended.err.read_text()
        shown = ended.out.read_text()
        assert {option for option in options if option not in shown} == set(), script


def test_architecture_names_the_floors() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == FLOORS


def test_page_of_families_is_as_declared() -> None:
    page = ROOT / "docs" / "families.md"
    content = dict(generator.regions(page.read_text()))["families"]
    assert content == generator.ALL_TABLES["families"](ROOT / "benchmarks" / "results").strip(), (
        "run benchmarks/page.py"
    )
    assert (ROOT / "pyprune" / "architectures" / "cohere2.py").read_text() in blocks(page, "python")


@pytest.mark.slow
@pytest.mark.figures
def test_tables_are_found_and_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator fills every region of a copy, and a second run changes nothing."""
    for name in ("README.md", "docs", "benchmarks/README.md", "benchmarks/results", "benchmarks/plots"):
        source = ROOT / name
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    generate(tmp_path, monkeypatch)
    made = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    generate(tmp_path, monkeypatch)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == made
    texts = [page.read_text() for page in generator.pages(tmp_path)]
    found = dict(region for text in texts for region in generator.regions(text))
    assert set(found) == set(generator.ALL_TABLES)
    for name, content in found.items():
        assert content.count("\n| ") >= 2, f"the table {name} is empty"
    for text in texts:
        assert text.count("<!-- table:") == text.count("<!-- end -->") == len(generator.regions(text))
    assert (tmp_path / "benchmarks" / "plots" / "quality.svg").stat().st_size < 150_000


def generate(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["page.py", "--root", str(root)])
    generator.main()
