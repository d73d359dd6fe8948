#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "operators.h"

namespace py = pybind11;
using namespace pyprune;

namespace {

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
  bind_channel_moments(m);
  bind_eliminate(m);
  bind_grouped_cholesky(m);
  bind_hessian(m);
}
