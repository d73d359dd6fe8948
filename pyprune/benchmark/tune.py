"""`pyprune tune`: the search on this GPU, and the table that it leaves (pyprune/ops/tuning.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, VerificationError
from ..ops import tuning
from ..ops.dispatch import unmet_requirement
from ..ops.requirements import Problem
from ..runtime.device import select_device
from ..runtime.progress import Progress
from .case import normal
from .runner import first_line
from .search import Finding, Shape, Unusable, search
from .timing import Timer

if TYPE_CHECKING:
    from .configurations import Tunable

ELEMENTS = {2: torch.bfloat16, 4: torch.float32}
REPEAT, ROUNDS = 7, 25
# Calls whose bits must be equal: a race between copies and products shows as a difference.
CALLS = 3


@dataclass(frozen=True)
class Inputs:
    """Inputs of one shape: x, a state that is zeroed before each call, and the check of a state after x."""

    x: Tensor
    state: Tensor
    fault: Callable[[Tensor], str | None]


class GpuMeasure:
    """Times configurations of one operator on this device; each is checked before its first timing on a shape."""

    def __init__(self, tunable: Tunable, element_size: int, device: torch.device) -> None:
        self.tunable, self.dtype, self.device = tunable, ELEMENTS[element_size], device
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.timer = Timer(device, REPEAT)
        self.inputs: dict[Shape, Inputs] = {}
        self.checked: set[tuple[Any, Shape]] = set()

    def __call__(self, configurations: Sequence[Any], shape: Shape, final: bool) -> list[list[float]]:
        if shape not in self.inputs:
            x = normal(self.device, self.dtype, *shape)
            self.inputs[shape] = Inputs(x, self.tunable.state(shape[1], self.device), self.tunable.judge(x))
        own = self.inputs[shape]
        for configuration in configurations:
            if (configuration, shape) not in self.checked:
                self.check(configuration, own)
                self.checked.add((configuration, shape))
        times: list[list[Callable[[], float]]] = [[] for _ in configurations]
        for _ in range(ROUNDS if final else REPEAT):
            for reads, configuration in zip(times, configurations, strict=True):
                reads.append(self.timer.once(partial(self.run, configuration, own), own.state.zero_)[0])
        torch.cuda.synchronize(self.device)
        return [[read() for read in reads] for reads in times]

    def run(self, configuration: Any, own: Inputs) -> None:
        self.tunable.run(own.x, own.state, configuration, self.multiprocessors)

    def check(self, configuration: Any, own: Inputs) -> None:
        """Unusable: it does not compile or fit, is wrong against float64, or differs from call to call."""
        results = []
        try:
            for _ in range(CALLS):
                own.state.zero_()
                self.run(configuration, own)
                results.append(own.state.clone())
            torch.cuda.synchronize(self.device)
        except torch.AcceleratorError as error:
            raise VerificationError(f"{configuration}: the device no longer answers ({first_line(error)})") from error
        except Exception as error:  # of Triton's compiler and launcher, of many kinds
            raise Unusable(f"{type(error).__name__}: {first_line(error)}") from error
        # The part of a Hessian above the diagonal is unspecified, but follows from the same products.
        if not all(torch.equal(results[0], other) for other in results[1:]):
            raise Unusable("not the same bits from call to call")
        fault = own.fault(results[0])
        if fault is not None:
            raise Unusable(f"wrong result: {fault}")


def what_to_tune(device_name: str, operators: Sequence[str]) -> tuple[list[str], tuning.Gpu, torch.device]:
    """Operators (none named: all), GPU, device.

    InputError: an operator without configurations, no GPU or no Triton, or PYPRUNE_TUNING=off.
    """
    for name in operators:
        if name not in tuning.OPERATORS:
            raise InputError(f"unknown operator {name!r}: only {', '.join(tuning.OPERATORS)} have configurations")
    device = select_device(device_name)
    gpu = tuning.gpu_here(device)
    if gpu is None:
        raise InputError("pyprune tune times Triton's kernels on a CUDA device, and there is none here")
    if tuning.setting() == tuning.OFF:
        raise InputError(f"{tuning.ENVIRONMENT_VARIABLE} is {tuning.OFF}: unset it, or name a file to write")
    chosen = list(operators) or list(tuning.OPERATORS)
    for operator in chosen:
        problem = Problem(device, torch.bfloat16, (8, 8))
        unmet = unmet_requirement(operator, "triton", problem)
        if unmet is not None:
            raise InputError(f"{operator} has no Triton kernel to tune here: {unmet.reason(problem)}")
    return chosen, gpu, device


def tune_operators(
    operators: Sequence[str],
    gpu: tuning.Gpu,
    device: torch.device,
    quick: bool,
    show: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Search for every operator and size of an element, and write the table after each. Returns what was found."""
    torch.cuda.set_device(device)
    file = tuning.table_file(gpu)
    entries = held_entries(file, gpu, show)
    findings = []
    for operator in operators:
        for element_size in ELEMENTS:
            what = f"{operator}, {element_size} bytes"
            found = best_configuration(operator, element_size, gpu, device, quick, partial(progress, what))
            findings.append(record(operator, element_size, found))
            keep(entries, findings[-1])
            tuning.write_table(gpu, entries.values(), datetime.now(UTC).isoformat(timespec="seconds"))
            for line in finding_lines(what, found):
                show(line)
            torch.cuda.empty_cache()
    show(f"{len(entries)} tuned configurations in {file}")
    return {
        "gpu": gpu.name,
        "capability": list(gpu.capability),
        "triton": tuning.triton_version(),
        "file": str(file),
        "findings": findings,
    }


def best_configuration(
    operator: str,
    element_size: int,
    gpu: tuning.Gpu,
    device: torch.device,
    quick: bool,
    advance: Callable[[int, int], None],
) -> Finding[Any]:
    """VerificationError where the shipped configuration itself does not work."""
    from .configurations import TUNABLE

    tunable = TUNABLE[operator]
    shipped = tunable.shipped(gpu.capability, element_size)
    candidates = tunable.configurations(gpu.capability, element_size, quick)
    shapes, measure = tunable.shapes(element_size, quick), GpuMeasure(tunable, element_size, device)
    try:
        found = search(shipped, candidates, shapes, measure, lambda number: advance(number, len(candidates)))
    except Unusable as error:
        raise VerificationError(f"{operator}: the shipped configuration fails here: {error}") from error
    advance(len(candidates), len(candidates))
    return found


def held_entries(file: Path, gpu: tuning.Gpu, show: Callable[[str], None]) -> dict[tuple[str, int], tuning.Entry]:
    """Read the entries of a table that still holds; one that does not is replaced, and a line says so."""
    if not file.exists():
        return {}
    try:
        return tuning.read_table(file, gpu)
    except InputError as error:
        show(f"replaced: {error}")
        return {}


def record(operator: str, element_size: int, found: Finding[Any]) -> dict[str, Any]:
    """A finding as the document has it; an entry of the table is the same, without what was not taken."""
    return {
        "operator": operator,
        "element_size": element_size,
        "kernels": tuning.kernels_fingerprint(operator),
        "shipped": asdict(found.shipped),
        "configuration": asdict(found.best),
        "gain": round(found.gain.times, 4),
        "error": round(found.gain.error, 4),
        "shapes": {f"{rows}x{channels}": round(gain.times, 4) for (rows, channels), gain in found.by_shape.items()},
        "taken": found.taken,
        "skipped": [asdict(candidate) | {"reason": reason} for candidate, reason in found.skipped],
    }


def keep(entries: dict[tuple[str, int], tuning.Entry], finding: dict[str, Any]) -> None:
    """The table's entry: the new one, or none where the shipped configuration is as fast."""
    key = finding["operator"], finding["element_size"]
    entries.pop(key, None)
    if finding["taken"]:
        names = ("operator", "element_size", "kernels", "configuration", "gain", "error", "shapes")
        entries[key] = {name: finding[name] for name in names}


def finding_lines(what: str, found: Finding[Any]) -> list[str]:
    from .configurations import names_of

    lines = [f"{what}: skipped {names_of(candidate, [found.shipped])}: {reason}" for candidate, reason in found.skipped]
    gain = f"{found.gain.times:.3f} x the shipped one (standard error {found.gain.error:.3f})"
    best = names_of(found.best, [found.shipped])
    shapes = ", ".join(f"{rows}x{channels} {own.times:.3f}" for (rows, channels), own in found.by_shape.items())
    if found.taken:
        lines.append(f"{what}: {best}: {gain}; {shapes}")
    elif found.by_shape:
        lines.append(f"{what}: the shipped one stays; the best other, {best}, is {gain}, which is within noise or 1 %")
    else:
        lines.append(f"{what}: the shipped one stays; no other candidate is near it")
    return lines
