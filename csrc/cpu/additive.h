// Additive scores (Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate",
// 2015, appendix A.1.2), and what flows back through them:
//
//   s_ij  = sum_d w_d t_ijd                t = tanh(q_id + k_jd)
//   dq_id = w_d sum_j dS_ij (1 - t^2)      dk_jd = w_d sum_i dS_ij (1 - t^2)      dw_d = sum_ij dS_ij t_ijd
//
// A tanh for each (i, j, d) would cost some twenty operations. Instead one function of each q_id and each k_jd is
// computed once, and t from the two by one of three formulas, chosen tile by tile:
//
//   kExponential   a = e^(2q), b = e^(2k)    t / 2 = 1/2 - 1 / (1 + a b)    a multiply-add, a reciprocal, a subtraction
//   kAddition      a = tanh q, b = tanh k    t = (a + b) / (1 + a b)        one multiplication more
//   kDirect        q and k themselves        t = tanh(q + k)
//
// kExponential errs by some 4e-8 however small t is, so that small q and k need kAddition, whose error is relative to a
// and b; but where q and k are large and opposite, a + b has lost what they differ by. Exponentials must not overflow
// either: see kNear and kFar. What is left, tiles where both q and k hold numbers beyond kNear, is computed directly.
//
// Scores have lanes = query rows, as everywhere, or lanes = head dims where rows are few; the gradients have lanes =
// head dims. No bfloat16 dot products: 16-bit elements are widened.
#pragma once

#include "cpu/operands.h"
#include "cpu/tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

enum class TanhForm { kExponential, kAddition, kDirect };

// Up to here kAddition errs no more than tanh(q + k) with q + k rounded does: 1 / (1 - a^2) < 2.4 is what it makes of
// the errors of a and b in the worst case, q = -k.
constexpr float kAdditionLimit = 1.0f;

// Exponents are limited to 2 kFar. With the other one at most 2 kNear nothing overflows, since 2 (kNear + kFar) = 87 <
// log(FLT_MAX); and nothing changes, since where the limit is felt |q + k| > kFar - kNear = 17.5, and 1 - |t| < 2e-15.
constexpr float kNear = 13.0f, kFar = 30.5f;

// The form that suits a tile, given the largest magnitudes in q and in k.
FASTATTN_FN TanhForm tanh_form(float largest_q, float largest_k) {
  if (largest_q <= kAdditionLimit && largest_k <= kAdditionLimit) return TanhForm::kAddition;
  return largest_q <= kNear || largest_k <= kNear ? TanhForm::kExponential : TanhForm::kDirect;
}

// One of the two operands, of a number x.
template <TanhForm kForm>
FASTATTN_FN Vf tanh_operand(Vf x) {
  if constexpr (kForm == TanhForm::kDirect) return x;
  if constexpr (kForm == TanhForm::kAddition) return vtanh(x);
  const Vf limited = vmax(vset(-kFar), vmin(vset(kFar), x));  // in this order they keep a NaN
  return vexp_precise(vadd(limited, limited));
}

// What stands for 1 in the results of tanh_of_sum.
template <TanhForm kForm>
constexpr float kOne = kForm == TanhForm::kExponential ? 0.5f : 1.0f;

// tanh(q + k) times kOne, from the operands.
template <TanhForm kForm, bool kRefined>
FASTATTN_FN Vf tanh_of_sum(Vf a, Vf b) {
  if constexpr (kForm == TanhForm::kDirect) return vtanh(vadd(a, b));
  const Vf inverse = vreciprocal<kRefined>(vfma(a, b, vset(1.0f)));
  return kForm == TanhForm::kAddition ? vmul(vadd(a, b), inverse) : vsub(vset(0.5f), inverse);
}

// Bfloat16 does with reciprocals of 14 bits. Float16 does not: their errors are alike for all large q + k, so that in a
// sum over the head dims they add up.
template <class Operands>
constexpr bool kRefinedFor = Operands::Element::kBits > 8;

template <class Operands>
FASTATTN_FN bool is_additive(const AttentionParams& p) {
  return !Operands::kPairs && p.w != nullptr;
}

// Keys whose gradients are held in registers at a time.
constexpr int64_t kAdditiveKeys = 4;

// Up to this many rows lanes = head dims take fewer operations than lanes = rows, most of which would be empty.
constexpr int64_t kFewRows = kLanes / 2;

// A block of rows of q or k as operands of tanh_of_sum, in the form that was wanted last.
template <class Operands>
struct TanhRows {
  using Raw = typename Operands::Raw;
  const Raw* from = nullptr;  // the caller's rows
  int64_t stride = 0, count = 0, D = 0;
  float* panels = nullptr;  // the rows transposed, by panels (pack.h); null: not wanted
  float* rows = nullptr;    // [count, up to a multiple of kAdditiveKeys][padded D], zeros added; null: not wanted
  float largest = 0.0f;     // magnitude; a NaN has none
  TanhForm form = TanhForm::kDirect;

  inline void load() {
    const int64_t width = Operands::padded(D);
    if (panels != nullptr) Operands::transposed(panels, from, stride, count, D, 1.0f);
    if (rows != nullptr) {
      widen_rows<typename Operands::Element>(rows, width, from, stride, count, D, round_up(count, kAdditiveKeys),
                                             width);
    }
    Vf magnitude = vzero();
    for_each_vector([&](float* at) {
      const Vf x = vload(at);
      magnitude = vmax(vabs(x), magnitude);
      // Every NaN becomes the one that vexp keeps: it adds a NaN's last bits to the exponent.
      vstore(at, vselect(vequal(x, x), x, vset(__builtin_nanf(""))));
    });
    largest = vreduce_max(magnitude);
    form = TanhForm::kDirect;
  }

  inline void take_form(TanhForm wanted) {
    if (form == wanted) return;
    if (form != TanhForm::kDirect) load();
    if (wanted == TanhForm::kExponential) convert<TanhForm::kExponential>();
    if (wanted == TanhForm::kAddition) convert<TanhForm::kAddition>();
  }

  inline Operand operand() const {
    return {reinterpret_cast<const char*>(rows), Operands::padded(D) * static_cast<int64_t>(sizeof(float))};
  }

 private:
  template <TanhForm kForm>
  inline void convert() {
    for_each_vector([](float* at) { vstore(at, tanh_operand<kForm>(vload(at))); });
    form = kForm;
  }

  // Calls body with the address of every vector that load() has filled.
  template <class Body>
  inline void for_each_vector(const Body& body) const {
    for (int64_t r = 0; panels != nullptr && r < count; r += kLanes) {
      float* at = panels + panel_offset(r, Operands::transposed_columns(D));
      for (int64_t d = 0; d < D; ++d) body(at + d * kPanelRows);
    }
    const int64_t numbers = rows != nullptr ? round_up(count, kAdditiveKeys) * Operands::padded(D) : 0;
    for (int64_t at = 0; at < numbers; at += kLanes) body(rows + at);
  }
};

// Brings the two sides of a tile to the form that suits both.
template <class Operands>
inline void take_common_form(TanhRows<Operands>& queries, TanhRows<Operands>& keys) {
  const TanhForm form = tanh_form(queries.largest, keys.largest);
  queries.take_form(form);
  keys.take_form(form);
}

// The rows of q of a block, for scores alone, in one piece of memory of transposed_columns(D) * kBlockRows floats.
template <class Operands>
inline TanhRows<Operands> score_rows(const typename Operands::Raw* from, int64_t stride, int64_t count, int64_t D,
                                     float* memory) {
  TanhRows<Operands> q{from, stride, count, D};
  (count <= kFewRows ? q.rows : q.panels) = memory;
  q.load();
  return q;
}

// A block of keys.
template <class Operands>
inline TanhRows<Operands> key_rows(const typename Operands::Raw* from, int64_t stride, int64_t count, int64_t D,
                                   float* memory) {
  TanhRows<Operands> k{from, stride, count, D, nullptr, memory};
  k.load();
  return k;
}

// w of a head, with zeros up to whole vectors.
template <class Operands>
inline void load_w(const AttentionParams& p, int64_t hq, float* to) {
  using Raw = typename Operands::Raw;
  const int64_t width = Operands::padded(p.D);
  widen_rows<typename Operands::Element>(to, width, static_cast<const Raw*>(p.w) + hq * p.w_stride, 0, 1, p.D, 1,
                                         width);
}

// Scores of nk keys, k [key][width], and NV vectors of rows, q [d][kPanelRows], to s [key][s_stride].
template <int NV, TanhForm kForm, bool kRefined>
inline void score_panel(const float* q, const float* k, int64_t width, const float* w, int64_t D, int64_t nk, float* s,
                        int64_t s_stride) {
  constexpr int kKeys = 2;
  // Terms are summed by so many first: the rounding of a sum grows with the terms that it has.
  constexpr int64_t kTerms = 32;
  for (int64_t c = 0; c < nk; c += kKeys) {
    const float* keys[kKeys];
    Vf sum[kKeys][NV];
    for (int n = 0; n < kKeys; ++n) {
      keys[n] = k + min_i64(c + n, nk - 1) * width;
      for (int i = 0; i < NV; ++i) sum[n][i] = vzero();
    }
    for (int64_t d0 = 0; d0 < D; d0 += kTerms) {
      Vf part[kKeys][NV];
      for (int n = 0; n < kKeys; ++n) {
        for (int i = 0; i < NV; ++i) part[n][i] = vzero();
      }
      for (int64_t d = d0; d < min_i64(D, d0 + kTerms); ++d) {
        const Vf weight = vset(w[d]);
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) {
          const Vf row = vload(q + d * kPanelRows + i * kLanes);
#pragma GCC unroll 2
          for (int n = 0; n < kKeys; ++n) {
            part[n][i] = vfma(weight, tanh_of_sum<kForm, kRefined>(row, vset(keys[n][d])), part[n][i]);
          }
        }
      }
      for (int n = 0; n < kKeys; ++n) {
        for (int i = 0; i < NV; ++i) sum[n][i] = vadd(sum[n][i], part[n][i]);
      }
    }
    for (int n = 0; n < kKeys && c + n < nk; ++n) {
      for (int i = 0; i < NV; ++i) {
        vstore(s + (c + n) * s_stride + i * kLanes, vmul(vset(1.0f / kOne<kForm>), sum[n][i]));
      }
    }
  }
}

// The same with lanes = head dims, for the first vector of rows, of which there are `rows`: q [row][width].
template <TanhForm kForm, bool kRefined>
inline void score_rows_one_by_one(const float* q, int64_t rows, const float* k, int64_t width, const float* w,
                                  int64_t nk, float* s, int64_t s_stride) {
  for (int64_t c = 0; c < nk; ++c) {
    float lanes[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      Vf sum = vzero();
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vf t = tanh_of_sum<kForm, kRefined>(vload(q + r * width + d), vload(k + c * width + d));
        sum = vfma(vload(w + d), t, sum);
      }
      lanes[r] = vreduce_add(sum) * (1.0f / kOne<kForm>);
    }
    vstore(s + c * s_stride, vload(lanes));
  }
}

template <int NV, TanhForm kForm, class Operands>
inline void additive_scores_as(const TanhRows<Operands>& queries, int v0, const float* k, const float* w, int64_t nk,
                               float* s, int64_t s_stride) {
  constexpr bool kRefined = kRefinedFor<Operands>;
  const int64_t D = queries.D, width = Operands::padded(D);
  if (queries.panels != nullptr) {
    const float* q = queries.panels + panel_offset(v0 * kLanes, Operands::transposed_columns(D));
    return score_panel<NV, kForm, kRefined>(q, k, width, w, D, nk, s, s_stride);
  }
  score_rows_one_by_one<kForm, kRefined>(queries.rows, queries.count, k, width, w, nk, s, s_stride);
}

// Scores of NV vectors of rows from vector v0 on, and nk keys in the queries' form, to s [key][s_stride].
template <int NV, class Operands>
inline void additive_scores(const TanhRows<Operands>& queries, int v0, Operand keys, const float* w, int64_t nk,
                            float* s, int64_t s_stride) {
  const float* k = reinterpret_cast<const float*>(keys.data);
  switch (queries.form) {
    case TanhForm::kExponential:
      return additive_scores_as<NV, TanhForm::kExponential>(queries, v0, k, w, nk, s, s_stride);
    case TanhForm::kAddition:
      return additive_scores_as<NV, TanhForm::kAddition>(queries, v0, k, w, nk, s, s_stride);
    case TanhForm::kDirect:
      return additive_scores_as<NV, TanhForm::kDirect>(queries, v0, k, w, nk, s, s_stride);
  }
}

// What flows back through a tile's scores: ds [key][kBlockRows] are their gradients, 0 for the keys past the last one,
// up to a multiple of kAdditiveKeys. Adds to dq [row][dq_stride], dk [key][padded D] and dw.
struct AdditiveGradients {
  const float* ds;
  float* dq;
  int64_t dq_stride;
  float *dk, *dw;
};

// rows_of(first_key, keys): the rows that see any of these keys.
template <TanhForm kForm, bool kRefined, class RowsOf>
inline void add_additive_gradients_as(const float* q, int64_t rows, const float* k, int64_t nk, int64_t width,
                                      const float* w, const AdditiveGradients& g, const RowsOf& rows_of) {
  // The block's rows, one vector of head dims wide: contiguous, for rows of a matrix fall into few sets of the cache.
  alignas(64) float q_lanes[kBlockRows * kLanes], dq_lanes[kBlockRows * kLanes];
  constexpr float kOneSquared = kOne<kForm> * kOne<kForm>;
  for (int64_t d = 0; d < width; d += kLanes) {
    for (int64_t r = 0; r < rows; ++r) {
      vstore(q_lanes + r * kLanes, vload(q + r * width + d));
      vstore(dq_lanes + r * kLanes, vzero());
    }
    const Vf slope = vmul(vset(1.0f / kOneSquared), vload(w + d));
    Vf dw = vzero();
    for (int64_t c = 0; c < nk; c += kAdditiveKeys) {
      Vf key[kAdditiveKeys], dk[kAdditiveKeys], dw_here = vzero();
      for (int n = 0; n < kAdditiveKeys; ++n) {
        key[n] = vload(k + (c + n) * width + d);
        dk[n] = vzero();
      }
      const TileSpan span = rows_of(c, min_i64(kAdditiveKeys, nk - c));
      for (int64_t r = span.begin; r < span.end; ++r) {
        const Vf row = vload(q_lanes + r * kLanes);
        const float* ds = g.ds + c * kBlockRows + r;
        Vf dq = vzero();
#pragma GCC unroll 4
        for (int n = 0; n < kAdditiveKeys; ++n) {
          const Vf t = tanh_of_sum<kForm, kRefined>(row, key[n]);
          const Vf x = vset(ds[n * kBlockRows]);
          const Vf derivative = vnegative_fma(t, t, vset(kOneSquared));
          dq = vfma(x, derivative, dq);
          dk[n] = vfma(x, derivative, dk[n]);
          dw_here = vfma(x, t, dw_here);
        }
        vstore(dq_lanes + r * kLanes, vadd(vload(dq_lanes + r * kLanes), dq));
      }
      for (int n = 0; n < kAdditiveKeys && c + n < nk; ++n) {
        float* to = g.dk + (c + n) * width + d;
        vstore(to, vfma(slope, dk[n], vload(to)));
      }
      dw = vadd(dw, dw_here);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* to = g.dq + r * g.dq_stride + d;
      vstore(to, vfma(slope, vload(dq_lanes + r * kLanes), vload(to)));
    }
    vstore(g.dw + d, vfma(vset(1.0f / kOne<kForm>), dw, vload(g.dw + d)));
  }
}

template <class Operands, class RowsOf>
inline void add_additive_gradients(const TanhRows<Operands>& queries, const TanhRows<Operands>& keys, const float* w,
                                   const AdditiveGradients& g, const RowsOf& rows_of) {
  constexpr bool kRefined = kRefinedFor<Operands>;
  const float *q = queries.rows, *k = keys.rows;
  const int64_t rows = queries.count, nk = keys.count, width = Operands::padded(keys.D);
  switch (queries.form) {
    case TanhForm::kExponential:
      return add_additive_gradients_as<TanhForm::kExponential, kRefined>(q, rows, k, nk, width, w, g, rows_of);
    case TanhForm::kAddition:
      return add_additive_gradients_as<TanhForm::kAddition, kRefined>(q, rows, k, nk, width, w, g, rows_of);
    case TanhForm::kDirect:
      return add_additive_gradients_as<TanhForm::kDirect, kRefined>(q, rows, k, nk, width, w, g, rows_of);
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
