"""Replace functions of an installed tool for the length of a block: known sources, agreement and restoration."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from importlib import metadata
from types import FunctionType, ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .known_sources import KNOWN_SOURCES


@dataclass(frozen=True)
class Releases:
    """distribution: its name for pip. tested: releases that were run with our kernels, the oldest first."""

    distribution: str
    tested: tuple[str, ...]


SUPPORTED = {
    "llm-compressor": Releases("llmcompressor", ("0.14.0", "0.14.0.1")),
    "gptqmodel": Releases("gptqmodel", ("7.7.0",)),
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
    """A function of a tool: `name` in the namespace of the module or class `owner`."""

    owner: ModuleType | type
    name: str

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


def installed_release(tool: str) -> str:
    """Return the tool's installed version. InputError: it is not installed."""
    releases = SUPPORTED[tool]
    try:
        return metadata.version(releases.distribution)
    except metadata.PackageNotFoundError:
        wanted = f"{releases.distribution}=={releases.tested[-1]}"
        raise InputError(f"{tool} is not installed here; pip install {wanted}") from None


def refusal(tool: str, what: str) -> InputError:
    """The error for a tool that is not what its version says: another patch, or a changed source."""
    return InputError(
        f"{tool}: {what}; nothing was replaced: remove what else changes {tool}, or run without pyprune.integrations"
    )


def fingerprint(function: FunctionType) -> str:
    """Hash the source of a function, decorators included: 16 hexadecimal digits."""
    return hashlib.sha256(textwrap.dedent(inspect.getsource(function)).encode()).hexdigest()[:16]


def source_name(function: FunctionType) -> str:
    """Name a function by where its source stands: package.module.Class.function."""
    return f"{function.__module__}.{function.__qualname__}"


def original_functions(tool: str, points: Sequence[PatchPoint]) -> list[FunctionType]:
    """Return the functions at the patch points.

    Raises:
        InputError: one is missing, wrapped by something else, or not one that was tested (`known_sources.py`).
    """
    functions = []
    for point in points:
        function = vars(point.owner).get(point.name)
        if not isinstance(function, FunctionType):
            raise refusal(tool, f"{point} is no function")
        if not _is_known(tool, function):
            tested = ", ".join(SUPPORTED[tool].tested)
            raise refusal(tool, f"{point} of {installed_release(tool)} is not the one of the tested releases {tested}")
        functions.append(function)
    return functions


def _is_known(tool: str, function: FunctionType) -> bool:
    """Whether a function is a tested one, with no wrapper but the standard library's context manager."""
    inner = inspect.unwrap(function)
    if function is not inner and function.__code__.co_filename != contextmanager.__code__.co_filename:
        return False
    try:
        return fingerprint(inner) in KNOWN_SOURCES[tool].get(source_name(inner), ())
    except OSError:  # there is no source: it was made at run time
        return False


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
