"""A run: the document that grows by one row at a time, what a resumed one holds already, and the page beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..ops import tuning
from ..runtime.files import write_json
from ..runtime.names import split_names
from ..runtime.progress import Progress
from .case import Case
from .machine import describe_machine
from .page import write_page
from .rates import Rates, measure_rates
from .results import (
    Document,
    file_name,
    new_document,
    of_one_origin,
    read_document,
    read_documents,
    row_line,
)
from .runner import Runner
from .timing import Timer

REPEAT = {"cuda": 30, "cpu": 5}
RATE_REPEAT = 5


class Run:
    """options: those of the command; files: earlier results for the page. InputError for what does not fit."""

    def __init__(self, device: torch.device, options: dict[str, Any], files: Sequence[Path]) -> None:
        self.device, self.options = device, options
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.earlier = read_documents(files)
        self.machine = describe_machine(device)
        self.tuned = tuning.describe_table(device)
        self.output = self._output()
        self.document: Document | None = self._begun()

    def _output(self) -> Path | None:
        output: Path | None = self.options["output"]
        if self.options["resume"] and output is None:
            raise InputError("--resume goes on with a result: name it with --output")
        if output is None:
            if self.options["history"]:
                raise InputError("--history is for the page: name a result with --output")
            return None
        if output.suffix == ".json" and not output.is_dir():
            return output
        if output.suffix and not output.is_dir():
            raise InputError(f"{output}: --output is a FILE.json or a folder")
        begun = [path for path in sorted(output.glob("*.json"), reverse=True) if self._goes_on(path)]
        return begun[0] if begun else output / file_name(self.machine)

    def _goes_on(self, path: Path) -> bool:
        return self.options["resume"] and not of_one_origin(read_document(path), self.machine, self.tuned)

    def _begun(self) -> Document | None:
        """Read the output that an earlier run began on this machine and version."""
        if self.output is None or not self.options["resume"] or not self.output.exists():
            return None
        document = read_document(self.output)
        differing = of_one_origin(document, self.machine, self.tuned)
        if differing:
            raise InputError(
                f"{self.output}: of another machine or version ({'; '.join(differing)}): name another --output, "
                "or leave --resume out to replace it"
            )
        return document

    def measure(self, cases: Sequence[Case], show: Callable[[str], None], progress: Progress) -> list[str]:
        """Time the rows that the document lacks, and write it after each. Returns the ids of those not correct."""
        timer = Timer(self.device, self.options["repeat"] or REPEAT[self.device.type])
        progress("benchmark: rates", 0, len(cases))
        if self.document is None:
            rates = measure_rates(Timer(self.device, RATE_REPEAT))
            self.document = new_document(self.machine, self.device.type, rates.document(), self.tuned)
        rates = Rates(**self.document["rates"])
        runner = Runner(self.device, timer, rates, split_names(self.options["backend_names"]), self.options["compiled"])
        # Rows that were not correct are tried again.
        held = {row["id"]: row for row in self.document["rows"] if not row["faults"]}
        self.document["rows"] = list(held.values())
        faults = []
        for number, case in enumerate(cases):
            progress(f"benchmark: {case.id}", number, len(cases))
            if case.id not in held:
                row = runner.row(case)
                self.document["rows"].append(row)
                self.write()
                show(row_line(row))
                faults += [case.id] if row["faults"] else []
        self.write()
        progress("benchmark: done", len(cases), len(cases))
        return faults

    def write(self) -> None:
        if self.output is not None and self.document is not None:
            write_json(self.document, self.output)

    def write_page(self) -> Path | None:
        """Write the page beside the output; None where there is no output or no row."""
        if self.output is None or self.document is None or not self.document["rows"]:
            return None
        others = [document for document in self.earlier if document["machine"] != self.machine]
        page = self.output.with_suffix(".html")
        documents = sorted([*others, self.document], key=lambda document: document["machine"]["date"])
        write_page(documents, page)
        return page
