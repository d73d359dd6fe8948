"""Triton 3.6's CPU interpreter, mended as far as the kernels here need it. For tests: never a shipped path.

The interpreter is chosen when a kernel is decorated, so TRITON_INTERPRET=1 must be in the environment before
the first import of triton; `mend()` then repairs it once. A test file therefore runs once more in a process of its
own, `run_interpreted(__file__)`, and keeps its tests of kernels for there, under `INTERPRETED`. These processes are
forked from one that has the libraries loaded.
"""

import functools
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language import tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MENDED_VERSION = "3.6."


# A line of stdin names a test file and one for what is printed; the answer is the exit status.
SERVER = """
import os, sys
import hypothesis, pytest, torch, triton.runtime.interpreter, pyprune.ops
for line in sys.stdin:
    test_file, printed = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        target = os.open(printed, os.O_WRONLY)
        os.dup2(target, 1), os.dup2(target, 2)
        status = pytest.main(["-q", "-p", "no:cacheprovider", test_file])
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    """It ends with this process, which holds its stdin."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, env=environment, text=True)


def run_interpreted(test_file: str) -> None:
    """Run the tests of a file in the interpreter, all of which must pass."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.NamedTemporaryFile("r") as printed:
        process.stdin.write(f"{test_file}\t{printed.name}\n")
        process.stdin.flush()
        status = process.stdout.readline()
        assert status == "0\n", f"status {status}{printed.read()}"


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: a partial result that is read but never written shows."""
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan, **options))


def mend() -> None:
    """Make loops with run-time bounds, products of bfloat16 and the reduce-add of descriptors work.

    The interpreter keeps a scalar as an array of one element and turns it into a range bound by int(array), which
    numpy 2.4 refuses unless the array has no dimension. It keeps bfloat16 as its bits in uint16, and multiplies
    those. Adding to memory through a descriptor is missing.
    """
    version = triton.__version__
    if not version.startswith(MENDED_VERSION):
        raise RuntimeError(f"the interpreter is mended for Triton {MENDED_VERSION}x, this is {version}")
    if not INTERPRETED:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor_class: type[tensor], scope: interpreter._LangPatchScope) -> None:
        original(tensor_class, scope)
        scope.set_attr(tensor_class, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce


def widened(handle: interpreter.TensorHandle) -> np.ndarray:
    """The operand of a product in the accumulator's precision, float32."""
    if handle.dtype.scalar == tl.bfloat16:
        # bfloat16 is the upper half of a float32.
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def create_dot(
    builder: interpreter.InterpreterBuilder,
    a: interpreter.TensorHandle,
    b: interpreter.TensorHandle,
    accumulator: interpreter.TensorHandle,
    input_precision: object,
    max_num_imprecise_acc: int,
) -> interpreter.TensorHandle:
    """a · b + accumulator for 16-bit and 32-bit floating-point operands and a float32 accumulator."""
    product = np.matmul(widened(a), widened(b))
    return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def create_descriptor_reduce(
    builder: interpreter.InterpreterBuilder,
    kind: object,
    descriptor: interpreter.TensorDescHandle,
    value: interpreter.TensorHandle,
    indices: list[interpreter.TensorHandle],
) -> None:
    """descriptor[indices] += value; elements outside its shape are left alone."""
    if "ADD" not in str(kind):
        raise NotImplementedError(f"the interpreter is mended for additions, not for {kind}")
    pointers, mask = descriptor.materialize_pointers(indices)
    before = builder.create_masked_load(pointers, mask, None, None, None, False)
    after = interpreter.TensorHandle(before.data + value.data, value.dtype.scalar)
    builder.create_masked_store(pointers, after, mask, None, None)
