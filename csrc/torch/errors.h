// How the binding reports a bad argument: "fastattn: <argument, value>; <rule>: <remedy>".
//
// std::invalid_argument arrives in Python as ValueError. No standard exception arrives as TypeError, so that kind
// carries a mark, which fastattn/_errors.py turns into the right type.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastattn {

template <typename... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
  std::ostringstream text;
  text << "fastattn: ";
  ((text << parts), ...);
  throw std::invalid_argument(text.str());
}

template <typename... Parts>
[[noreturn]] void type_error(const Parts&... parts) {
  std::ostringstream text;
  text << "fastattn[TypeError]: ";
  ((text << parts), ...);
  throw std::invalid_argument(text.str());
}

}  // namespace fastattn
