"""The frame of every command: streams that take everything, signals that tidy up, one line for every error."""

import os
import signal
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import click

from ..errors import InputError
from ..runtime import stopping, streams
from ..runtime.files import reason_of
from ..runtime.stopping import Stopped


def run(command: click.Command, arguments: list[str] | None) -> NoReturn:
    """Run a command line and exit: 0; 1 our failure; 2 what the user can mend; 128 + n the signal n."""
    with streams.mended() as out, stopping.Stops() as stops:
        status = _status(command, arguments, stops)
        if status == 0 and out.lost is not None:
            # Whoever closed a pipe has read enough: there is nothing to say, as from any other program in a pipe.
            if not isinstance(out.lost, BrokenPipeError):
                _say(f"stdout: cannot be written: {reason_of(out.lost)}")
            status = 1
    sys.exit(status)


def _status(command: click.Command, arguments: list[str] | None, stops: stopping.Stops) -> int:
    try:
        try:
            stops.arm()
            with _processes():
                _work(command, arguments, stops)
        finally:
            stops.disarm()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Stopped as stop:
        return _stopped(stop)
    except BaseException as error:  # outside the command: the processes do not find each other
        line, status = _report_of(error)
        _say(line)
        return status
    return 0


def _in_several() -> bool:
    """Whether torchrun started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _processes() -> AbstractContextManager[None]:
    if not _in_several():
        return nullcontext()
    from ..runtime.distributed import process_group

    return process_group()


def _may_report(status: int) -> bool:
    """Whether this process is to say what went wrong: the only one, or the first that failed."""
    if not _in_several():
        return True
    from ..runtime.distributed import may_report

    return may_report(status)


def _work(command: click.Command, arguments: list[str] | None, stops: stopping.Stops) -> None:
    """The command. SystemExit: its status, and of several processes the first that failed has said why.

    An error after a signal is a stop: compiled code of libraries (matplotlib's paths, torch's storages) puts an
    exception of its own in the place of the one that the signal raised within it.
    """
    try:
        status = command.main(arguments, standalone_mode=False)
    except click.Abort as abort:
        raise _with_notes(Stopped(signal.SIGINT), abort.__cause__) from abort
    except KeyboardInterrupt as interrupt:
        raise _with_notes(Stopped(signal.SIGINT), interrupt) from interrupt
    except click.exceptions.NoArgsIsHelpError as error:
        if _may_report(2):
            print(error.format_message(), file=sys.stderr)
        raise SystemExit(2) from error
    except Exception as error:
        if stops.raised is not None:
            raise _with_notes(Stopped(stops.raised), error) from error
        raise SystemExit(_failed(error)) from error
    raise SystemExit(status if isinstance(status, int) else 0)


def _failed(error: Exception) -> int:
    found = _explain(error)
    status = found[1] if found else 1
    if _may_report(status):
        _say(_report_of(error)[0])
    return status


def _explain(error: BaseException) -> tuple[str, int] | None:
    """The line and the status of an error; None: an error of ours. What click refuses needs no library to be named."""
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "pyprune"
        return f"{error.format_message()} (see {command} --help)", 2
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    if isinstance(error, InputError):
        return str(error), 2
    from ..runtime import faults

    return faults.explain(error)


def _report_of(error: BaseException) -> tuple[str, int]:
    """As `_explain`; of an error of ours the traceback is printed, and the line asks for a report."""
    found = _explain(error)
    if found is None:
        traceback.print_exception(error)
        found = f"an error of pyprune itself ({type(error).__name__}): please report it with the lines above", 1
    return found


def _stopped(stop: Stopped) -> int:
    """One line; of several processes the first one's, and then the end that torchrun reports: by the signal itself."""
    line = "; ".join([str(stop), *getattr(stop, "__notes__", [])])
    if not _in_several():
        _say(line)
        return stop.status
    from ..runtime import distributed

    if distributed.is_main_process():
        _say(line)
    if distributed.world_size() > 1:
        stopping.end_by(stop.number)
    return stop.status


def _with_notes(stop: Stopped, origin: BaseException | None) -> Stopped:
    for note in getattr(origin, "__notes__", []):
        stop.add_note(note)
    return stop


def _say(message: str) -> None:
    print("pyprune: " + " ".join(message.split()), file=sys.stderr, flush=True)
