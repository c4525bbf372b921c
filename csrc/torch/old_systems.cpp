// What a library that was built with a new GNU compiler brings along for systems whose own C++ library is older.
//
// Headers of a new libstdc++ call functions that older ones lack. Some of them happen to be exported by the torch of
// one distributor and not by another's, so that a library without copies of its own may or may not load. The versions
// of the C library's functions are a matter of linking: see scripts/glibc_stubs.py.
#include <sstream>

#if defined(__GLIBCXX__) && defined(__linux__)

#include <new>

// GLIBCXX_3.4.26 and 3.4.29; in older ones they are inline, or have other names.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
#if __cplusplus >= 202002L && defined(_GLIBCXX_USE_CXX11_ABI) && _GLIBCXX_USE_CXX11_ABI
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;
#endif

namespace std {
#pragma GCC visibility push(hidden)
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
#pragma GCC visibility pop
}  // namespace std

// glibc 2.32: nonzero while a program has one thread, when counting references takes no atomic operations. 0 is always
// right, and torch has many.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

#endif
