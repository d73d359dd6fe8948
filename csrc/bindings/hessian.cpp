#include "pyprune/hessian.h"

#include <pybind11/pybind11.h>

#include <algorithm>

#include "checks.h"
#include "operators.h"

namespace py = pybind11;

namespace pyprune {

#ifdef PYPRUNE_CUDA_VERSION

namespace {

constexpr int64_t VECTOR_BYTES = 16;  // what the copy engine asks of addresses and strides

void require_whole_vectors(const char* name, int64_t elements, int64_t element_bytes) {
  if (elements * element_bytes % VECTOR_BYTES != 0) {
    refuse(std::string(name) + " must be a multiple of " + std::to_string(VECTOR_BYTES / element_bytes) + ", got " +
           std::to_string(elements));
  }
}

Rows checked_half_rows(uintptr_t x_ptr, const std::string& dtype, int64_t rows, int64_t channels, int64_t row_stride) {
  const Rows x = checked_rows(x_ptr, dtype, rows, channels, row_stride, VECTOR_BYTES);
  if (x.dtype == DType::float32) refuse("dtype must be bfloat16 or float16, not float32");
  const int64_t size = element_size(x.dtype);
  require_int32("rows", rows);
  require_int32("channels", channels);
  require_whole_vectors("channels", channels, size);
  if (rows > 1) {
    require_whole_vectors("row_stride", row_stride, size);
    if (row_stride < channels) refuse("row_stride must not be below channels: the rows would overlap");
  }
  return x;
}

HessianState checked_state(uintptr_t lower, int64_t stride, uintptr_t sums, const Rows& x) {
  if (x.rows > 0 && x.channels > 0) {
    require_memory("channels and lower_stride", x.channels, std::max(x.channels, stride), sizeof(float));
    require_whole_vectors("lower_stride", stride, sizeof(float));
    if (stride < x.channels) refuse("lower_stride must not be below channels: the rows would overlap");
    require_address("lower_ptr", lower, VECTOR_BYTES);
    if (sums != 0) require_address("sums_ptr", sums, alignof(float));
  }
  return {reinterpret_cast<float*>(lower), stride, reinterpret_cast<float*>(sums)};
}

HessianWeights checked_weights(uintptr_t weights, uintptr_t factor) {
  if (weights == 0) return {};
  require_address("weights_ptr", weights, VECTOR_BYTES);
  if (factor != 0) require_address("factor_ptr", factor, alignof(float));
  return {reinterpret_cast<const float*>(weights), reinterpret_cast<const float*>(factor)};
}

size_t update_cuda_workspace(int64_t rows, int64_t channels, int multiprocessors) {
  require_not_negative("rows", rows);
  require_not_negative("channels", channels);
  require_int32("channels", channels);
  require_positive("multiprocessors", multiprocessors);
  return hessian_update_cuda_workspace(rows, channels, multiprocessors);
}

void update_cuda(uintptr_t x_ptr, const std::string& dtype, int64_t rows, int64_t channels, int64_t row_stride,
                 uintptr_t lower_ptr, int64_t lower_stride, uintptr_t sums_ptr, uintptr_t workspace_ptr,
                 int64_t workspace_bytes, int multiprocessors, uintptr_t stream, uintptr_t weights_ptr,
                 uintptr_t factor_ptr) {
  const Rows x = checked_half_rows(x_ptr, dtype, rows, channels, row_stride);
  const HessianState state = checked_state(lower_ptr, lower_stride, sums_ptr, x);
  const HessianWeights weights = checked_weights(weights_ptr, factor_ptr);
  require_positive("multiprocessors", multiprocessors);
  const size_t needed = hessian_update_cuda_workspace(rows, channels, multiprocessors);
  require_workspace(workspace_ptr, workspace_bytes, needed);
  py::gil_scoped_release released;
  hessian_update_cuda(x, state, reinterpret_cast<void*>(workspace_ptr), multiprocessors,
                      reinterpret_cast<CUstream_st*>(stream), weights);
}

}  // namespace

void bind_hessian(py::module_& m) {
  m.def("hessian_update_cuda_workspace", &update_cuda_workspace,
        "Bytes of device memory, aligned to 16, that one hessian_update_cuda of these sizes needs.", py::arg("rows"),
        py::arg("channels"), py::arg("multiprocessors"));
  m.def("hessian_update_cuda", &update_cuda,
        "Add the products of rows to the lower triangle of a Hessian and, unless sums_ptr is 0, their sums to sums; "
        "asynchronously on a stream of the current device, which must be of compute capability 9.0. weights_ptr: 0, or "
        "float32 weights of the rows, and zeros up to a multiple of 64; factor_ptr: 0, or what sums are multiplied by.",
        py::arg("x_ptr"), py::arg("dtype"), py::arg("rows"), py::arg("channels"), py::arg("row_stride"),
        py::arg("lower_ptr"), py::arg("lower_stride"), py::arg("sums_ptr"), py::arg("workspace_ptr"),
        py::arg("workspace_bytes"), py::arg("multiprocessors"), py::arg("stream"), py::arg("weights_ptr") = 0,
        py::arg("factor_ptr") = 0);
}

#else

void bind_hessian(py::module_&) {}

#endif

}  // namespace pyprune
