#pragma once

#include <pybind11/pybind11.h>

namespace pyprune {

// Each enters the functions of one operator into the module; one file beside this one defines it.
void bind_channel_moments(pybind11::module_& m);

}  // namespace pyprune
