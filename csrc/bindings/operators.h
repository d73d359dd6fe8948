#pragma once

#include <pybind11/pybind11.h>

namespace pyprune {

// Each enters the functions of one operator into the module; one file beside this one defines it.
void bind_channel_moments(pybind11::module_& m);
void bind_eliminate(pybind11::module_& m);
void bind_grouped_cholesky(pybind11::module_& m);
void bind_hessian(pybind11::module_& m);

}  // namespace pyprune
