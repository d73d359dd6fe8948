#include "pyprune/eliminate.h"

#include <pybind11/pybind11.h>

#include "checks.h"
#include "operators.h"

namespace py = pybind11;

namespace pyprune {
namespace {

Elimination checked_elimination(int64_t channels, uintptr_t a, uintptr_t g, uintptr_t a_diagonal, uintptr_t g_diagonal,
                                uintptr_t floor, uintptr_t removed, uintptr_t order, uintptr_t errors) {
  require_positive("channels", channels);
  require_int32("channels", channels);
  const int64_t word = alignof(float);
  require_address("a_ptr", a, word);
  require_address("g_ptr", g, word);
  require_address("a_diagonal_ptr", a_diagonal, word);
  require_address("g_diagonal_ptr", g_diagonal, word);
  require_address("floor_ptr", floor, word);
  require_address("removed_ptr", removed, 1);
  require_address("order_ptr", order, alignof(int64_t));
  require_address("errors_ptr", errors, word);
  return {channels,
          reinterpret_cast<const float*>(a),
          reinterpret_cast<const float*>(g),
          reinterpret_cast<float*>(a_diagonal),
          reinterpret_cast<float*>(g_diagonal),
          reinterpret_cast<const float*>(floor),
          reinterpret_cast<uint8_t*>(removed),
          reinterpret_cast<int64_t*>(order),
          reinterpret_cast<float*>(errors)};
}

EliminationPanel checked_panel(int64_t channels, int64_t first, int pivots, uintptr_t lower, int64_t lower_stride,
                               uintptr_t products, int width) {
  require_not_negative("first", first);
  require_not_negative("pivots", pivots);
  if (first >= channels - pivots) refuse("first and pivots leave no channel");
  if (width < pivots) refuse("width must be at least pivots");
  if (lower_stride < pivots) refuse("lower_stride must be at least pivots");
  if (lower_stride > MAX_BYTES / channels / static_cast<int64_t>(sizeof(float))) {
    refuse("channels and lower_stride describe more memory than can exist");
  }
  if (pivots > 0) {
    require_address("lower_ptr", lower, alignof(float));
    require_address("products_ptr", products, alignof(float));
  }
  return {first, pivots, reinterpret_cast<float*>(lower), lower_stride, reinterpret_cast<float*>(products), width};
}

void panel_cpu(int64_t channels, uintptr_t a, uintptr_t g, uintptr_t a_diagonal, uintptr_t g_diagonal, uintptr_t floor,
               uintptr_t removed, uintptr_t order, uintptr_t errors, int64_t first, int pivots, uintptr_t lower,
               int64_t lower_stride, uintptr_t products, int width, int threads) {
  const Elimination elimination =
      checked_elimination(channels, a, g, a_diagonal, g_diagonal, floor, removed, order, errors);
  const EliminationPanel panel = checked_panel(channels, first, pivots, lower, lower_stride, products, width);
  require_positive("threads", threads);
  py::gil_scoped_release released;
  eliminate_panel_cpu(elimination, panel, threads);
}

#ifdef PYPRUNE_CUDA_VERSION

py::dict plan_cuda(int64_t channels, int multiprocessors) {
  using namespace py::literals;
  require_not_negative("channels", channels);
  require_int32("channels", channels);
  require_positive("multiprocessors", multiprocessors);
  const EliminationPlan plan = eliminate_cuda_plan(channels, multiprocessors);
  return py::dict("panel"_a = plan.panel, "blocks"_a = plan.blocks, "workspace_bytes"_a = plan.workspace);
}

void panel_cuda(int64_t channels, uintptr_t a, uintptr_t g, uintptr_t a_diagonal, uintptr_t g_diagonal, uintptr_t floor,
                uintptr_t removed, uintptr_t order, uintptr_t errors, int64_t first, int pivots, uintptr_t lower,
                int64_t lower_stride, uintptr_t products, int width, uintptr_t workspace_ptr, int64_t workspace_bytes,
                int multiprocessors, uintptr_t stream) {
  const Elimination elimination =
      checked_elimination(channels, a, g, a_diagonal, g_diagonal, floor, removed, order, errors);
  const EliminationPanel panel = checked_panel(channels, first, pivots, lower, lower_stride, products, width);
  require_positive("multiprocessors", multiprocessors);
  const EliminationPlan plan = eliminate_cuda_plan(channels, multiprocessors);
  if (width > plan.panel) {
    refuse("width must be at most " + std::to_string(plan.panel) + " on this device, got " + std::to_string(width));
  }
  if (workspace_bytes < static_cast<int64_t>(plan.workspace)) {
    refuse("the workspace has " + std::to_string(workspace_bytes) + " bytes and needs " +
           std::to_string(plan.workspace));
  }
  require_address("workspace_ptr", workspace_ptr, 16);
  py::gil_scoped_release released;
  eliminate_panel_cuda(elimination, panel, multiprocessors, reinterpret_cast<void*>(workspace_ptr),
                       reinterpret_cast<CUstream_st*>(stream));
}

#endif

}  // namespace

void bind_eliminate(py::module_& m) {
  m.def("eliminate_panel_cpu", &panel_cpu, "Remove the next channels of a greedy elimination.", py::arg("channels"),
        py::arg("a_ptr"), py::arg("g_ptr"), py::arg("a_diagonal_ptr"), py::arg("g_diagonal_ptr"), py::arg("floor_ptr"),
        py::arg("removed_ptr"), py::arg("order_ptr"), py::arg("errors_ptr"), py::arg("first"), py::arg("pivots"),
        py::arg("lower_ptr"), py::arg("lower_stride"), py::arg("products_ptr"), py::arg("width"), py::arg("threads"));
#ifdef PYPRUNE_CUDA_VERSION
  m.def("eliminate_cuda_plan", &plan_cuda,
        "The most removals a panel, the blocks, and the bytes of zeroed device memory, aligned to 16, that the panels "
        "of one elimination on the current device share.",
        py::arg("channels"), py::arg("multiprocessors"));
  m.def("eliminate_panel_cuda", &panel_cuda,
        "As eliminate_panel_cpu, asynchronously on a stream of the current device.", py::arg("channels"),
        py::arg("a_ptr"), py::arg("g_ptr"), py::arg("a_diagonal_ptr"), py::arg("g_diagonal_ptr"), py::arg("floor_ptr"),
        py::arg("removed_ptr"), py::arg("order_ptr"), py::arg("errors_ptr"), py::arg("first"), py::arg("pivots"),
        py::arg("lower_ptr"), py::arg("lower_stride"), py::arg("products_ptr"), py::arg("width"),
        py::arg("workspace_ptr"), py::arg("workspace_bytes"), py::arg("multiprocessors"), py::arg("stream"));
#endif
}

}  // namespace pyprune
