#include "pyprune/channel_moments.h"

#include <pybind11/pybind11.h>

#include "checks.h"
#include "operators.h"

namespace py = pybind11;

namespace pyprune {
namespace {

MomentsState checked_state(int64_t count, uintptr_t mean, uintptr_t m2, const Rows& x) {
  require_not_negative("count", count);
  if (x.rows > 0 && x.channels > 0) {
    require_address("mean_ptr", mean, alignof(float));
    require_address("m2_ptr", m2, alignof(float));
  }
  return {count, reinterpret_cast<float*>(mean), reinterpret_cast<float*>(m2)};
}

RowWeights checked_weights(uintptr_t weights, uintptr_t total) {
  if (weights == 0) return {};
  require_address("weights_ptr", weights, alignof(float));
  require_address("total_ptr", total, alignof(double));
  return {reinterpret_cast<const float*>(weights), reinterpret_cast<const double*>(total)};
}

void moments_cpu(uintptr_t x_ptr, const std::string& dtype, int64_t rows, int64_t channels, int64_t row_stride,
                 int64_t count, uintptr_t mean_ptr, uintptr_t m2_ptr, int threads, uintptr_t weights_ptr,
                 uintptr_t total_ptr) {
  const Rows x = checked_rows(x_ptr, dtype, rows, channels, row_stride);
  const MomentsState state = checked_state(count, mean_ptr, m2_ptr, x);
  const RowWeights weights = checked_weights(weights_ptr, total_ptr);
  require_positive("threads", threads);
  py::gil_scoped_release released;
  channel_moments_cpu(x, state, threads, weights);
}

#ifdef PYPRUNE_CUDA_VERSION

size_t moments_cuda_workspace(const std::string& dtype, int64_t rows, int64_t channels, int multiprocessors,
                              bool weighted) {
  require_not_negative("rows", rows);
  require_not_negative("channels", channels);
  require_int32("channels", channels);
  require_positive("multiprocessors", multiprocessors);
  return channel_moments_cuda_workspace(parse_dtype(dtype), rows, channels, multiprocessors, weighted);
}

void moments_cuda(uintptr_t x_ptr, const std::string& dtype, int64_t rows, int64_t channels, int64_t row_stride,
                  int64_t count, uintptr_t mean_ptr, uintptr_t m2_ptr, uintptr_t workspace_ptr,
                  int64_t workspace_bytes, int multiprocessors, uintptr_t stream, uintptr_t weights_ptr,
                  uintptr_t total_ptr) {
  const Rows x = checked_rows(x_ptr, dtype, rows, channels, row_stride);
  const MomentsState state = checked_state(count, mean_ptr, m2_ptr, x);
  const RowWeights weights = checked_weights(weights_ptr, total_ptr);
  require_int32("channels", channels);
  require_positive("multiprocessors", multiprocessors);
  const size_t needed =
      channel_moments_cuda_workspace(x.dtype, rows, channels, multiprocessors, weights.roots != nullptr);
  require_workspace(workspace_ptr, workspace_bytes, needed);
  py::gil_scoped_release released;
  channel_moments_cuda(x, state, reinterpret_cast<void*>(workspace_ptr), multiprocessors,
                       reinterpret_cast<CUstream_st*>(stream), weights);
}

#endif

}  // namespace

void bind_channel_moments(py::module_& m) {
  m.def("channel_moments_cpu", &moments_cpu,
        "Add rows to the per-channel mean and centred sum of squares; unless weights_ptr is 0 with weights, whose float32 "
        "square roots lie there, into a state whose float64 sum of weights lies at total_ptr.",
        py::arg("x_ptr"), py::arg("dtype"), py::arg("rows"), py::arg("channels"), py::arg("row_stride"),
        py::arg("count"), py::arg("mean_ptr"), py::arg("m2_ptr"), py::arg("threads"), py::arg("weights_ptr") = 0,
        py::arg("total_ptr") = 0);
#ifdef PYPRUNE_CUDA_VERSION
  m.def("channel_moments_cuda_workspace", &moments_cuda_workspace,
        "Bytes of device memory, aligned to 16, that one channel_moments_cuda of these sizes needs.",
        py::arg("dtype"), py::arg("rows"), py::arg("channels"), py::arg("multiprocessors"),
        py::arg("weighted") = false);
  m.def("channel_moments_cuda", &moments_cuda,
        "As channel_moments_cpu, asynchronously on a stream of the current device.", py::arg("x_ptr"),
        py::arg("dtype"), py::arg("rows"), py::arg("channels"), py::arg("row_stride"), py::arg("count"),
        py::arg("mean_ptr"), py::arg("m2_ptr"), py::arg("workspace_ptr"), py::arg("workspace_bytes"),
        py::arg("multiprocessors"), py::arg("stream"), py::arg("weights_ptr") = 0, py::arg("total_ptr") = 0);
#endif
}

}  // namespace pyprune
