"""What holds of every public operator: README, torch.compile, opcheck, strides, CUDA graphs, gradients."""

import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.operator_calls import recorded_calls, strided
from support.operator_cases import CASES, Case, Tensors, assert_exact, wave
from torch import Tensor

from pyprune import ops

README = (Path(ops.__file__).parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda code: f"line {README[: README.index(code)].count(chr(10)) + 1}"
)
def test_examples(example: str) -> None:
    assert "assert" in example
    with mock.patch.dict(os.environ):
        exec(compile(example, "README.md", "exec"), {"__name__": "example"})


def test_every_public_name_is_described_and_shown() -> None:
    operators = [name for name in ops.__all__ if callable(getattr(ops, name))]
    assert all(len(getattr(ops, name).__doc__) > 40 for name in operators)
    assert len({getattr(ops, name).__doc__ for name in operators}) == len(operators)
    results = {"DampedInverse", "Elimination", "InverseFactor"}
    for name in ops.__all__:
        assert f"`{name}" in README
        assert name in results or any(re.search(rf"\b{name}\b", code) for code in EXAMPLES), name


def test_opcheck_of_every_operator() -> None:
    recorded = recorded_calls()
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyprune::")}
    assert {operator.overloadpacket._qualified_op_name.split("::")[1] for operator in recorded} == names
    for operator, (arguments, keywords) in recorded.items():
        torch.library.opcheck(operator, arguments, keywords)


@each_case
def test_compiles_as_one_graph(case: Case) -> None:
    torch.compiler.reset()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    if not case.compiles:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(*case.inputs())
        return
    for found, eager in zip(compiled(*case.inputs()), case.run(*case.inputs()), strict=True):
        assert torch.equal(found, eager)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    def step(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        gate = gate + 1
        ops.swiglu_(gate, up * 2)
        return ops.rms_norm(gate, weight, 1e-6) - 1

    torch.compiler.reset()
    arguments = [torch.randn(5, 16), torch.randn(5, 16), torch.randn(16)]
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*arguments), step(*arguments))


# Arguments that have to be contiguous, or their rows: others are refused by name.
CONTIGUOUS = {
    "channel_moments_update": (2, 3),
    "eliminate": (0, 1),
    "eliminate, units of 2": (0, 1),
    "grouped_cholesky_errors": (0, 1),
    "grouped_cholesky_errors, diagonal": (0, 1),
    "hessian_finish": (0, 1),
    "hessian_update": (1, 2),
    "refit": (1, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_any_strides(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    for place in CONTIGUOUS.get(name, ()):
        wrong = [strided(x) if own == place else x for own, x in enumerate(case.inputs())]
        with pytest.raises(ValueError, match=r"contiguous"):
            case.run(*wrong)
    views = [x if place in CONTIGUOUS.get(name, ()) else strided(x) for place, x in enumerate(inputs)]
    assert_exact(case, case.run(*views))


IN_PLACE = {"channel_moments_update", "hessian_finish", "hessian_update", "rotate_", "scatter_add_", "swiglu_"}


@pytest.mark.parametrize("name", sorted({*IN_PLACE, "rms_norm", "sparsify_", "spd_inverse", "grouped_cholesky_errors"}))
def test_gradients_are_as_described(name: str) -> None:
    """In place, as if nothing had changed: 1 or 0 of every element, of their sum; else an error."""
    case = CASES[name]
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in case.inputs()]
    total = sum(x.sum() for x in case.run(*inputs) if x.requires_grad)
    if name in IN_PLACE:
        total.backward()
        assert all(((x.grad == 0) | (x.grad == 1)).all() for x in inputs if x.grad is not None)
    else:
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            total.backward()


def bfloat16_hessian() -> Tensors:
    return wave(300, 256).bfloat16(), torch.zeros(256, 256), torch.zeros(256)


def large_hessian() -> Tensors:
    x = wave(2200, 1100)
    return (x.mT @ x,)


def large_elimination() -> Tensors:
    (h,) = large_hessian()
    return torch.linalg.inv(h).contiguous(), h[:300].mT @ h[:300] / 1e6


def eliminated(a: Tensor, g: Tensor) -> Tensors:
    found = ops.eliminate(a, g, 200)
    return found.order, found.errors, found.factor


# Sizes that other kernels take than those of the cases, or the same ones in several launches.
LARGE: dict[str, tuple[Any, Any]] = {
    "hessian_update, bfloat16": (bfloat16_hessian, CASES["hessian_update"].run),
    "spd_inverse, swept": (large_hessian, lambda h: ops.spd_inverse(h, 10.0)),
    "spd_inverse_factor, swept": (large_hessian, lambda h: ops.spd_inverse_factor(h, 10.0)),
    "eliminate, panels": (large_elimination, eliminated),
}
GRAPHS = LARGE | {
    name: (case.inputs, case.run) for name, case in CASES.items() if not case.waits and not name.endswith("_reference")
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_has_the_bits_of_eager_calls(name: str) -> None:
    make, run = GRAPHS[name]
    inputs = [x.cuda() for x in make()]
    eager = run(*(x.clone() for x in inputs))
    own = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up on the stream that is captured
        run(*(x.clone() for x in inputs))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = run(*own)
    for _ in range(2):
        for held, x in zip(own, inputs, strict=True):
            held.copy_(x)
        graph.replay()
        for result, expected in zip(found, eager, strict=True):
            assert torch.equal(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.waits])
def test_what_no_graph_holds_waits(name: str) -> None:
    inputs = [x.cuda() for x in CASES[name].inputs()]
    CASES[name].run(*(x.clone() for x in inputs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            CASES[name].run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@each_case
def test_results_on_a_gpu(case: Case) -> None:
    assert_exact(case, case.run(*(x.cuda() for x in case.inputs())))
