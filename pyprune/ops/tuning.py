"""The table of Triton configurations that `pyprune tune` found faster than the shipped ones on this GPU.

    format        1
    kind          "pyprune tuning"
    gpu, capability, triton     what it holds for: the GPU's name, its compute capability [major, minor], the version
    date, pyprune               when and by which version it was made
    entries       one for each operator and size of an element that gained by more than noise:
        operator, element_size      channel_moments or hessian; bytes of an element of x (rows on 16 bytes)
        kernels                     fingerprint of the operator's kernel file
        configuration               the fields of that file's Configuration
        gain, error, shapes         times faster than the shipped one, the standard error of that, by shape

It lies in $XDG_CACHE_HOME/pyprune/tuning (~/.cache/pyprune/tuning), one file a GPU. PYPRUNE_TUNING names another file,
or is `off`. A table that does not fit this GPU, Triton or the kernels is ignored with one warning; one that
PYPRUNE_TUNING names is an InputError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import InputError
from ..runtime.files import stem_of, write_json

logger = logging.getLogger(__name__)

FORMAT, KIND = 1, "pyprune tuning"
ENVIRONMENT_VARIABLE = "PYPRUNE_TUNING"
OFF = "off"
# operator -> those whose configurations its launch reads: the sums of a Hessian are cut as the moments are.
OPERATORS = {"channel_moments": ("channel_moments",), "hessian": ("hessian", "channel_moments")}

C = TypeVar("C")
Entry = dict[str, Any]


@dataclass(frozen=True)
class Gpu:
    """GPU and versions that a table is valid for."""

    name: str
    capability: tuple[int, int]


@cache
def gpu_of(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, (properties.major, properties.minor))


def gpu_here(device: torch.device | None = None) -> Gpu | None:
    """The device's GPU, the current one's for None; None for a CPU and where there is no GPU."""
    if (device is not None and device.type != "cuda") or not torch.cuda.is_available():
        return None
    return gpu_of(torch.cuda.current_device() if device is None or device.index is None else device.index)


def setting() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "")


def table_file(gpu: Gpu) -> Path:
    """Path of a GPU's table, whether or not it exists."""
    if setting() not in ("", OFF):
        return Path(setting()).expanduser()
    return table_in(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), gpu.name)


@cache  # every launch asks
def table_in(cache_folder: str, gpu_name: str) -> Path:
    return Path(cache_folder) / "pyprune" / "tuning" / f"{stem_of(gpu_name)}.json"


def tuned_configuration(
    operator: str,
    kind: type[C],
    capability: tuple[int, int],
    element_size: int,
    device: torch.device | None = None,
) -> C | None:
    """The table's entry as a `kind`, the kernel file's Configuration; None: the shipped one is to be used.

    device: whose table is meant, None the current one's. None too if that is no GPU of this compute capability.
    """
    gpu = gpu_here(device)
    if gpu is None or gpu.capability != tuple(capability) or setting() == OFF:
        return None
    entry = entries_in_use(gpu, table_file(gpu), bool(setting())).get((operator, element_size))
    return None if entry is None else configuration_of(entry, kind)


@cache
def entries_in_use(gpu: Gpu, file: Path, named: bool) -> dict[tuple[str, int], Entry]:
    """Read the entries by operator and element size. `named` (by PYPRUNE_TUNING): a faulty table is an error.

    Read once: a table that changes while a process runs would change its results.
    """
    if not named and not os.path.exists(file):  # Path.exists raises where a folder may not be read
        return {}
    try:
        return read_table(file, gpu)
    except InputError as error:
        if named:
            raise InputError(f"{ENVIRONMENT_VARIABLE}: {error}") from error
        logger.warning("tuned configurations are ignored, `pyprune tune` makes new ones: %s", error)
        return {}


def read_table(file: Path, gpu: Gpu) -> dict[tuple[str, int], Entry]:
    """InputError for what is no table, or not one for this GPU, this Triton and these kernels."""
    try:
        table = json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(table, dict) or table.get("kind") != KIND or table.get("format") != FORMAT:
        raise InputError(f"{file}: not a table of format {FORMAT}")
    here = {"gpu": gpu.name, "capability": list(gpu.capability), "triton": triton_version()}
    for name, value in here.items():
        if table.get(name) != value:
            raise InputError(f"{file}: made for {name} {table.get(name)}, this is {value}")
    entries = table.get("entries")
    if not isinstance(entries, list):
        raise InputError(f"{file}: it has no list of entries")
    return {key_of(entry, file): entry for entry in entries}


def key_of(entry: Any, file: Path) -> tuple[str, int]:
    """Check an entry and return its key. InputError: it does not hold."""
    if not isinstance(entry, dict) or entry.get("operator") not in OPERATORS:
        raise InputError(f"{file}: an entry is of no operator that is tuned ({', '.join(OPERATORS)})")
    operator = entry["operator"]
    if entry.get("kernels") != kernels_fingerprint(operator):
        raise InputError(f"{file}: made for other kernels of {operator} than these")
    try:
        configuration_of(entry, configuration_class(operator))
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: the configuration of {operator} is malformed ({error})") from error
    if entry.get("element_size") not in (2, 4):
        raise InputError(f"{file}: elements of {operator} have 2 or 4 bytes, not {entry.get('element_size')!r}")
    return operator, entry["element_size"]


def configuration_of(entry: Entry, kind: type[C]) -> C:
    """TypeError or ValueError for fields that are not those of a Configuration: positive whole numbers and flags."""
    values = entry["configuration"] if isinstance(entry.get("configuration"), dict) else {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        wanted = bool if field.type in (bool, "bool") else int
        value = values.get(field.name)
        if type(value) is not wanted or (wanted is int and value < 1):
            raise ValueError(f"{field.name} is {value!r}")
    return kind(**values)


def configuration_class(operator: str) -> type:
    return importlib.import_module(f"pyprune.triton_kernels.{operator}").Configuration


@cache
def kernels_fingerprint(operator: str) -> str:
    spec = importlib.util.find_spec(f"pyprune.triton_kernels.{operator}")
    assert spec is not None
    assert spec.origin is not None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]


@cache
def triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def fingerprint(entries: Iterable[Entry]) -> str:
    chosen = sorted(json.dumps([e["operator"], e["element_size"], e["configuration"]], sort_keys=True) for e in entries)
    return hashlib.sha256("\n".join(chosen).encode()).hexdigest()[:12]


def in_use(device: torch.device | None) -> list[Entry]:
    gpu = gpu_here(device)
    if gpu is None or setting() == OFF:
        return []
    return list(entries_in_use(gpu, table_file(gpu), bool(setting())).values())


def operator_fingerprint(operator: str, device: torch.device) -> str | None:
    """Fingerprint of the tuned entries that the operator's Triton results depend on; None: the shipped table.

    InputError as tuned_configuration.
    """
    own = [entry for entry in in_use(device) if entry["operator"] in OPERATORS.get(operator, ())]
    return fingerprint(own) if own else None


def describe_table(device: torch.device | None) -> dict[str, str] | None:
    """The file in use and a fingerprint of its entries; None where the shipped configurations are."""
    gpu, own = gpu_here(device), in_use(device)
    if gpu is None or not own:
        return None
    return {"file": str(table_file(gpu)), "fingerprint": fingerprint(own)}


def describe_tables() -> dict[str, str]:
    """Describe for `pyprune backends`, by GPU, the tuned operators and their gains. Empty without a GPU."""
    facts = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        gains = [
            f"{entry['operator']} of {entry['element_size']} bytes {entry['gain']:.3f} x" for entry in in_use(device)
        ]
        none = f"off ({ENVIRONMENT_VARIABLE})" if setting() == OFF else "none: `pyprune tune` looks for faster ones"
        found = f"{', '.join(gains)} ({table_file(gpu_of(index))})" if gains else none
        facts[f"tuned configurations, cuda:{index}"] = found
    return facts


def write_table(gpu: Gpu, entries: Iterable[Entry], date: str) -> Path:
    """Replace the GPU's table, whole or not at all."""
    from .. import __version__

    file = table_file(gpu)
    table = {
        "format": FORMAT,
        "kind": KIND,
        "gpu": gpu.name,
        "capability": list(gpu.capability),
        "triton": triton_version(),
        "date": date,
        "pyprune": __version__,
        "entries": sorted(entries, key=lambda entry: (entry["operator"], entry["element_size"])),
    }
    write_json(table, file)
    entries_in_use.cache_clear()
    return file
