// A call of the CPU engine as a test case: its arguments, made at random; its results, forward and backward, on every
// instruction set that this processor has; and their comparison with the plain float64 path on the same (rounded)
// inputs.
//
// Buffers end where their last element ends and rows are followed by NaN, so that AddressSanitizer sees a read or write
// past an end and the comparison sees one within. Keys past kv_lengths are NaN. The tolerances are wide enough for any
// sound rounding; tests/test_parity.py has the tight bound, relative to plain code in the same type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "core/mask.h"
#include "cpu/attention.h"
#include "cpu/plain.h"
#include "testing/check.h"
#include "testing/half.h"
#include "testing/threads.h"

namespace fastattn::testing {

using cpu::Isa;
using cpu::Parallel;

template <class T>
struct Traits;
template <>
struct Traits<float> {
  static constexpr DType dtype = DType::kFloat32;
  static constexpr const char* name = "float32";
  static constexpr double output_tolerance = 2e-5, gradient_tolerance = 5e-5, lse_tolerance = 1e-5;
};
template <>
struct Traits<BFloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr const char* name = "bfloat16";
  static constexpr double output_tolerance = 1.5e-2, gradient_tolerance = 3e-2, lse_tolerance = 4e-3;
};
template <>
struct Traits<Float16> {
  static constexpr DType dtype = DType::kFloat16;
  static constexpr const char* name = "float16";
  static constexpr double output_tolerance = 2e-3, gradient_tolerance = 4e-3, lse_tolerance = 1e-4;
};
template <>
struct Traits<double> {
  static constexpr DType dtype = DType::kFloat64;
  static constexpr const char* name = "float64";
};

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline double to_double(double x) { return x; }
template <class T>
double to_double(T x) {
  return static_cast<double>(to_float(x));
}
inline void from_double(double x, double* out) { *out = x; }
inline void from_double(double, uint8_t* out) { *out = 0; }  // only ever the padding of a mask
template <class T>
void from_double(double x, T* out) {
  from_float(static_cast<float>(x), out);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

enum class Layout {
  kContiguous,
  kHeadsInRows,  // memory order (B, L, H, D)
  kPadded,       // rows three elements apart, the first one element into the buffer
  kBroadcast,    // one head and one batch serve all; for inputs only
};

template <class T>
struct Tensor {
  std::vector<T> storage;
  int64_t size[4] = {}, stride[4] = {};
  int64_t first = 0;

  Tensor() = default;
  Tensor(int64_t n0, int64_t n1, int64_t n2, int64_t n3, Layout layout) : size{n0, n1, n2, n3} {
    stride[3] = 1;
    const int64_t row = layout == Layout::kPadded ? n3 + 3 : n3;
    stride[2] = layout == Layout::kHeadsInRows ? n1 * row : row;
    stride[1] = layout == Layout::kHeadsInRows ? row : n2 * row;
    stride[0] = n1 * n2 * row;
    if (layout == Layout::kBroadcast) stride[0] = stride[1] = 0;
    first = layout == Layout::kPadded ? 1 : 0;
    int64_t last = first;
    for (int dim = 0; dim < 4; ++dim) last += (size[dim] - 1) * stride[dim];
    T poison;
    from_double(kNaN, &poison);
    if (n0 * n1 * n2 * n3 > 0) storage.assign(static_cast<size_t>(last + 1), poison);
  }

  T* data() { return storage.data() + first; }
  T& at(int64_t a, int64_t b, int64_t c, int64_t d) {
    return data()[a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]];
  }
  void copy_strides(int64_t (&out)[3]) const { std::copy(stride, stride + 3, out); }

  template <class Body>  // body(a, b, c, d)
  void for_each(Body body) const {
    for (int64_t a = 0; a < size[0]; ++a) {
      for (int64_t b = 0; b < size[1]; ++b) {
        for (int64_t c = 0; c < size[2]; ++c) {
          for (int64_t d = 0; d < size[3]; ++d) body(a, b, c, d);
        }
      }
    }
  }

  Tensor<double> to_float64() {
    Tensor<double> wide(size[0], size[1], size[2], size[3], Layout::kContiguous);
    for_each([&](int64_t a, int64_t b, int64_t c, int64_t d) { wide.at(a, b, c, d) = to_double(at(a, b, c, d)); });
    return wide;
  }
};

// Which dimensions of (B, Hq, Lq, Lk) a bias or mask has in full; it is broadcast along the others. -1: there is none.
constexpr int kNone = -1, kFullB = 1, kFullH = 2, kFullQ = 4, kFullK = 8, kFull = 15;

struct Case {
  int64_t B = 2, Hq = 2, Hkv = 2, Lq = 33, Lk = 37, D = 16, Dv = 16;
  Layout layout = Layout::kContiguous, kv_layout = Layout::kContiguous;
  Causal causal = Causal::kNone;
  int64_t left = kUnlimited, right = kUnlimited;
  double scale = 0.0;  // 0: 1 / sqrt(D)
  double softcap = 0.0;
  int bias = kNone;
  bool bias_is_float32 = false;
  bool bias_hides = false;  // some entries -inf, some rows the most negative number there is
  int mask = kNone;
  int alibi = kNone;  // kFullH: (Hq,), kFullB + kFullH: (B, Hq)
  bool sinks = false, kv_lengths = false, d_lse = false;
  double dropout_p = 0.0;
  int w = kNone;  // additive scores: 0: (D,), kFullH: (Hq, D); `scale` is not used then
  double qk_magnitude = 1.0, w_magnitude = 1.0;

  std::string name() const {
    char text[500];
    std::snprintf(text, sizeof text,
                  "B%d Hq%d Hkv%d Lq%d Lk%d D%d Dv%d layout%d,%d causal%d window(%d,%d) scale%g softcap%g bias%d%s%s "
                  "mask%d alibi%d sinks%d kv_lengths%d d_lse%d dropout%g w%d magnitude%g,%g",
                  int(B), int(Hq), int(Hkv), int(Lq), int(Lk), int(D), int(Dv), int(layout), int(kv_layout),
                  int(causal), int(left), int(right), scale, softcap, bias, bias_is_float32 ? "f" : "",
                  bias_hides ? "h" : "", mask, alibi, sinks, kv_lengths, d_lse, dropout_p, w, qk_magnitude,
                  w_magnitude);
    return text;
  }
};

// Everything at once. A test takes away what its computation does not have.
inline constexpr Case kEverything{.Hq = 6,
                                  .Lq = 75,
                                  .Lk = 140,
                                  .D = 24,
                                  .Dv = 40,
                                  .layout = Layout::kPadded,
                                  .kv_layout = Layout::kPadded,
                                  .causal = Causal::kBottomRight,
                                  .left = 90,
                                  .softcap = 5.0,
                                  .bias = kFull,
                                  .bias_hides = true,
                                  .mask = kFull,
                                  .alibi = kFullB + kFullH,
                                  .sinks = true,
                                  .kv_lengths = true,
                                  .d_lse = true,
                                  .dropout_p = 0.25};

// What random cases are drawn with.
template <class... Options>
auto pick(std::mt19937& random, Options... options) {
  const std::common_type_t<Options...> all[] = {options...};
  return all[std::uniform_int_distribution<size_t>(0, sizeof...(options) - 1)(random)];
}
inline bool chance(std::mt19937& random, double p) { return std::uniform_real_distribution<double>()(random) < p; }

template <class T>
struct Inputs {
  Tensor<T> q, k, v, d_o, bias;
  Tensor<T> w;           // [1, 1, Hq or 1, D]
  Tensor<float> bias32;  // instead of bias, where the case says so
  Tensor<uint8_t> mask;
  std::vector<Accumulator<T>> alibi, sinks, d_lse;
  std::vector<int32_t> kv_lengths;
};

template <class T>
Inputs<T> make_inputs(const Case& c, std::mt19937& random) {
  Inputs<T> in;
  std::normal_distribution<double> normal;
  const auto fill = [&](auto& tensor, double magnitude = 1.0) {
    tensor.for_each([&](int64_t a, int64_t b, int64_t i, int64_t d) {
      from_double(magnitude * normal(random), &tensor.at(a, b, i, d));
    });
  };
  const Layout d_o_layout = c.layout == Layout::kBroadcast ? Layout::kContiguous : c.layout;
  in.q = Tensor<T>(c.B, c.Hq, c.Lq, c.D, c.layout);
  in.k = Tensor<T>(c.B, c.Hkv, c.Lk, c.D, c.kv_layout);
  in.v = Tensor<T>(c.B, c.Hkv, c.Lk, c.Dv, c.kv_layout);
  in.d_o = Tensor<T>(c.B, c.Hq, c.Lq, c.Dv, d_o_layout);
  fill(in.q, c.qk_magnitude);
  fill(in.k, c.qk_magnitude);
  fill(in.v);
  fill(in.d_o);
  if (c.w != kNone) {
    const Layout w_layout = c.layout == Layout::kPadded ? Layout::kPadded : Layout::kContiguous;
    in.w = Tensor<T>(1, 1, c.w & kFullH ? c.Hq : 1, c.D, w_layout);
    fill(in.w, c.w_magnitude);
  }

  if (c.kv_lengths) {
    for (int64_t b = 0; b < c.B; ++b) {
      in.kv_lengths.push_back(static_cast<int32_t>(std::uniform_int_distribution<int64_t>(0, c.Lk)(random)));
      if (c.kv_layout == Layout::kBroadcast) continue;  // the padding of one sequence is another one's key
      for (int64_t h = 0; h < c.Hkv; ++h) {
        for (int64_t j = in.kv_lengths.back(); j < c.Lk; ++j) {
          for (int64_t d = 0; d < c.D; ++d) from_double(kNaN, &in.k.at(b, h, j, d));
          for (int64_t d = 0; d < c.Dv; ++d) from_double(kNaN, &in.v.at(b, h, j, d));
        }
      }
    }
  }

  const auto extent = [](int full, int bit, int64_t n) { return full & bit ? n : std::min<int64_t>(n, 1); };
  const auto make_bias = [&](auto& tensor, double lowest) {
    using Element = std::remove_reference_t<decltype(tensor.at(0, 0, 0, 0))>;
    tensor = Tensor<Element>(extent(c.bias, kFullB, c.B), extent(c.bias, kFullH, c.Hq), extent(c.bias, kFullQ, c.Lq),
                             extent(c.bias, kFullK, c.Lk), Layout::kContiguous);
    fill(tensor);
    if (!c.bias_hides) return;
    for (int64_t b = 0; b < tensor.size[0]; ++b) {
      for (int64_t h = 0; h < tensor.size[1]; ++h) {
        for (int64_t i = 0; i < tensor.size[2]; ++i) {
          const bool low_row = chance(random, 0.1), empty_row = chance(random, 0.05);
          for (int64_t j = 0; j < tensor.size[3]; ++j) {
            if (low_row || chance(random, 0.1)) from_double(lowest, &tensor.at(b, h, i, j));
            if (empty_row || chance(random, 0.1)) from_double(-kInfinity, &tensor.at(b, h, i, j));
          }
        }
      }
    }
  };
  if (c.bias != kNone) {
    const double float_lowest = static_cast<double>(std::numeric_limits<float>::lowest());
    if (c.bias_is_float32) {
      make_bias(in.bias32, float_lowest);
    } else if (std::is_same_v<T, BFloat16>) {
      make_bias(in.bias, -0x1.fep127);
    } else {
      // -1000 in float16: next to its most negative number, -65504, float32 rounds the scores by 0.004.
      make_bias(in.bias, std::is_same_v<T, Float16> ? -1000.0 : float_lowest);
    }
  }
  if (c.mask != kNone) {
    Tensor<uint8_t>& mask = in.mask;
    mask = Tensor<uint8_t>(extent(c.mask, kFullB, c.B), extent(c.mask, kFullH, c.Hq), extent(c.mask, kFullQ, c.Lq),
                           extent(c.mask, kFullK, c.Lk), Layout::kContiguous);
    // Blocks of 32 x 32 that are hidden, visible or mixed, so that whole tiles can be skipped; and some hidden rows.
    std::vector<int> kinds(static_cast<size_t>((mask.size[2] / 32 + 1) * (mask.size[3] / 32 + 1)));
    for (int64_t b = 0; b < mask.size[0]; ++b) {
      for (int64_t h = 0; h < mask.size[1]; ++h) {
        for (int& kind : kinds) kind = std::uniform_int_distribution<int>(0, 2)(random);
        for (int64_t i = 0; i < mask.size[2]; ++i) {
          const bool hidden_row = chance(random, 0.05);
          for (int64_t j = 0; j < mask.size[3]; ++j) {
            const int kind = kinds[static_cast<size_t>(i / 32 * (mask.size[3] / 32 + 1) + j / 32)];
            const bool kept = !hidden_row && (kind == 1 || (kind == 2 && chance(random, 0.7)));
            mask.at(b, h, i, j) = kept ? 1 : 0;
          }
        }
      }
    }
  }
  if (c.alibi != kNone) {
    for (int64_t n = 0; n < (c.alibi & kFullB ? c.B : 1) * c.Hq; ++n) {
      in.alibi.push_back(static_cast<Accumulator<T>>(std::ldexp(1.0, -1 - static_cast<int>(n % 6))));
    }
  }
  if (c.sinks) {
    for (int64_t h = 0; h < c.Hq; ++h) in.sinks.push_back(static_cast<Accumulator<T>>(normal(random)));
  }
  if (c.d_lse) {
    for (int64_t n = 0; n < c.B * c.Hq * c.Lq; ++n) in.d_lse.push_back(static_cast<Accumulator<T>>(normal(random)));
  }
  return in;
}

template <class T>
Inputs<double> to_float64(const Case& c, Inputs<T>& in) {
  Inputs<double> wide;
  wide.q = in.q.to_float64();
  wide.k = in.k.to_float64();
  wide.v = in.v.to_float64();
  wide.d_o = in.d_o.to_float64();
  wide.w = in.w.to_float64();
  wide.bias = c.bias_is_float32 ? in.bias32.to_float64() : in.bias.to_float64();
  wide.mask = in.mask;
  wide.alibi.assign(in.alibi.begin(), in.alibi.end());
  wide.sinks.assign(in.sinks.begin(), in.sinks.end());
  wide.d_lse.assign(in.d_lse.begin(), in.d_lse.end());
  wide.kv_lengths = in.kv_lengths;
  return wide;
}

template <class T>
struct Results {
  Tensor<T> o, dq, dk, dv;
  Tensor<Accumulator<T>> lse, row_max, row_sum;  // [B, Hq, Lq, 1]
  Tensor<Accumulator<T>> d_bias, d_sinks;        // d_sinks: [1, 1, 1, Hq]
  Tensor<Accumulator<T>> dw;                     // w's size
};

template <class Element>
void broadcast_strides(const Tensor<Element>& tensor, int64_t (&out)[4]) {
  for (int dim = 0; dim < 4; ++dim) out[dim] = tensor.size[dim] == 1 ? 0 : tensor.stride[dim];
}

inline Layout output_layout(Layout layout) { return layout == Layout::kBroadcast ? Layout::kContiguous : layout; }

// The arguments; results are the caller's to add.
template <class T>
AttentionParams make_params(const Case& c, Inputs<T>& in) {
  AttentionParams p;
  p.dtype = Traits<T>::dtype;
  p.B = c.B;
  p.Hq = c.Hq;
  p.Hkv = c.Hkv;
  p.Lq = c.Lq;
  p.Lk = c.Lk;
  p.D = c.D;
  p.Dv = c.Dv;
  p.q = in.q.data();
  p.k = in.k.data();
  p.v = in.v.data();
  in.q.copy_strides(p.q_stride);
  in.k.copy_strides(p.k_stride);
  in.v.copy_strides(p.v_stride);
  p.scale = c.scale != 0.0 ? c.scale : 1.0 / std::sqrt(static_cast<double>(c.D));
  p.softcap = c.softcap;
  if (c.bias != kNone) {
    const bool is_float32 = c.bias_is_float32 && !std::is_same_v<T, double>;
    if (is_float32) {
      p.bias = in.bias32.data();
      p.bias_dtype = DType::kFloat32;
      broadcast_strides(in.bias32, p.bias_stride);
    } else {
      p.bias = in.bias.data();
      p.bias_dtype = Traits<T>::dtype;
      broadcast_strides(in.bias, p.bias_stride);
    }
  }
  if (c.mask != kNone) {
    p.mask = in.mask.data();
    broadcast_strides(in.mask, p.mask_stride);
  }
  if (c.alibi != kNone) {
    p.alibi_slopes = in.alibi.data();
    p.alibi_stride[0] = c.alibi & kFullB ? c.Hq : 0;
    p.alibi_stride[1] = 1;
  }
  if (c.sinks) p.sinks = in.sinks.data();
  if (c.w != kNone) {
    p.w = in.w.data();
    p.w_stride = c.w & kFullH ? in.w.stride[2] : 0;
  }
  if (c.kv_lengths) p.kv_lengths = in.kv_lengths.data();
  p.causal = c.causal;
  p.window_left = c.left;
  p.window_right = c.right;
  p.dropout_p = c.dropout_p;
  p.seed = 0x9876543210fedcbaull;
  p.offset = 3;
  return p;
}

template <class T>
Results<T> run(const Case& c, Inputs<T>& in, const Parallel& parallel) {
  Results<T> r;
  r.o = Tensor<T>(c.B, c.Hq, c.Lq, c.Dv, output_layout(c.layout));
  r.dq = Tensor<T>(c.B, c.Hq, c.Lq, c.D, output_layout(c.layout));
  r.dk = Tensor<T>(c.B, c.Hkv, c.Lk, c.D, output_layout(c.kv_layout));
  r.dv = Tensor<T>(c.B, c.Hkv, c.Lk, c.Dv, output_layout(c.kv_layout));
  for (auto* stat : {&r.lse, &r.row_max, &r.row_sum}) *stat = {c.B, c.Hq, c.Lq, 1, Layout::kContiguous};

  AttentionGradParams g;
  AttentionParams& p = g.forward;
  p = make_params(c, in);
  p.o = r.o.data();
  r.o.copy_strides(p.o_stride);
  p.lse = r.lse.data();
  p.row_max = r.row_max.data();
  p.row_sum = r.row_sum.data();
  if constexpr (std::is_same_v<T, double>) {
    cpu::plain_forward_f64(p, parallel);
  } else {
    cpu::attention_forward(p, parallel);
  }

  p.lse = nullptr;
  if (c.bias != kNone) {
    const int64_t* size = c.bias_is_float32 && !std::is_same_v<T, double> ? in.bias32.size : in.bias.size;
    r.d_bias = {size[0], size[1], size[2], size[3], Layout::kContiguous};
    g.d_bias = r.d_bias.data();
    broadcast_strides(r.d_bias, g.d_bias_stride);
  }
  if (c.sinks) {
    r.d_sinks = {1, 1, 1, c.Hq, Layout::kContiguous};
    g.d_sinks = r.d_sinks.data();
  }
  if (c.w != kNone) {
    r.dw = {1, 1, in.w.size[2], c.D, Layout::kContiguous};
    g.dw = r.dw.data();
  }
  g.d_o = in.d_o.data();
  in.d_o.copy_strides(g.d_o_stride);
  if (c.d_lse) g.d_lse = in.d_lse.data();
  g.dq = r.dq.data();
  g.dk = r.dk.data();
  g.dv = r.dv.data();
  r.dq.copy_strides(g.dq_stride);
  r.dk.copy_strides(g.dk_stride);
  r.dv.copy_strides(g.dv_stride);
  if constexpr (std::is_same_v<T, double>) {
    cpu::plain_backward_f64(g, {g}, parallel);
  } else {
    cpu::attention_backward(g, parallel);
  }
  return r;
}

// `least` is the smallest magnitude that the tolerance is taken relative to.
template <class T>
void compare(const char* what, const std::string& label, Tensor<T>& got, Tensor<double>& expected, double tolerance,
             double least = 1.0) {
  double largest = least;
  for (const double x : expected.storage) {
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  }
  double worst = 0.0;
  int64_t at[4] = {};
  bool elements_match = true;
  expected.for_each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
    const double x = to_double(got.at(a, b, c, d)), y = expected.at(a, b, c, d);
    const bool matches = std::isfinite(y) ? std::abs(x - y) <= tolerance * largest : x == y;
    // A difference that is NaN or infinite is as bad as can be.
    const double difference = matches && !std::isfinite(y) ? 0.0 : std::abs(x - y);
    if (!matches) elements_match = false;
    if (!(difference <= worst)) {
      worst = difference;
      const int64_t here[4] = {a, b, c, d};
      std::copy(here, here + 4, at);
    }
  });
  CHECK(elements_match, "%s: %s differs by %g at [%d, %d, %d, %d]: %g, not %g (largest %g)", label.c_str(), what, worst,
        int(at[0]), int(at[1]), int(at[2]), int(at[3]), to_double(got.at(at[0], at[1], at[2], at[3])),
        expected.at(at[0], at[1], at[2], at[3]), largest);
}

template <class T>
bool same_bits(const Tensor<T>& a, const Tensor<T>& b) {
  return a.storage.size() == b.storage.size() &&
         (a.storage.empty() || std::memcmp(a.storage.data(), b.storage.data(), a.storage.size() * sizeof(T)) == 0);
}

// Elements between the rows of an output are NaN still.
template <class T>
bool padding_is_untouched(Tensor<T> tensor) {
  T zero, poison;
  from_double(0.0, &zero);
  from_double(kNaN, &poison);
  tensor.for_each([&](int64_t a, int64_t b, int64_t c, int64_t d) { tensor.at(a, b, c, d) = poison; });
  for (const T& x : tensor.storage) {
    if (std::memcmp(&x, &poison, sizeof x) != 0) return false;
  }
  return true;
}

template <class T>
bool is_zero_row(Tensor<T>& tensor, int64_t a, int64_t b, int64_t row) {
  for (int64_t d = 0; d < tensor.size[3]; ++d) {
    if (to_double(tensor.at(a, b, row, d)) != 0.0) return false;
  }
  return true;
}

template <class T>
void check_results(const Case& c, const Inputs<T>& in, Results<T>& got, Results<double>& expected,
                   const std::string& label) {
  compare("o", label, got.o, expected.o, Traits<T>::output_tolerance);
  compare("lse", label, got.lse, expected.lse, Traits<T>::lse_tolerance);
  compare("row_max", label, got.row_max, expected.row_max, Traits<T>::lse_tolerance);
  compare("row_sum", label, got.row_sum, expected.row_sum, 4 * Traits<T>::lse_tolerance);
  // A score's gradient is the difference of two products of d_o, of about sqrt(Dv) each, and may cancel, within a row
  // and between the rows that are summed: the error is relative to what was there before.
  const double keep_scale = c.dropout_p < 1.0 ? 1.0 / (1.0 - c.dropout_p) : 1.0;
  const auto noise = [&](double rows) {
    return std::max(1.0, 0.5 * keep_scale * std::sqrt(rows * static_cast<double>(c.Dv)));
  };
  const double factor = c.w != kNone ? 2.0 * c.w_magnitude : std::abs(c.scale) * std::sqrt(static_cast<double>(c.D));
  const double weight = std::max(1.0, factor);
  const int64_t all_rows = c.B * c.Hq * c.Lq, group_rows = c.Hkv > 0 ? c.Hq / c.Hkv * c.Lq : 0;
  const int64_t bias_rows = std::max<int64_t>(got.d_bias.size[0] * got.d_bias.size[1] * got.d_bias.size[2], 1);
  const double tolerance = Traits<T>::gradient_tolerance;
  compare("dq", label, got.dq, expected.dq, tolerance, weight * noise(1.0));
  compare("dk", label, got.dk, expected.dk, tolerance, weight * noise(static_cast<double>(group_rows)));
  compare("dv", label, got.dv, expected.dv, tolerance);
  compare("d_bias", label, got.d_bias, expected.d_bias, tolerance,
          noise(static_cast<double>(all_rows) / static_cast<double>(bias_rows)));
  compare("d_sinks", label, got.d_sinks, expected.d_sinks, tolerance, noise(static_cast<double>(c.B * c.Lq)));
  compare("dw", label, got.dw, expected.dw, tolerance,
          noise(static_cast<double>(c.w == kFullH ? c.B * c.Lq : all_rows)));
  for (const auto* output : {&got.o, &got.dq, &got.dk, &got.dv}) {
    CHECK(padding_is_untouched(*output), "%s: output %d", label.c_str(),
          output == &got.o    ? 0
          : output == &got.dq ? 1
          : output == &got.dk ? 2
                              : 3);
  }

  // What sees nothing or is not seen is exactly zero, not merely small.
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t h = 0; h < c.Hq; ++h) {
      for (int64_t i = 0; i < c.Lq; ++i) {
        if (expected.row_sum.at(b, h, i, 0) != 0.0) continue;
        CHECK(is_zero_row(got.o, b, h, i) && is_zero_row(got.dq, b, h, i), "%s: [%d, %d, %d]", label.c_str(), int(b),
              int(h), int(i));
      }
    }
    for (int64_t h = 0; h < c.Hkv; ++h) {
      for (int64_t j = c.kv_lengths ? in.kv_lengths[static_cast<size_t>(b)] : c.Lk; j < c.Lk; ++j) {
        CHECK(is_zero_row(got.dk, b, h, j) && is_zero_row(got.dv, b, h, j), "%s: [%d, %d, %d]", label.c_str(), int(b),
              int(h), int(j));
      }
    }
  }
}

template <class T>
bool same_bits(const Results<T>& a, const Results<T>& b) {
  return same_bits(a.o, b.o) && same_bits(a.lse, b.lse) && same_bits(a.dq, b.dq) && same_bits(a.dk, b.dk) &&
         same_bits(a.dv, b.dv) && same_bits(a.d_bias, b.d_bias) && same_bits(a.d_sinks, b.d_sinks) &&
         same_bits(a.dw, b.dw);
}

// Calls body(name) on every instruction set that this processor and build have.
template <class Body>
void on_every_isa(Body body) {
  for (int level = 0; level < cpu::kIsaCount; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (!cpu::isa_supported(isa)) continue;
    cpu::set_active_isa(isa);
    body(cpu::isa_name(isa));
  }
}

// The same on those that have code of their own for a type. A level named after bfloat16 dot products hands everything
// else, additive scores among it, on to the level before it; check_shared_levels holds it to that.
template <class T, class Body>
void on_every_own_isa(const Case& c, Body body) {
  on_every_isa([&](const char* isa) {
    const bool is_for_bf16 = std::string(isa).ends_with("_bf16");
    if (!is_for_bf16 || (std::is_same_v<T, BFloat16> && c.w == kNone)) body(isa);
  });
}

inline void print_isas() {
  for (int level = 0; level < cpu::kIsaCount; ++level) {
    const Isa isa = static_cast<Isa>(level);
    std::printf("%s: %s\n", cpu::isa_name(isa),
                cpu::isa_supported(isa) ? "tested" : "SKIPPED, not supported by this processor or build");
  }
}

// thread_counts: results must be the same with each.
template <class T>
void check_inputs(const Case& c, Inputs<T>& in, const std::vector<int>& thread_counts = {2, 5}) {
  Inputs<double> wide = to_float64(c, in);
  Results<double> expected = run(c, wide, cpu::serial());
  if (std::is_same_v<T, float>) {  // of one type's inputs, for this is the slowest path of all
    CHECK(same_bits(expected, run(c, wide, threads(3))), "%s %s: depends on the threads", Traits<double>::name,
          c.name().c_str());
  }
  on_every_own_isa<T>(c, [&](const char* isa) {
    const std::string label = std::string(Traits<T>::name) + " " + isa + " " + c.name();
    Results<T> got = run(c, in, threads(thread_counts[0]));
    check_results(c, in, got, expected, label);
    for (const int count : thread_counts) {
      CHECK(same_bits(got, run(c, in, threads(count))), "%s: depends on the threads, %d", label.c_str(), count);
    }
  });
}

template <class T>
void check_case(const Case& c, unsigned seed, const std::vector<int>& thread_counts = {2, 5}) {
  std::mt19937 random(seed);
  Inputs<T> in = make_inputs<T>(c, random);
  check_inputs(c, in, thread_counts);
}

// The same bits on a level and on the one that hands this case on to it.
template <class T>
void check_shared_levels(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  Inputs<T> in = make_inputs<T>(c, random);
  Results<T> before;
  on_every_isa([&](const char* isa) {
    Results<T> got = run(c, in, threads(2));
    CHECK(!std::string(isa).ends_with("_bf16") || same_bits(got, before), "%s %s: %s", Traits<T>::name, isa,
          c.name().c_str());
    before = std::move(got);
  });
}

}  // namespace fastattn::testing
