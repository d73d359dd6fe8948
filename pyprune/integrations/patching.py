"""Replacing functions of an installed tool for the length of a block: versions, signatures and restoration."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from importlib import metadata
from types import FunctionType, ModuleType, TracebackType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class VersionRange:
    """distribution: its name for pip. first, last: the oldest and the newest release tested; both are supported."""

    distribution: str
    first: str
    last: str


SUPPORTED = {
    "llm-compressor": VersionRange("llmcompressor", "0.14.0", "0.14.0.1"),
    "gptqmodel": VersionRange("gptqmodel", "7.7.0", "7.7.0"),
}

# float32 on four to eight channels with condition numbers below 1e3: a thousandth is a thousand times their rounding,
# and a forgotten factor, transpose or shift is far beyond it.
AGREEMENT = 1e-3

# Held by the block that replaces functions of the tool: a second block would take the first one's for the originals.
BLOCKS = {tool: threading.Lock() for tool in SUPPORTED}

COUNTING = threading.Lock()


@dataclass
class Calls:
    """Count the calls that replaced the tool's own: Hessian updates, and factors of inverses."""

    hessian_updates: int = 0
    inverse_factors: int = 0

    def count(self, hessian_updates: int = 0, inverse_factors: int = 0) -> None:
        """More of them; tools work in several threads."""
        with COUNTING:
            self.hessian_updates += hessian_updates
            self.inverse_factors += inverse_factors


@dataclass(frozen=True)
class PatchPoint:
    """A function of a tool: `name` in the namespace of the module or class `owner`, with these parameters."""

    owner: ModuleType | type
    name: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


class Acceleration(AbstractContextManager[Calls]):
    """`with` replaces the tool's functions; a second block of the tool inside, in any thread, is an InputError."""

    def __init__(self, tool: str, block: Callable[[], AbstractContextManager[Calls]]) -> None:
        self._tool, self._make_block = tool, block
        self._entered: AbstractContextManager[Calls] | None = None

    def __enter__(self) -> Calls:
        if not BLOCKS[self._tool].acquire(blocking=False):
            raise InputError(f"{self._tool} is accelerated already; leave the first block before entering another")
        try:
            self._entered = self._make_block()
            return self._entered.__enter__()
        except BaseException:
            BLOCKS[self._tool].release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entered, self._entered = self._entered, None
        if entered is None:
            raise RuntimeError(f"{self._tool}: this block was never entered")
        try:
            entered.__exit__(kind, error, traceback)
        finally:
            BLOCKS[self._tool].release()


def check_version(tool: str) -> str:
    """The tool's installed version; InputError where it is missing or was not tested."""
    releases = SUPPORTED[tool]
    wanted = f"'{releases.distribution}>={releases.first},<={releases.last}'"
    try:
        version = metadata.version(releases.distribution)
    except metadata.PackageNotFoundError:
        raise InputError(f"{tool} is not installed here; pip install {wanted}") from None
    if not Version(releases.first) <= Version(version) <= Version(releases.last):
        raise InputError(
            f"{tool} {version} is installed; pyprune replaces kernels in {releases.first} to {releases.last} only: "
            f"pip install {wanted}, or run without pyprune.integrations"
        )
    return version


def refusal(tool: str, what: str) -> InputError:
    """The error for a tool that is not what its version says: another patch, or a changed source."""
    return InputError(
        f"{tool}: {what}; nothing was replaced: remove what else changes {tool}, or run without pyprune.integrations"
    )


def original_functions(tool: str, points: Sequence[PatchPoint]) -> list[FunctionType]:
    """Return the functions at the patch points. InputError: one is missing, or takes other parameters than ours."""
    functions = []
    for point in points:
        function = vars(point.owner).get(point.name)
        if not isinstance(function, FunctionType):
            raise refusal(tool, f"{point} is no function")
        found = tuple(inspect.signature(function).parameters)
        if found != point.parameters:
            raise refusal(tool, f"{point} takes ({', '.join(found)}), not ({', '.join(point.parameters)})")
        functions.append(function)
    return functions


def check_agreement(tool: str, what: str, theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
    """InputError unless the tool computes, on a small example, what its replacement assumes."""
    for their_tensor, our_tensor in zip(theirs, ours, strict=True):
        same = their_tensor.shape == our_tensor.shape and torch.allclose(
            their_tensor.double(), our_tensor.double(), rtol=AGREEMENT, atol=AGREEMENT
        )
        if not same:
            raise refusal(tool, f"{what} does not compute what pyprune would put in its place")


@contextmanager
def patched(points: Sequence[PatchPoint], replacements: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Put the replacements in place; on the way out, whatever happened, the very originals."""
    originals = [vars(point.owner)[point.name] for point in points]
    try:
        for point, replacement in zip(points, replacements, strict=True):
            setattr(point.owner, point.name, replacement)
        yield
    finally:
        for point, original in zip(points, originals, strict=True):
            setattr(point.owner, point.name, original)


def with_names(function: FunctionType, **names: object) -> FunctionType:
    """The function with other global names, as its code and the functions made inside it see them.

    The way to a step within a long function: the function, its module and everybody else's `torch` stay as they are.
    """
    own = FunctionType(
        function.__code__,
        function.__globals__ | names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(own, function)
    return own
