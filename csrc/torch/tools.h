// Operators of the CPU library that take no tensor: instruction set levels, measurements, the build.
#pragma once

#include <string>

namespace fastattn {

void set_isa(std::string name);
std::string isa();
std::string supported_isas();  // comma separated, lowest first

// Multiply-add peak at the active level in flop per second, for dtype "float32" or "bfloat16".
double measure_peak(std::string dtype, int64_t threads);

// Bytes per second that so many threads read together from memory beyond all caches.
double measure_read_bandwidth(int64_t threads);

// Lines "key: value" on how this library was compiled.
std::string build_info();

}  // namespace fastattn
