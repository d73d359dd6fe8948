#include "pyprune/grouped_cholesky.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "checks.h"
#include "operators.h"

namespace py = pybind11;

namespace pyprune {
namespace {

DiagonalBlocks checked_blocks(uintptr_t a, int64_t a_row_stride, uintptr_t g, int64_t g_row_stride, int64_t units,
                              int64_t width, uintptr_t errors) {
  require_not_negative("units", units);
  require_positive("width", width);
  require_positive("a_row_stride", a_row_stride);
  require_positive("g_row_stride", g_row_stride);
  if (units > 0) {
    const int64_t word = alignof(float);
    require_address("a_ptr", a, word);
    require_address("g_ptr", g, word);
    require_address("errors_ptr", errors, word);
    if (std::max({width, a_row_stride, g_row_stride}) > MAX_BYTES / word / units / width) {
      refuse("units, width and the row strides describe more memory than can exist");
    }
  }
  return {reinterpret_cast<const float*>(a), a_row_stride, reinterpret_cast<const float*>(g), g_row_stride, units,
          width};
}

void errors_cpu(uintptr_t a_ptr, int64_t a_row_stride, uintptr_t g_ptr, int64_t g_row_stride, int64_t units,
                int64_t width, bool diagonal, uintptr_t errors_ptr, int threads) {
  const DiagonalBlocks blocks = checked_blocks(a_ptr, a_row_stride, g_ptr, g_row_stride, units, width, errors_ptr);
  require_positive("threads", threads);
  py::gil_scoped_release released;
  grouped_cholesky_errors_cpu(blocks, diagonal, reinterpret_cast<float*>(errors_ptr), threads);
}

#ifdef PYPRUNE_CUDA_VERSION

void errors_cuda(uintptr_t a_ptr, int64_t a_row_stride, uintptr_t g_ptr, int64_t g_row_stride, int64_t units,
                 int64_t width, bool diagonal, uintptr_t errors_ptr, uintptr_t stream) {
  const DiagonalBlocks blocks = checked_blocks(a_ptr, a_row_stride, g_ptr, g_row_stride, units, width, errors_ptr);
  require_int32("units", units);
  if (width > GROUPED_CHOLESKY_CUDA_WIDTH) {
    refuse("width must be at most " + std::to_string(GROUPED_CHOLESKY_CUDA_WIDTH) + " on CUDA, got " +
           std::to_string(width));
  }
  py::gil_scoped_release released;
  grouped_cholesky_errors_cuda(blocks, diagonal, reinterpret_cast<float*>(errors_ptr),
                               reinterpret_cast<CUstream_st*>(stream));
}

#endif

}  // namespace

void bind_grouped_cholesky(py::module_& m) {
  m.def("grouped_cholesky_errors_cpu", &errors_cpu, "The error of removing each unit alone, from diagonal blocks.",
        py::arg("a_ptr"), py::arg("a_row_stride"), py::arg("g_ptr"), py::arg("g_row_stride"), py::arg("units"),
        py::arg("width"), py::arg("diagonal"), py::arg("errors_ptr"), py::arg("threads"));
#ifdef PYPRUNE_CUDA_VERSION
  m.def("grouped_cholesky_errors_cuda", &errors_cuda,
        "As grouped_cholesky_errors_cpu, asynchronously on a stream of the current device.", py::arg("a_ptr"),
        py::arg("a_row_stride"), py::arg("g_ptr"), py::arg("g_row_stride"), py::arg("units"), py::arg("width"),
        py::arg("diagonal"), py::arg("errors_ptr"), py::arg("stream"));
#endif
}

}  // namespace pyprune
