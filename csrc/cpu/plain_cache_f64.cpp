// New keys and values into a float64 cache, or into an int8 one from float64; core/cache.h has the formulas.
#include <cmath>
#include <limits>
#include <vector>

#include "core/cache.h"
#include "cpu/plain.h"

namespace fastattn::cpu {
namespace {

double angle(const CacheAppendParams& p, const void* table, int64_t stride, int64_t position, int64_t c) {
  const int64_t at = rotary_row(p, position) * stride + c;
  return p.rotary_dtype == DType::kFloat64 ? static_cast<const double*>(table)[at]
                                           : static_cast<double>(static_cast<const float*>(table)[at]);
}

// to = x [D], rotated for the position.
void rotate(const CacheAppendParams& p, const double* x, int64_t position, double* to) {
  for (int64_t c = p.rotary_dim; c < p.D; ++c) to[c] = x[c];
  const int64_t half = p.rotary_dim / 2;
  for (int64_t c = 0; c < half; ++c) {
    const int64_t first = p.rotary_interleaved ? 2 * c : c, second = p.rotary_interleaved ? 2 * c + 1 : c + half;
    const double cos = angle(p, p.cos, p.cos_stride, position, c), sin = angle(p, p.sin, p.sin_stride, position, c);
    to[first] = x[first] * cos - x[second] * sin;
    to[second] = x[second] * cos + x[first] * sin;
  }
}

float quantise(const double* x, int64_t columns, int8_t* to) {
  double largest = 0.0;
  bool is_finite = true;
  for (int64_t c = 0; c < columns; ++c) {
    is_finite = is_finite && std::isfinite(x[c]);
    largest = std::fmax(largest, std::fabs(x[c]));
  }
  const float scale = is_finite ? static_cast<float>(largest / 127.0) : std::numeric_limits<float>::quiet_NaN();
  for (int64_t c = 0; c < columns; ++c) {
    // A scale is not finite either where it is too large for a float.
    const bool is_zero = scale == 0.0f || !std::isfinite(scale);
    to[c] = static_cast<int8_t>(
        is_zero ? 0.0 : std::fmin(127.0, std::fmax(-127.0, std::nearbyint(x[c] / static_cast<double>(scale)))));
  }
  return std::isfinite(scale) ? scale : std::numeric_limits<float>::quiet_NaN();
}

template <typename T>
T* row_of(T* base, const int64_t (&stride)[3], int64_t batch, int64_t h, int64_t row) {
  return base + batch * stride[0] + h * stride[1] + row * stride[2];
}

void store(const double* x, int64_t columns, void* cache, const int64_t (&stride)[3], float* scales,
           const int64_t (&scale_stride)[3], const CacheRow& to, int64_t h) {
  if (scales != nullptr) {
    *row_of(scales, scale_stride, to.batch, h, to.row) =
        quantise(x, columns, row_of(static_cast<int8_t*>(cache), stride, to.batch, h, to.row));
    return;
  }
  double* row = row_of(static_cast<double*>(cache), stride, to.batch, h, to.row);
  for (int64_t c = 0; c < columns; ++c) row[c] = x[c];
}

}  // namespace

void plain_append_f64(const CacheAppendParams& p) {
  std::vector<double> rotated(static_cast<size_t>(p.D));
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t before = tokens_before(p, b);
    for (int64_t t = 0; t < p.Lnew; ++t) {
      const CacheRow to = cache_row(p, b, before + t);
      for (int64_t h = 0; h < p.Hkv; ++h) {
        const double* k = row_of(static_cast<const double*>(p.k), p.k_stride, b, h, t);
        if (p.rotary_dim != 0) {
          rotate(p, k, before + t, rotated.data());
          k = rotated.data();
        }
        store(k, p.D, p.k_cache, p.k_cache_stride, p.k_scale, p.k_scale_stride, to, h);
        store(row_of(static_cast<const double*>(p.v), p.v_stride, b, h, t), p.Dv, p.v_cache, p.v_cache_stride,
              p.v_scale, p.v_scale_stride, to, h);
      }
      const int64_t i = t - (p.Lnew - p.Lq);
      if (p.rotary_dim == 0 || i < 0) continue;
      for (int64_t h = 0; h < p.Hq; ++h) {
        rotate(p, row_of(static_cast<const double*>(p.q), p.q_stride, b, h, i), before + t,
               row_of(static_cast<double*>(p.rotated_q), p.rotated_q_stride, b, h, i));
      }
    }
  }
}

}  // namespace fastattn::cpu
