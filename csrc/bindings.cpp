#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "pyprune/channel_moments.h"

namespace py = pybind11;
using namespace pyprune;

namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  refuse("dtype must be float32, bfloat16 or float16, not " + name);
}

void require_not_negative(const char* name, int64_t value) {
  if (value < 0) refuse(std::string(name) + " must not be negative, got " + std::to_string(value));
}

void require_positive(const char* name, int64_t value) {
  if (value <= 0) refuse(std::string(name) + " must be positive, got " + std::to_string(value));
}

void require_address(const char* name, uintptr_t address, int64_t alignment) {
  if (address == 0) refuse(std::string(name) + " is null");
  if (address % alignment != 0) {
    refuse(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
  }
}

// Memory that no allocation reaches: larger sizes are mistakes, and their products would overflow.
constexpr int64_t MAX_BYTES = int64_t{1} << 56;

Rows checked_rows(uintptr_t x, const std::string& dtype_name, int64_t rows, int64_t channels, int64_t row_stride) {
  const DType dtype = parse_dtype(dtype_name);
  require_not_negative("rows", rows);
  require_not_negative("channels", channels);
  require_not_negative("row_stride", row_stride);
  if (rows > 0 && channels > 0) {
    require_address("x_ptr", x, element_size(dtype));
    if (std::max(channels, row_stride) > MAX_BYTES / element_size(dtype) / rows) {
      refuse("rows, channels and row_stride describe more memory than can exist");
    }
  }
  return {reinterpret_cast<const void*>(x), dtype, rows, channels, row_stride};
}

MomentsState checked_state(int64_t count, uintptr_t mean, uintptr_t m2, const Rows& x) {
  require_not_negative("count", count);
  if (x.rows > 0 && x.channels > 0) {
    require_address("mean_ptr", mean, alignof(float));
    require_address("m2_ptr", m2, alignof(float));
  }
  return {count, reinterpret_cast<float*>(mean), reinterpret_cast<float*>(m2)};
}

void moments_cpu(uintptr_t x_ptr, const std::string& dtype, int64_t rows, int64_t channels, int64_t row_stride,
                 int64_t count, uintptr_t mean_ptr, uintptr_t m2_ptr, int threads) {
  const Rows x = checked_rows(x_ptr, dtype, rows, channels, row_stride);
  const MomentsState state = checked_state(count, mean_ptr, m2_ptr, x);
  require_positive("threads", threads);
  py::gil_scoped_release released;
  channel_moments_cpu(x, state, threads);
}

#ifdef PYPRUNE_CUDA_VERSION

void require_int32(const char* name, int64_t value) {
  if (value > INT32_MAX) refuse(std::string(name) + " must be below 2^31 on CUDA, got " + std::to_string(value));
}

size_t moments_cuda_workspace(const std::string& dtype, int64_t rows, int64_t channels, int multiprocessors) {
  require_not_negative("rows", rows);
  require_not_negative("channels", channels);
  require_int32("channels", channels);
  require_positive("multiprocessors", multiprocessors);
  return channel_moments_cuda_workspace(parse_dtype(dtype), rows, channels, multiprocessors);
}

void moments_cuda(uintptr_t x_ptr, const std::string& dtype, int64_t rows, int64_t channels, int64_t row_stride,
                  int64_t count, uintptr_t mean_ptr, uintptr_t m2_ptr, uintptr_t workspace_ptr,
                  int64_t workspace_bytes, int multiprocessors, uintptr_t stream) {
  const Rows x = checked_rows(x_ptr, dtype, rows, channels, row_stride);
  const MomentsState state = checked_state(count, mean_ptr, m2_ptr, x);
  require_int32("channels", channels);
  require_positive("multiprocessors", multiprocessors);
  const size_t needed = channel_moments_cuda_workspace(x.dtype, rows, channels, multiprocessors);
  if (workspace_bytes < static_cast<int64_t>(needed)) {
    refuse("the workspace has " + std::to_string(workspace_bytes) + " bytes and needs " + std::to_string(needed));
  }
  if (needed > 0) require_address("workspace_ptr", workspace_ptr, 16);
  py::gil_scoped_release released;
  channel_moments_cuda(x, state, reinterpret_cast<void*>(workspace_ptr), multiprocessors,
                       reinterpret_cast<CUstream_st*>(stream));
}

#endif

py::dict build_info() {
  using namespace py::literals;
#ifdef PYPRUNE_CUDA_VERSION
  const bool cuda = true;
  const std::optional<std::string> cuda_version = PYPRUNE_CUDA_VERSION;
  const std::vector<std::string> architectures = {PYPRUNE_CUDA_ARCHITECTURES};
#else
  const bool cuda = false;
  const std::optional<std::string> cuda_version;
  const std::vector<std::string> architectures;
#endif
  return py::dict("cuda"_a = cuda, "cuda_version"_a = cuda_version, "cuda_architectures"_a = architectures,
                  "cpu_isa"_a = isa_name(choose_isa()), "compiler"_a = PYPRUNE_COMPILER);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled operators on raw addresses; pyprune.ops checks tensors and calls them.";
  m.def("build_info", &build_info, "What this build carries and which CPU instruction set it picks here.");
  m.def("channel_moments_cpu", &moments_cpu, "Add rows to the per-channel mean and centred sum of squares.",
        py::arg("x_ptr"), py::arg("dtype"), py::arg("rows"), py::arg("channels"), py::arg("row_stride"),
        py::arg("count"), py::arg("mean_ptr"), py::arg("m2_ptr"), py::arg("threads"));
#ifdef PYPRUNE_CUDA_VERSION
  m.def("channel_moments_cuda_workspace", &moments_cuda_workspace,
        "Bytes of device memory, aligned to 16, that one channel_moments_cuda of these sizes needs.",
        py::arg("dtype"), py::arg("rows"), py::arg("channels"), py::arg("multiprocessors"));
  m.def("channel_moments_cuda", &moments_cuda,
        "As channel_moments_cpu, asynchronously on a stream of the current device.", py::arg("x_ptr"),
        py::arg("dtype"), py::arg("rows"), py::arg("channels"), py::arg("row_stride"), py::arg("count"),
        py::arg("mean_ptr"), py::arg("m2_ptr"), py::arg("workspace_ptr"), py::arg("workspace_bytes"),
        py::arg("multiprocessors"), py::arg("stream"));
#endif
}
