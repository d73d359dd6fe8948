"""What does not fit is a ValueError that names it: every argument of every operator, by the operators' own schemas."""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.operator_calls import recorded_calls, strided
from support.operator_cases import CASES, wave
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pyprune import ops
from pyprune.ops.checks import MOST_STEPS, check_apart, overlap, repeats


@dataclass(frozen=True)
class Call:
    """A valid call. arguments: by name; changed: names of those that are written to."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    changed: frozenset[str]

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.arguments.items() if isinstance(x, Tensor)}

    def with_(self, **replaced: Tensor) -> tuple[Tensor, ...]:
        """The results, what was changed included, of a call with other arguments here, which are not copied."""
        own = {
            name: replaced[name] if name in replaced else x.clone() if isinstance(x, Tensor) else x
            for name, x in self.arguments.items()
        }
        result = self.function(*own.values())
        returned = result if isinstance(result, tuple) else (result,)
        return (*(x for x in returned if isinstance(x, Tensor)), *(own[name] for name in sorted(self.changed)))

    def tried(self, **replaced: Tensor) -> tuple[Tensor, ...] | ValueError:
        try:
            return self.with_(**replaced)
        except ValueError as error:
            return error

    def refused(self, name: str, **replaced: Tensor) -> None:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            self.with_(**replaced)


def calls() -> Iterator[tuple[str, Call]]:
    for operator, (values, keywords) in recorded_calls().items():
        schema = operator._schema.arguments
        names = [argument.name for argument in schema]
        arguments = dict(zip(names, values, strict=False)) | keywords
        changed = {own.name for own in schema if own.alias_info is not None and own.alias_info.is_write}
        yield schema_name(operator), Call(operator, arguments, frozenset(changed))
    weight, factors = wave(5, 8), CASES["add_split_product"].inputs()
    product = dict(zip(("total", "left", "right"), factors, strict=True)) | {"alpha": 2.0}
    yield "add_split_product", Call(ops.add_split_product, product, frozenset({"total"}))
    yield "lower_gram", Call(ops.lower_gram, {"weight": weight}, frozenset())
    (h,), (a, g) = CASES["damped_inverse"].inputs(), CASES["eliminate"].inputs()
    yield "damped_inverse", Call(lambda h: ops.damped_inverse(h).inverse, {"h": h}, frozenset())
    yield "inverse_factor", Call(lambda h: ops.inverse_factor(h).factor, {"h": h}, frozenset())
    found = ops.eliminate(a.clone(), g.clone(), 3)
    yield "refit", Call(lambda weight: ops.refit(weight, found), {"weight": weight}, frozenset())
    blocks = {"a": a, "g": g, "width": 2}
    yield "grouped_cholesky_errors_reference", Call(ops.grouped_cholesky_errors_reference, blocks, frozenset())
    state = {"x": weight, "count": 0, "mean": torch.zeros(8), "m2": torch.zeros(8)}
    yield "moments_reference", Call(ops.channel_moments_update_reference, state, frozenset({"mean", "m2"}))


def schema_name(operator: Any) -> str:
    return operator._schema.name.removeprefix("pyprune::")


CALLS = dict(calls())
ARGUMENTS = [(name, argument) for name, call in CALLS.items() for argument in call.tensors()]
PAIRS = [
    (name, changed, other)
    for name, call in CALLS.items()
    for changed, other in itertools.permutations(call.tensors(), 2)
    if changed in call.changed
]

# Any leading dimensions.
ANY_RANK = {("rms_norm", "x"), ("rms_norm_gather", "x"), ("hessian_update", "x"), ("channel_moments_update", "x"),
            ("moments_reference", "x")}  # fmt: skip

# Any number of channels: those that an index takes have to be there.
ANY_SIZE = {("lower_gram", "weight"), ("rms_norm_gather", "index"), ("scatter_add_", "residual"),
            ("scatter_add_rms_norm_gather_", "index")}  # fmt: skip

each_argument = pytest.mark.parametrize(("name", "argument"), ARGUMENTS)


def test_every_operator_is_here() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyprune::")}
    assert {name.removeprefix("pyprune::") for name in registered} <= CALLS.keys()
    functions = {name for name in ops.__all__ if name.islower() and not name.startswith("describe")}
    assert functions - {"channel_moments_update_reference", "use_backend"} <= CALLS.keys()
    assert all(call.with_() for call in CALLS.values())
    assert CALLS["eliminate"].changed == {"a", "g"}


@each_argument
def test_wrong_rank(name: str, argument: str) -> None:
    call = CALLS[name]
    x = call.arguments[argument]
    call.refused(argument, **{argument: x.flatten()[0]})
    for wrong in (x[None], x[0]):
        if (name, argument) in ANY_RANK:
            call.with_(**{argument: wrong})
        else:
            call.refused(argument, **{argument: wrong})


@each_argument
def test_wrong_size(name: str, argument: str) -> None:
    """One channel less or more than the others have; where there are no others, no square."""
    call = CALLS[name]
    x = call.arguments[argument]
    if (name, argument) in ANY_SIZE:
        call.with_(**{argument: x[..., 1:]})
        return
    call.refused(argument, **{argument: x[..., 1:].contiguous()})
    call.refused(argument, **{argument: torch.cat([x, x[..., :1]], -1)})


@each_argument
def test_wrong_type(name: str, argument: str) -> None:
    call = CALLS[name]
    x = call.arguments[argument]
    never = [torch.bool, torch.uint8, torch.int16, torch.complex64]
    floats = [torch.float8_e4m3fn, torch.float8_e5m2]
    for dtype in (*never, *floats, *([torch.int64] if x.is_floating_point() else [torch.float32])):
        call.refused(argument, **{argument: x.to(dtype)})
    call.refused(argument, **{argument: x.to_sparse()})
    for dtype in (torch.float64, torch.bfloat16) if x.is_floating_point() else (torch.int32,):
        found = call.tried(**{argument: x.to(dtype)})
        if isinstance(found, ValueError):
            assert re.search(rf"\b{argument}\b", str(found)), found
            continue
        for own, expected in zip(found, call.with_(), strict=True):  # right where types may be mixed
            torch.testing.assert_close(own.double(), expected.double(), rtol=0.05, atol=0.05)


@each_argument
def test_on_another_device(name: str, argument: str) -> None:
    call = CALLS[name]
    if len(call.tensors()) > 1 or name == "refit":
        call.refused(argument, **{argument: call.arguments[argument].to("meta")})


@pytest.mark.parametrize("name", [*(name for name in CALLS if name in dir(torch.ops.pyprune)), "add_split_product",
                                  "lower_gram", "moments_reference"])  # fmt: skip
def test_without_memory(name: str) -> None:
    """On meta, and of fake tensors: shapes and types of the results, and nothing is taken for memory in common."""
    call = CALLS[name]
    real = call.with_()
    for found in (call.with_(**{own: x.to("meta") for own, x in call.tensors().items()}), faked(call)):
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in real]


def faked(call: Call) -> tuple[Tensor, ...]:
    with FakeTensorMode() as mode:
        return call.with_(**{own: mode.from_tensor(x) for own, x in call.tensors().items()})


def odd_views(x: Tensor) -> dict[str, Tensor]:
    """x, or a constant of its shape, in memory that is not dense; the last three share elements."""
    views = {"apart": strided(x)}
    constant = x.flatten()[:1].clone()
    if x.dim() > 1:
        views["transposed"] = x.mT.contiguous().mT
        sizes = sum(x.shape)
        views["windows"] = constant.repeat(sizes).as_strided(x.shape, [1] * x.dim())
        views["repeated rows"] = x[:1].expand(x.shape) if x.dim() == 2 and len(x) != x.shape[1] else views["windows"]
    if x.is_floating_point():  # an index has no value twice
        views["constant"] = constant.expand(x.shape)
    return views


@each_argument
def test_odd_strides(name: str, argument: str) -> None:
    """The value of dense memory, or refused by name; where elements that are written to are one, refused."""
    call = CALLS[name]
    for kind, view in odd_views(call.arguments[argument]).items():
        if argument in call.changed and kind not in ("apart", "transposed"):
            call.refused(argument, **{argument: view})
            continue
        dense = call.with_(**{argument: view.clone(memory_format=torch.contiguous_format)})
        found = call.tried(**{argument: view})
        if isinstance(found, ValueError):
            assert re.search(rf"\b{argument}\b.*contiguous", str(found)), found
            continue
        for own, expected in zip(found, dense, strict=True):
            torch.testing.assert_close(own, expected, equal_nan=True)


@pytest.mark.parametrize(("name", "changed", "other"), PAIRS)
def test_what_is_changed_lies_apart(name: str, changed: str, other: str) -> None:
    """One byte in common is too much, and nothing is written before that is known; side by side is fine."""
    call = CALLS[name]
    x, y = call.arguments[changed], call.arguments[other]
    start, step = 4096, y.element_size()
    overlapping = {start, start - y.nbytes + step, (start + x.nbytes - 1) // step * step}
    beside = {start - y.nbytes, -(-(start + x.nbytes) // step) * step}
    for place in (*overlapping, *beside):
        memory = torch.zeros(8192 + y.nbytes, dtype=torch.uint8)
        own, second = (
            memory[at : at + like.nbytes].view(like.dtype).view(like.shape).copy_(like)
            for at, like in ((start, x), (place, y))
        )
        before = memory.clone()
        if place in overlapping:
            with pytest.raises(ValueError, match=rf"\b{changed}\b.*\b{other}\b|\b{other}\b.*\b{changed}\b"):
                call.with_(**{changed: own, other: second})
            assert torch.equal(memory, before)
        else:
            for found, expected in zip(call.with_(**{changed: own, other: second}), call.with_(), strict=True):
                torch.testing.assert_close(found, expected)


def test_columns_of_one_matrix_lie_apart() -> None:
    """gate | up and residual | update as products leave them: between each other's elements, on none of them."""
    both = wave(4, 10)
    gate, up = both.clone().chunk(2, dim=-1)
    ops.swiglu_(gate, up)
    torch.testing.assert_close(gate, torch.nn.functional.silu(both[:, :5]) * both[:, 5:])
    stream, index = both.clone(), torch.tensor([0, 5])
    ops.scatter_add_(stream[:, :8], stream[:, 8:], index)
    assert torch.equal(stream[:, index], both[:, index] + both[:, 8:])
    with pytest.raises(ValueError, match="residual and update"):
        ops.scatter_add_(stream[:, :9], stream[:, 8:], index)


def random_view(memory: Tensor, generator: random.Random) -> Tensor:
    dtype = generator.choice([torch.uint8, torch.bfloat16, torch.float32, torch.int64])
    elements = memory.view(dtype)
    sizes = [generator.choice([0, 1, 2, 3, 4]) for _ in range(generator.randint(0, 3))]
    strides = [generator.choice([0, 1, 2, 3, 5, 7, 8, 16]) for _ in sizes]
    reached = sum(max(size - 1, 0) * stride for size, stride in zip(sizes, strides, strict=True))
    if reached >= len(elements):
        return random_view(memory, generator)
    return elements.as_strided(sizes, strides, generator.randrange(len(elements) - reached))


def bytes_of(x: Tensor) -> list[list[int]]:
    """The bytes of each element, counted one by one."""
    places = itertools.product(*(range(size) for size in x.shape))
    offsets = [sum(i * stride for i, stride in zip(place, x.stride(), strict=True)) for place in places]
    first = [x.data_ptr() + offset * x.element_size() for offset in offsets]
    return [list(range(start, start + x.element_size())) for start in first]


def test_common_memory_is_found_exactly() -> None:
    """Against bytes counted one by one, over random views of 256 bytes."""
    generator, memory = random.Random(0), torch.zeros(256, dtype=torch.uint8)
    answers = set()
    for _ in range(3000):
        x, y = random_view(memory, generator), random_view(memory, generator)
        own, other = ([byte for element in bytes_of(view) for byte in element] for view in (x, y))
        common = bool(set(own) & set(other))
        itself = len(set(own)) < len(own)
        assert repeats(x) == itself
        answers.add((common, itself))
        if itself or common:
            with pytest.raises(ValueError, match="x"):
                check_apart("test", {"x": x}, {"y": y})
        else:
            check_apart("test", {"x": x}, {"y": y})
    assert len(answers) == 4


def test_a_long_search_counts_as_common() -> None:
    """Σ of even strides never is odd, which no bound on sums tells: given up on, in bounded time."""
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    sizes, strides = [40] * 6, [2 * prime for prime in (101, 103, 107, 109, 113, 127)]
    x, y = memory.as_strided(sizes, strides), memory[1:].as_strided(sizes, strides[::-1])
    assert math.prod(sizes) > MOST_STEPS
    assert overlap(x, memory.as_strided([2], [1], 2 * 101))
    assert overlap(x, y)
