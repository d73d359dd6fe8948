"""A process that has every library loaded and forks the commands it is told to run: each starts in milliseconds.

It never computes anything itself, so no thread of it is lost in a fork. Requests come on stdin and answers go to
stdout, a JSON document a line; forked.py is its client. A command is the leader of a session of its own, by which
whatever it leaves running can be found.
"""

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import selectors
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

# Loaded when something imports them, not before: they need what may not be installed, or would start a command.
_LEFT_OUT = ("__main__", "triton_kernels", "vllm_plugin", "integrations", "benchmark")
_STREAMS = ((0, os.devnull, os.O_RDONLY), (1, "out", os.O_WRONLY | os.O_CREAT), (2, "err", os.O_WRONLY | os.O_CREAT))
_PDEATHSIG = 1  # of prctl(2)


def load() -> None:
    """Import what a command would, and have built what libraries build once."""
    import torch
    import transformers.generation
    from matplotlib import pyplot
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import pyprune

    torch.set_num_threads(1)
    figure, axes = pyplot.subplots()  # finds the fonts
    axes.plot([0, 1])
    figure.savefig(io.BytesIO(), format="svg")
    pyplot.close(figure)
    with suppress(ImportError, AttributeError):  # patterns of names, in the version that has them
        transformers.conversion_mapping.get_checkpoint_conversion_mapping("llama")
    for module in pkgutil.walk_packages(pyprune.__path__, "pyprune.", onerror=lambda _: None):
        if not set(module.name.split(".")) & set(_LEFT_OUT):
            with suppress(ImportError):  # an extra that is not installed
                importlib.import_module(module.name)


def main_function() -> Callable[[list[str]], object]:
    """pyprune's `main`, be it in the module or in the package of the command line."""
    module = importlib.import_module("pyprune.cli.main")
    main = getattr(module, "main", None)
    return main if callable(main) else importlib.import_module("pyprune.cli.main.main").main


def stop_after_parts(count: int) -> None:
    """Kill the process with SIGKILL once this number of parts is in the journal."""
    from pyprune.checkpoint import CheckpointWriter

    write = CheckpointWriter.write

    def counted(self: CheckpointWriter, part: int, *arguments: Any, **named: Any) -> None:
        if len(self.done) >= count or part >= count:
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, part, *arguments, **named)

    CheckpointWriter.write = counted  # type: ignore[method-assign]


def stop_after_layers(count: int) -> None:
    """Kill the process with SIGKILL once the statistics of this number of layers are kept."""
    from pyprune.passes.layer_cache import LayerLog

    write = LayerLog.write

    def counted(self: LayerLog, layer: int, *arguments: Any, **named: Any) -> None:
        write(self, layer, *arguments, **named)
        if layer + 1 >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    LayerLog.write = counted  # type: ignore[method-assign]


_STOPS = {"parts": stop_after_parts, "layers": stop_after_layers}


def limit(kind: str, value: int) -> None:
    """A limit of setrlimit by name; that of the address space counts from what the process has now."""
    if kind == "AS":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        value += pages * resource.getpagesize()
    number = getattr(resource, f"RLIMIT_{kind}")
    hard = resource.getrlimit(number)[1]
    resource.setrlimit(number, (value, hard))


def command(request: dict[str, Any]) -> int:
    """Run it in this process, as a shell would start it; its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.update(request["environment"])
    for descriptor, name, flags in _STREAMS:
        file = os.open(os.path.join(request["logs"], name) if descriptor else name, flags, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
    tempfile.tempdir = None  # the server's
    os.chdir(request["folder"])
    for kind, count in request["stops"].items():
        _STOPS[kind](count)
    for kind, value in request["limits"].items():
        limit(kind, value)
    # The arguments came through JSON, where a name that is no UTF-8 has surrogates, as in sys.argv.
    main = main_function()
    try:
        main([*request["arguments"]])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(request: dict[str, Any]) -> None:
    """All that the forked process does: what the interpreter does around a program, then its end."""
    status = 99
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)  # no command outlives a server that was killed
        os.closerange(3, 256)  # the server's
        atexit._clear()  # as well
        status = command(request)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)


class Server:
    """Children by their number, each with a descriptor that becomes readable when it ends."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self.requests, self.answers = requests, answers
        self.children: dict[int, tuple[int, int]] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(requests, selectors.EVENT_READ)

    def answer(self, **document: Any) -> None:
        self.answers.write(json.dumps(document).encode() + b"\n")
        self.answers.flush()

    def serve(self) -> None:
        """Until stdin is closed."""
        while True:
            for key, _ in self.selector.select():
                if key.data is not None:
                    self.ended(key.data)
                    continue
                line = self.requests.readline()
                if not line:
                    return
                self.obey(json.loads(line))

    def obey(self, request: dict[str, Any]) -> None:
        if "signal" not in request:
            self.start(request)
        elif request["number"] in self.children:  # not ended, so that the id is still its own
            os.kill(self.children[request["number"]][0], request["signal"])

    def start(self, request: dict[str, Any]) -> None:
        pid = os.fork()
        if pid == 0:
            child(request)
        descriptor = os.pidfd_open(pid)
        self.children[request["number"]] = pid, descriptor
        self.selector.register(descriptor, selectors.EVENT_READ, request["number"])
        self.answer(number=request["number"], pid=pid)

    def ended(self, number: int) -> None:
        pid, descriptor = self.children.pop(number)
        self.selector.unregister(descriptor)
        os.close(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.answer(number=number, status=status)


def main() -> None:
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    load()
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that the two share
    server = Server(os.fdopen(os.dup(0), "rb", buffering=0), answers)
    server.answer(ready=True)
    server.serve()


if __name__ == "__main__":
    main()
