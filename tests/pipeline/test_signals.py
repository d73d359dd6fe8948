"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line, status 128 + n, nothing left but what can be gone on with."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from support.forked import Running, run, start
from support.paths import ROOT

from pyprune.cli import program
from pyprune.runtime import stopping
from pyprune.runtime.stopping import Stopped

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# For tests of which each case starts an interpreter: the first signal alone is a must for every change.
FIRST_OF_SIGNALS = [SIGNALS[0], *(pytest.param(number, marks=pytest.mark.slow) for number in SIGNALS[1:])]
PRUNE = ("--method", "magnitude", "--ratio", 0.3)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(layers=2)


def until(holds: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def workers(scratch: Path) -> list[int]:
    """Processes that verify something in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, state = (process / "cmdline").read_bytes(), (process / "stat").read_text().rpartition(")")[2]
        except OSError:  # gone
            continue
        if b"logits_worker.py" in command and os.fsencode(scratch) in command and state.split()[0] not in "ZX":
            found.append(int(process.name))
    return found


def verifying(model: Path, tmp_path: Path, *arguments: object) -> tuple[Running, Path]:
    """A command whose output is just being loaded by another process."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def use_scratch() -> None:
        tempfile.tempdir = str(scratch)

    running = start(tmp_path, *arguments, first=use_scratch)
    until(lambda: workers(scratch))
    return running, scratch


@pytest.mark.parametrize("number", FIRST_OF_SIGNALS)
@pytest.mark.parametrize("command", ["export", "prune"])
def test_while_the_output_is_verified(model: Path, tmp_path: Path, command: str, number: signal.Signals) -> None:
    output = tmp_path / "out"
    arguments = ("--format", "stock") if command == "export" else (*PRUNE, "--verify")
    running, scratch = verifying(model, tmp_path, command, model, output, *arguments)
    os.kill(running.pid, number)
    time.sleep(0.02)
    os.kill(running.pid, number)  # an impatient user
    assert running.wait() == 128 + number
    assert workers(scratch) == []
    assert not list(scratch.glob("pyprune-verify-*"))
    (line,) = running.lines
    said = f"pyprune: {stopping.REASONS[number]}"
    partial = tmp_path / "out.partial"
    assert line == (f"{said}; {partial} keeps what is finished: repeat with --resume" if command == "prune" else said)
    assert partial.exists() == (command == "prune")
    assert not output.exists()


def test_nobody_survives_a_kill(model: Path, tmp_path: Path) -> None:
    running, scratch = verifying(model, tmp_path, "export", model, tmp_path / "out", "--format", "stock")
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    until(lambda: not workers(scratch))


@pytest.mark.parametrize(
    ("started", "number"),
    [
        pytest.param(("-m", "pyprune"), signal.SIGINT, id="module-interrupt"),
        pytest.param(("pyprune",), signal.SIGTERM, id="script-term", marks=pytest.mark.slow),
        pytest.param(("-m", "pyprune"), signal.SIGHUP, id="module-hangup", marks=pytest.mark.slow),
    ],
)
def test_while_the_libraries_are_imported(tmp_path: Path, started: tuple[str, ...], number: signal.Signals) -> None:
    """There is nothing to tidy or to resume, and no traceback of the import."""
    if started == ("pyprune",):
        (tmp_path / "pyprune").write_text("import sys\nfrom pyprune.cli.main import main\nsys.exit(main())\n")
        started = (str(tmp_path / "pyprune"),)
    # As slow as on a cold disk: the first of the large libraries says that it is reached, and waits.
    (tmp_path / "transformers.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    # -P: not the script's own folder, which holds a file of the package's name
    process = subprocess.Popen(
        [sys.executable, "-P", *started, "estimate", "model"], env=environment, text=True, stdout=-1, stderr=-1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", f"pyprune: {stopping.REASONS[number]}\n")


def test_what_is_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(argv: list[str], original: list[str]) -> bool:
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", original)
        return stopping.is_program()

    assert started(["/usr/bin/pyprune", "plan"], ["python", "/usr/bin/pyprune", "plan"])
    assert started(["-m", "plan", "m"], ["python", "-u", "-m", "pyprune", "plan", "m"])
    assert started(["-m"], ["python", "-mpyprune"])
    assert not started(["-m", "pyprune"], ["python", "-m", "pytest", "pyprune"])
    assert not started(["train.py"], ["python", "train.py"])
    assert not started([""], ["python"])
    assert not started([], [])


@click.command()
def raises_its_own() -> None:
    signal.raise_signal(signal.SIGTERM)


@click.command()
def loses_its_stop() -> None:
    """As compiled code does that calls Python and meets an exception there."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except Stopped:
        error = ValueError("Invalid affine transformation matrix")
        error.add_note("out.partial keeps what is finished")
        raise error from None


def test_an_error_in_the_place_of_a_stop_is_the_stop(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.run(loses_its_stop, [])
    assert stop.value.code == 143
    line = f"pyprune: {stopping.REASONS[signal.SIGTERM]}; out.partial keeps what is finished\n"
    assert capsys.readouterr() == ("", line)


def test_handlers_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    """main() within a larger program leaves its handlers and streams as they were; one that is ignored stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    streams, hook = (sys.stdout, sys.stderr), sys.unraisablehook

    @click.command()
    def hangs_up() -> None:
        signal.raise_signal(signal.SIGHUP)

    for command, status in ((raises_its_own, 143), (hangs_up, 0)):
        with pytest.raises(SystemExit) as stop:
            program.run(command, [])
        assert stop.value.code == status
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
        assert (sys.stdout, sys.stderr, sys.unraisablehook) == (*streams, hook)
    assert capsys.readouterr().err == "pyprune: terminated (SIGTERM)\n"
    signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the main thread may handle signals: the command runs all the same."""
    codes: list[object] = []

    @click.command()
    def nothing() -> None:
        pass

    def target() -> None:
        try:
            program.run(nothing, [])
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped(signal.SIGINT)])
def test_notes_are_part_of_the_line(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    error.add_note("what is there stays")

    @click.command()
    def stopped() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        program.run(stopped, [])
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "pyprune: interrupted; what is there stays"


def test_one_that_python_drops_comes_again(tmp_path: Path) -> None:
    """What is raised in a destructor is printed and forgotten by Python."""

    class Slow:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    @click.command()
    def collects() -> None:
        Slow()
        time.sleep(30)

    ended = run(tmp_path, first=lambda: program.run(collects, []))
    assert ended.status == 143
    assert ended.lines == ["pyprune: terminated (SIGTERM)"]


def test_tidying_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals soon after the first change nothing; later the user means it."""
    monkeypatch.setattr(stopping, "PATIENCE", 0.2)

    @click.command()
    def stubborn() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            print("still tidying", flush=True)
            time.sleep(0.3)
            signal.raise_signal(signal.SIGINT)
            print("never printed", flush=True)

    ended = run(tmp_path, first=lambda: program.run(stubborn, []))
    assert ended.status == 130
    assert ended.lines == ["pyprune: interrupted"]
    assert ended.out.read_text() == "still tidying\n"


def test_forked_helpers_end_by_the_signal(tmp_path: Path) -> None:
    """A library's pool ends its processes by SIGTERM: no exception of ours in them."""

    @click.command()
    def pools() -> None:
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.5)  # what comes before Python in the new process is through forking is lost
        os.kill(pid, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    ended = run(tmp_path, first=lambda: program.run(pools, []))
    assert ended.status == 0
    assert ended.out.read_text() == f"{-signal.SIGTERM}\n"
    assert ended.err.read_text() == ""
