// How the binding reports a bad argument: "fastattn: <argument, value>; <rule>: <remedy>".
//
// Up to torch 2.14 std::invalid_argument arrives in Python as ValueError, from 2.15 on as RuntimeError. Neither can say
// which kind is meant, so that whatever is no ValueError carries a mark, and fastattn/_errors.py raises the right type.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastattn {

namespace detail {

template <typename Error, typename... Parts>
[[noreturn]] void raise(const char* mark, const Parts&... parts) {
  std::ostringstream text;
  text << mark;
  ((text << parts), ...);
  throw Error(text.str());
}

}  // namespace detail

template <typename... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
  detail::raise<std::invalid_argument>("fastattn: ", parts...);
}

template <typename... Parts>
[[noreturn]] void type_error(const Parts&... parts) {
  detail::raise<std::invalid_argument>("fastattn[TypeError]: ", parts...);
}

// Not the caller's fault: memory that is not there.
template <typename... Parts>
[[noreturn]] void runtime_error(const Parts&... parts) {
  detail::raise<std::runtime_error>("fastattn[RuntimeError]: ", parts...);
}

// torch.OutOfMemoryError, which is for accelerators, and which training loops catch in order to try a smaller batch.
template <typename... Parts>
[[noreturn]] void out_of_memory_error(const Parts&... parts) {
  detail::raise<std::runtime_error>("fastattn[OutOfMemoryError]: ", parts...);
}

}  // namespace fastattn
