// Appending to a cache and attending over it, contiguous, in pages and in int8, at every instruction set that this
// processor has, against the plain float64 path. Every array is as long as it must be and not a number longer, so that
// the sanitizers see whatever leads out of one; the bounds on errors are generous, tests/test_kv_cache.py has the tight
// ones.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "core/cache.h"
#include "cpu/attention.h"
#include "testing/check.h"
#include "testing/half.h"
#include "testing/threads.h"

namespace {

using namespace fastattn;
using testing::from_float;
using testing::to_float;

struct CacheCase {
  int64_t Lq = 1, Lnew = 1, D = 16, Dv = 16, page_size = 0;  // page_size 0: contiguous
  int64_t before[2] = {5, 70};
  bool int8 = false;
  int64_t rotary_dim = 0;
  bool interleaved = false;
  int64_t left = kUnlimited;
};

constexpr int64_t kB = 2, kHq = 4, kHkv = 2;

inline double value_of(double x) { return x; }
template <typename T>
double value_of(T x) {
  return static_cast<double>(to_float(x));
}
inline void store(float x, double* to) { *to = static_cast<double>(x); }
template <typename T>
void store(float x, T* to) {
  from_float(x, to);
}

template <typename T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<testing::BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<testing::Float16> = DType::kFloat16;
template <>
constexpr DType kDType<double> = DType::kFloat64;

// o of a case, [B, Hq, Lq, Dv], in storage type T. Numbers are the same for every T, and exact in all of them.
template <typename T>
std::vector<double> run(const CacheCase& c, const cpu::Parallel& parallel) {
  std::mt19937 random(7);
  const auto fill = [&](std::vector<T>* x) {
    for (T& number : *x) store(static_cast<float>(static_cast<int>(random() % 65) - 32) / 16.0f, &number);
  };
  const auto rows_of = [](int64_t L, int64_t stride[3]) { stride[0] = kHkv * L, stride[1] = L, stride[2] = 1; };
  const int64_t longest = c.before[1] + c.Lnew;
  const int64_t per_sequence = c.page_size == 0 ? 1 : (longest + c.page_size - 1) / c.page_size;
  const int64_t rows = c.page_size == 0 ? longest : c.page_size;
  const int64_t pages = c.page_size == 0 ? kB : kB * per_sequence;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };

  std::vector<T> q(size(kB * kHq * c.Lq * c.D)), rotated_q(q.size()), o(size(kB * kHq * c.Lq * c.Dv));
  std::vector<T> k(size(kB * kHkv * c.Lnew * c.D)), v(size(kB * kHkv * c.Lnew * c.Dv));
  std::vector<T> k_cache(c.int8 ? 0 : size(pages * kHkv * rows * c.D));
  std::vector<T> v_cache(c.int8 ? 0 : size(pages * kHkv * rows * c.Dv));
  for (std::vector<T>* x : {&q, &k, &v, &k_cache, &v_cache}) fill(x);
  std::vector<int8_t> k_numbers(c.int8 ? size(pages * kHkv * rows * c.D) : 0);
  std::vector<int8_t> v_numbers(c.int8 ? size(pages * kHkv * rows * c.Dv) : 0);
  for (std::vector<int8_t>* x : {&k_numbers, &v_numbers}) {
    for (int8_t& number : *x) number = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
  }
  std::vector<float> k_scale(c.int8 ? size(pages * kHkv * rows) : 0, 1.0f / 64.0f), v_scale = k_scale;
  std::vector<int32_t> lengths = {static_cast<int32_t>(c.before[0]), static_cast<int32_t>(c.before[1])};
  std::vector<int32_t> new_lengths(kB), table;
  for (int64_t n = 0; c.page_size != 0 && n < pages; ++n) table.push_back(static_cast<int32_t>(pages - 1 - n));
  std::vector<float> cos(size(longest * c.rotary_dim / 2)), sin(cos.size());
  for (size_t n = 0; n < cos.size(); ++n)
    cos[n] = std::cos(0.1f * static_cast<float>(n)), sin[n] = std::sin(0.1f * static_cast<float>(n));

  CacheAppendParams a;
  a.dtype = kDType<T>;
  a.B = kB, a.Hq = kHq, a.Hkv = kHkv, a.Lq = c.Lq, a.Lnew = c.Lnew, a.D = c.D, a.Dv = c.Dv;
  AttentionParams p;
  p.dtype = a.dtype;
  p.B = kB, p.Hq = kHq, p.Hkv = kHkv, p.Lq = c.Lq, p.D = c.D, p.Dv = c.Dv;
  p.Lk = a.max_keys = rows * per_sequence;
  const auto strides = [&](int64_t heads, int64_t L, int64_t width, int64_t to[3]) {
    to[0] = heads * L * width, to[1] = L * width, to[2] = width;
  };
  strides(kHq, c.Lq, c.D, p.q_stride);
  strides(kHq, c.Lq, c.D, a.q_stride);
  strides(kHq, c.Lq, c.D, a.rotated_q_stride);
  strides(kHq, c.Lq, c.Dv, p.o_stride);
  strides(kHkv, c.Lnew, c.D, a.k_stride);
  strides(kHkv, c.Lnew, c.Dv, a.v_stride);
  strides(kHkv, rows, c.D, p.k_stride);
  strides(kHkv, rows, c.Dv, p.v_stride);
  strides(kHkv, rows, c.D, a.k_cache_stride);
  strides(kHkv, rows, c.Dv, a.v_cache_stride);
  a.k = k.data(), a.v = v.data(), a.q = q.data(), a.rotated_q = rotated_q.data();
  a.k_cache = c.int8 ? static_cast<void*>(k_numbers.data()) : k_cache.data();
  a.v_cache = c.int8 ? static_cast<void*>(v_numbers.data()) : v_cache.data();
  p.k = a.k_cache, p.v = a.v_cache;
  if (c.int8) {
    p.k_scale = a.k_scale = k_scale.data();
    p.v_scale = a.v_scale = v_scale.data();
    rows_of(rows, a.k_scale_stride), rows_of(rows, a.v_scale_stride);
    rows_of(rows, p.k_scale_stride), rows_of(rows, p.v_scale_stride);
  }
  if (c.page_size != 0) {
    p.block_table = a.block_table = table.data();
    p.block_table_stride = a.block_table_stride = per_sequence;
    p.page_size = a.page_size = c.page_size;
    p.pages = a.pages = pages;
  }
  a.cache_lengths = lengths.data(), a.new_lengths = new_lengths.data();
  if (c.rotary_dim != 0) {
    a.cos = cos.data(), a.sin = sin.data();
    a.cos_stride = a.sin_stride = c.rotary_dim / 2;
    a.rotary_dim = c.rotary_dim, a.positions = longest, a.rotary_interleaved = c.interleaved;
  }
  cpu::append_to_cache(a, parallel);
  CHECK(new_lengths[0] == c.before[0] + c.Lnew && new_lengths[1] == longest, "lengths");

  p.q = c.rotary_dim != 0 ? a.rotated_q : a.q;
  p.o = o.data();
  p.scale = 0.1;
  p.causal = Causal::kBottomRight;
  p.window_left = c.left;
  p.kv_lengths = new_lengths.data();
  cpu::attention_forward(p, parallel);
  std::vector<double> result;
  for (const T& number : o) result.push_back(value_of(number));
  return result;
}

template <typename T>
void compare(const CacheCase& c, const std::vector<double>& exact, double bound, const char* type) {
  const std::vector<double> got = run<T>(c, testing::threads(2));
  for (size_t n = 0; n < exact.size(); ++n) {
    CHECK(std::fabs(got[n] - exact[n]) <= bound, "%s %s page %d Lnew %d D %d int8 %d: %g, not %g at %zu", type,
          cpu::isa_name(cpu::active_isa()), static_cast<int>(c.page_size), static_cast<int>(c.Lnew),
          static_cast<int>(c.D), c.int8, got[n], exact[n], n);
  }
}

}  // namespace

int main() {
  std::vector<CacheCase> cases;
  for (const int64_t page_size : {0, 1, 7, 16}) {
    for (const bool int8 : {false, true}) {
      cases.push_back({.page_size = page_size, .int8 = int8});
      cases.push_back({.Lq = 5, .Lnew = 5, .D = 17, .Dv = 3, .page_size = page_size, .int8 = int8, .rotary_dim = 6});
      cases.push_back({.Lq = 70,
                       .Lnew = 70,
                       .D = 33,
                       .Dv = 40,
                       .page_size = page_size,
                       .int8 = int8,
                       .rotary_dim = 32,
                       .interleaved = true,
                       .left = 40});
      cases.push_back({.D = 100, .Dv = 101, .page_size = page_size, .before = {63, 200}, .int8 = int8, .left = 90});
      cases.push_back(
          {.Lq = 2, .Lnew = 3, .D = 64, .Dv = 128, .page_size = page_size, .before = {1, 130}, .int8 = int8});
      cases.push_back({.Lq = 3,
                       .Lnew = 40,
                       .D = 5,
                       .Dv = 64,
                       .page_size = page_size,
                       .before = {0, 0},
                       .int8 = int8,
                       .rotary_dim = 2});
    }
  }
  for (const CacheCase& c : cases) {
    const std::vector<double> exact = run<double>(c, cpu::serial());
    for (int level = 0; level < cpu::kIsaCount; ++level) {
      const auto isa = static_cast<cpu::Isa>(level);
      if (!cpu::isa_supported(isa)) continue;
      cpu::set_active_isa(isa);
      // A number on the edge between two int8 ones may fall to either side: a 127th of its row's largest.
      const double int8_bound = c.int8 ? 0.03 : 0.0;
      compare<float>(c, exact, 2e-5 + int8_bound, "float32");
      compare<testing::BFloat16>(c, exact, 0.06 + int8_bound, "bfloat16");
      compare<testing::Float16>(c, exact, 0.01 + int8_bound, "float16");
    }
  }
  return testing::report("cache_test");
}
