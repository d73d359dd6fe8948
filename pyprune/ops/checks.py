"""Argument checks of operators: a ValueError names the argument that is wrong.

Each check is a few comparisons on the host: none looks at values or waits for a device, and together they cost a small
part of a launch. All but `check_apart` hold of fake tensors too, and may be traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


@dataclass(frozen=True)
class Kind:
    """Types that an argument may have, and how a message says so."""

    dtypes: tuple[torch.dtype, ...]
    needed: str


FLOATS = Kind(
    (torch.bfloat16, torch.float16, torch.float32, torch.float64),
    "it needs a floating type: bfloat16, float16, float32 or float64",
)
WIDE = Kind((torch.float32, torch.float64), "use float32 or float64")
SINGLE = Kind((torch.float32,), "it needs torch.float32")
DOUBLE = Kind((torch.float64,), "it needs torch.float64")
INDICES = Kind((torch.int32, torch.int64), "it needs int32 or int64")

# Steps of the search for a byte that two views have in common; beyond, they count as overlapping. Views that nest, as
# parts of one tensor do, take a few steps a dimension.
MOST_STEPS = 1000


def check_kind(operator: str, name: str, x: Tensor, kind: Kind) -> None:
    if x.dtype not in kind.dtypes:
        raise ValueError(f"{operator}: {name} is {x.dtype}; {kind.needed}")
    if x.layout != torch.strided:
        raise ValueError(f"{operator}: {name} is {x.layout}; it needs to be a dense tensor")


def check_device(operator: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{operator}: {name} is on {x.device} and {other_name} on {other.device}")


def check_alike(operator: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both are of one dtype, device and layout."""
    if x.dtype != other.dtype or x.device != other.device or x.layout != other.layout:
        raise ValueError(
            f"{operator}: {name} is {x.dtype} on {x.device}, {x.layout}; {other_name} is {other.dtype} on "
            f"{other.device}, {other.layout}"
        )


def check_matrix(operator: str, name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{operator}: {name} is {list(x.shape)}; it needs to be a matrix")


def check_square(operator: str, name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.shape[0] != x.shape[1]:
        raise ValueError(f"{operator}: {name} is {list(x.shape)}; it needs to be a square matrix, [channels, channels]")


def check_rows(operator: str, name: str, x: Tensor) -> None:
    if x.dim() == 0:
        raise ValueError(f"{operator}: {name} is a scalar; it needs a last dimension of channels")


def check_contiguous(operator: str, name: str, x: Tensor, hint: str = "") -> None:
    if not x.is_contiguous():
        raise ValueError(f"{operator}: {name} has strides {list(x.stride())}; it needs to be contiguous{hint}")


def check_apart(operator: str, changed: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """ValueError where an argument that is changed lies, by a single byte, on another one or on itself.

    Of real memory only: nothing is asked of what is traced, of fake tensors and of those on meta.
    """
    if torch.compiler.is_compiling():
        return
    given = [(name, x) for name, x in (*changed.items(), *read.items()) if x is not None]
    if any(x.is_meta or isinstance(x, FakeTensor) for _, x in given):
        return
    arguments = [(name, x, *span_of(x)) for name, x in given]
    for place, (name, x, first, last) in enumerate(arguments):
        if name not in changed:
            return
        if not x.is_contiguous() and repeats(x):
            raise ValueError(
                f"{operator}: {name} {list(x.shape)} has strides {list(x.stride())}, with which elements are the same "
                "memory; it is changed, and each needs memory of its own"
            )
        for other_name, other, other_first, other_last in arguments[place + 1 :]:
            if first < other_last and other_first < last and overlap(x, other):
                raise ValueError(
                    f"{operator}: {name} and {other_name} are the same memory, in part at least; {name} is changed and "
                    "needs memory of its own"
                )


def span_of(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last; strides are never negative in PyTorch."""
    first = x.data_ptr()
    if x.is_contiguous():
        return first, first + x.nbytes
    if x.numel() == 0:
        return first, first
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return first, first + (last + 1) * x.element_size()


def repeats(x: Tensor) -> bool:
    """Return whether two elements of x are the same memory."""
    dimensions = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    if x.numel() == 0 or nested(dimensions):
        return False
    # Two elements that differ in dimension k and in none before it, by distances d: Σ stride·d = 0, d_k > 0.
    return any(
        reaches(0, 0, [(stride, 1, size - 1), *((s, 1 - n, n - 1) for s, n in dimensions[k + 1 :])])
        for k, (stride, size) in enumerate(dimensions)
    )


def nested(dimensions: Sequence[tuple[int, int]]) -> bool:
    """Return whether each (stride, size), by increasing strides, steps beyond all that the ones before reach."""
    reached = 0
    for stride, size in dimensions:
        if stride <= reached:
            return False
        reached += stride * (size - 1)
    return True


def overlap(x: Tensor, y: Tensor) -> bool:
    """Return whether any byte of an element of x is one of y, whose spans overlap. True where the search is long."""
    if x.is_contiguous() and y.is_contiguous():
        return True
    # The address of an element of x − that of one of y, strides in bytes. Dimensions of the same stride are one.
    ranges: dict[int, list[int]] = {}
    for own, sign in ((x, 1), (y, -1)):
        for size, stride in zip(own.shape, own.stride(), strict=True):
            low_high = ranges.setdefault(stride * own.element_size(), [0, 0])
            low_high[sign > 0] += sign * (size - 1)
    distance = x.data_ptr() - y.data_ptr()
    terms = [(stride, low, high) for stride, (low, high) in ranges.items()]
    return reaches(1 - x.element_size() - distance, y.element_size() - 1 - distance, terms)


def reaches(low: int, high: int, terms: Sequence[tuple[int, int, int]]) -> bool:
    """Return whether Σ stride·k is in [low, high] for integers k of each (stride, least k, largest k), strides ≥ 0.

    From the largest stride down, and only with what the smaller ones can still make up for.
    """
    ordered = sorted(terms, reverse=True)
    least, most = [0], [0]  # what the last 0, 1, … terms reach together
    for stride, first, last in reversed(ordered):
        least.append(least[-1] + stride * first)
        most.append(most[-1] + stride * last)
    tried = [(len(ordered), low, high)]
    for _ in range(MOST_STEPS):
        if not tried:
            return False
        left, low, high = tried.pop()
        if most[left] < low or least[left] > high:
            continue
        if left == 0:
            return True
        stride, first, last = ordered[-left]
        if stride == 0:
            last = first
        else:
            first = max(first, -((most[left - 1] - low) // stride))
            last = min(last, (high - least[left - 1]) // stride)
        choices = range(first, last + 1)[:MOST_STEPS]
        tried += [(left - 1, low - stride * k, high - stride * k) for k in choices]
    return True
