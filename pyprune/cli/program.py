"""The frame of every command: streams that take everything, signals that tidy up, one line for every error."""

import signal
import sys
from typing import NoReturn

import click

from ..runtime import distributed, faults, stopping, streams
from ..runtime.stopping import Stopped


def run(command: click.Command, arguments: list[str] | None) -> NoReturn:
    """Run a command line and exit: 0; 1 our failure; 2 what the user can mend; 128 + n the signal n."""
    with streams.mended() as out, stopping.Stops() as stops:
        status = _status(command, arguments, stops)
        if status == 0 and out.lost is not None:
            # Whoever closed a pipe has read enough: there is nothing to say, as from any other program in a pipe.
            if not isinstance(out.lost, BrokenPipeError):
                _say(f"stdout: cannot be written: {faults.reason_of(out.lost)}")
            status = 1
    sys.exit(status)


def _status(command: click.Command, arguments: list[str] | None, stops: stopping.Stops) -> int:
    try:
        try:
            stops.arm()
            with distributed.process_group():
                _work(command, arguments)
        finally:
            stops.disarm()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Stopped as stop:
        return _stopped(stop)
    except BaseException as error:  # outside the command: the processes do not find each other
        line, status = faults.report_of(error)
        _say(line)
        return status
    return 0


def _work(command: click.Command, arguments: list[str] | None) -> None:
    """The command. SystemExit: its status, and of several processes the first that failed has said why."""
    try:
        status = command.main(arguments, standalone_mode=False)
    except click.Abort as abort:
        raise _with_notes(Stopped(signal.SIGINT), abort.__cause__) from abort
    except KeyboardInterrupt as interrupt:
        raise _with_notes(Stopped(signal.SIGINT), interrupt) from interrupt
    except click.exceptions.NoArgsIsHelpError as error:
        if distributed.may_report(2):
            print(error.format_message(), file=sys.stderr)
        raise SystemExit(2) from error
    except Exception as error:
        raise SystemExit(_failed(error)) from error
    raise SystemExit(status if isinstance(status, int) else 0)


def _failed(error: Exception) -> int:
    found = faults.explain(error)
    status = found[1] if found else 1
    if distributed.may_report(status):
        _say(faults.report_of(error)[0])
    return status


def _stopped(stop: Stopped) -> int:
    """One line; of several processes the first one's, and then the end that torchrun reports: by the signal itself."""
    alone = distributed.world_size() == 1
    if alone or distributed.is_main_process():
        _say("; ".join([str(stop), *getattr(stop, "__notes__", [])]))
    if not alone:
        stopping.end_by(stop.number)
    return stop.status


def _with_notes(stop: Stopped, origin: BaseException | None) -> Stopped:
    for note in getattr(origin, "__notes__", []):
        stop.add_note(note)
    return stop


def _say(message: str) -> None:
    print("pyprune: " + " ".join(message.split()), file=sys.stderr, flush=True)
