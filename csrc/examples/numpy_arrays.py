"""The compiled core on arrays that are not PyTorch's: raw addresses of NumPy's memory, of CuPy's, of the CUDA driver's.

    python numpy_arrays.py          channel moments of NumPy arrays on the CPU: float32, and bfloat16 as its bits
    python numpy_arrays.py --cupy   moments and a Hessian of CuPy arrays, on CuPy's current stream
    python numpy_arrays.py --cuda   the same with memory from the CUDA driver, through ctypes

The core is a module of its own: neither pyprune nor PyTorch is imported. Its functions take addresses, and sizes and
strides in elements; the headers in csrc/include say what they mean. The caller keeps the memory alive until they are
done, on a GPU until their stream is. The Hessian's kernel needs compute capability 9.0. Every result is checked.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
UNIT = 2.0**-24  # of float32's rounding


def load_core() -> Any:
    """The extension module inside the installed package; finding the package does not import it."""
    package = importlib.util.find_spec("pyprune")
    folders = [] if package is None else package.submodule_search_locations or []
    path = next((found for folder in folders for found in Path(folder).glob("_core*.so")), None)
    if path is None:
        raise SystemExit("pyprune is not installed, or without its compiled core")
    spec = importlib.util.spec_from_file_location("_core", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, kept in uint16: the upper half of the bits, rounded to nearest."""
    return ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def check_moments(x: np.ndarray, mean: np.ndarray, m2: np.ndarray) -> None:
    """Against float64: roundings of merges of tiles of 8 rows, of either sign (Higham and Mary 2019), 4: constants."""
    exact = x.astype(np.float64)
    exact_mean = exact.mean(0)
    exact_m2 = ((exact - exact_mean) ** 2).sum(0)
    merges, squares = np.sqrt(len(x) / 8), (exact**2).sum(0)
    assert (np.abs(mean - exact_mean) <= 4 * UNIT * merges * np.sqrt(squares / len(x))).all()
    assert (np.abs(m2 - exact_m2) <= 4 * UNIT * (merges * exact_m2 + np.sqrt(exact_m2 * squares))).all()


def on_the_cpu(core: Any) -> None:
    x = np.random.default_rng(0).normal(3, 1, (2000, 300)).astype(np.float32)
    view = x[:, 7:260]  # any row stride; the channels of a row lie side by side
    bits = bfloat16_bits(x)
    for rows, dtype, values in ((view, "float32", view), (bits, "bfloat16", widened(bits))):
        mean, m2 = np.zeros((2, rows.shape[1]), np.float32)
        count = 0
        for part in (rows[:700], rows[700:]):  # as they arrive; the caller counts
            core.channel_moments_cpu(
                part.ctypes.data, dtype, *part.shape, part.strides[0] // part.itemsize,
                count, mean.ctypes.data, m2.ctypes.data, threads=THREADS,
            )  # fmt: skip
            count += len(part)
        check_moments(values, mean, m2)


class CuPyMemory:
    """CuPy's arrays, its current device and its current stream."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.get_current_stream().ptr
        self.multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]
        self.arrays: dict[int, Any] = {}

    def copy_of(self, values: np.ndarray) -> int:
        """The address of a copy of the values."""
        array = self.cupy.asarray(values)
        self.arrays[array.data.ptr] = array
        return array.data.ptr

    def values_at(self, address: int, like: np.ndarray) -> np.ndarray:
        return self.arrays[address].get()


class DriverMemory:
    """Memory of the first GPU from the CUDA driver's library, on the default stream. Freed when the process ends."""

    MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, context, count = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)  # the one that the core uses
        self.call("cuCtxSetCurrent", context)
        self.call("cuDeviceGetAttribute", ctypes.byref(count), self.MULTIPROCESSOR_COUNT, device)
        self.stream, self.multiprocessors = 0, count.value

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed with CUresult {status}")

    def copy_of(self, values: np.ndarray) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(values.nbytes, 16)))
        self.call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes))
        return address.value

    def values_at(self, address: int, like: np.ndarray) -> np.ndarray:
        values = np.empty_like(like)
        source = ctypes.c_uint64(address)
        self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(values.ctypes.data), source, ctypes.c_size_t(values.nbytes))
        return values


def on_a_gpu(core: Any, memory: CuPyMemory | DriverMemory) -> None:
    multiprocessors, stream = memory.multiprocessors, memory.stream
    x = np.random.default_rng(0).normal(3, 1, (3000, 512)).astype(np.float32)
    state = np.zeros(512, np.float32)
    mean, m2 = memory.copy_of(state), memory.copy_of(state)
    size = core.channel_moments_cuda_workspace("float32", *x.shape, multiprocessors)
    workspace = memory.copy_of(np.zeros(size, np.uint8))
    core.channel_moments_cuda(
        memory.copy_of(x), "float32", *x.shape, 512, 0, mean, m2,
        workspace_ptr=workspace, workspace_bytes=size, multiprocessors=multiprocessors, stream=stream,
    )  # fmt: skip
    check_moments(x, memory.values_at(mean, state), memory.values_at(m2, state))

    # Integers so small that every sum is exact in float32, whatever its order.
    x = np.random.default_rng(1).integers(-3, 4, (3000, 512)).astype(np.float32)
    lower, sums = memory.copy_of(np.zeros((512, 512), np.float32)), memory.copy_of(state)
    size = core.hessian_update_cuda_workspace(*x.shape, multiprocessors)
    workspace = memory.copy_of(np.zeros(size, np.uint8))
    core.hessian_update_cuda(
        memory.copy_of(bfloat16_bits(x)), "bfloat16", *x.shape, 512, lower, 512, sums,
        workspace_ptr=workspace, workspace_bytes=size, multiprocessors=multiprocessors, stream=stream,
    )  # fmt: skip
    found = memory.values_at(lower, np.empty((512, 512), np.float32))
    assert (np.tril(found) == np.tril(x.T @ x)).all()
    assert (memory.values_at(sums, state) == x.sum(0)).all()


if __name__ == "__main__":
    if sys.argv[1:] == ["--cupy"]:
        on_a_gpu(load_core(), CuPyMemory())
    elif sys.argv[1:] == ["--cuda"]:
        on_a_gpu(load_core(), DriverMemory())
    elif not sys.argv[1:]:
        on_the_cpu(load_core())
    else:
        raise SystemExit(__doc__)
    assert "torch" not in sys.modules
    print("as in float64")
