// What there is to know of attention weights without holding them: p_ij = exp(s_ij - lse_i), with every modifier.
//
//   lse_i = m + log l        m, l: row maximum and sum of exp(s - m), a sink included
//   entropy_i = -sum_j p_ij log p_ij = log l - t / l        t = sum_j exp(s_ij - m) (s_ij - m)
//   max_weight_i, top_weights_i: the largest p_ij, and the top_k largest with their keys
//   key_mass_j = sum of p_ij over the rows that count
//
// Two passes. `summary_rows` walks over the keys of a tile of rows once: m, l and t are brought to a new maximum
// together, t by t + l (m_old - m_new), whose terms all have one sign. `summary_mass` walks over the rows of a tile of
// keys, with each row's m and 1 / l from the first pass, and adds up in the order of the rows.
//
// The largest scores of a row are a sorted list in the results' own memory, which one lane keeps: that of the row's
// four lanes which has its number. Only scores above the last of a full list are looked at: the lanes compare against
// it in registers and exchange bits, and only where any row of the warp has such a score does a tile of scores go by
// way of shared memory. How often depends on the order of the keys; for keys in no order, the n-th one joins a list of
// top_k with the chance top_k / n.
#pragma once

#include "cuda/finish.cuh"
#include "cuda/score_walk.cuh"

namespace fastattn::cuda {

struct SummaryKernelParams {
  WalkParams walk;
  F32x4* row_stats = nullptr;  // [B, Hq, Lq]: m, 1 / l or 0 for a row that does not count; null without key_mass

  float* entropy = nullptr;      // [B, Hq, Lq]
  float* max_weight = nullptr;   // [B, Hq, Lq]
  float* top_weights = nullptr;  // [B, Hq, Lq, top_k]; scores, until the walk is over
  int64_t* top_index = nullptr;  // [B, Hq, Lq, top_k]
  int top_k = 0;
  float* key_mass = nullptr;          // [B, Hq, Lk]
  const uint8_t* row_mask = nullptr;  // [B, Hq, Lq]
  int64_t row_mask_stride[3] = {};
};

// The largest scores of a row, the largest first; of one lane alone.
struct TopList {
  float* scores;
  int64_t* keys;
  int capacity;
  int count;

  // Keys come in ascending order, so that a score goes behind those that it equals: the lower key first. Only for a
  // score above threshold().
  FASTATTN_ALWAYS_INLINE void insert(float score, int key) {
    int place = count < capacity ? count++ : capacity - 1;
    for (; place > 0 && scores[place - 1] < score; --place) {
      scores[place] = scores[place - 1];
      keys[place] = keys[place - 1];
    }
    scores[place] = score;
    keys[place] = key;
  }
  FASTATTN_ALWAYS_INLINE float threshold() const { return count < capacity ? -kInfinity : scores[capacity - 1]; }
};

template <DType kType, int kDim_>
struct SummaryRowsKernel {
  using Params = SummaryKernelParams;
  using Walk = RowWalk<kType, kDim_, true>;
  static constexpr int kDim = kDim_;
  static constexpr const char* kName = "summary_rows";
  static constexpr int kBlockM = Walk::kBlockM, kBlockN = Walk::kBlockN, kThreads = Walk::kThreads, kN = Walk::kN;
  static constexpr int kWords = (kBlockN + 31) / 32;  // of a bit for each key of a tile

  // Behind the walk's tiles, the scores of each warp's 16 rows. The pitch takes rows 0 to 3 of eight to different
  // banks, and a swizzle of single words rows 4 to 7 in between.
  static constexpr int kPitch = kBlockN + 8;
  static constexpr int kWarpBytes = 16 * kPitch * 4;
  static constexpr int kSharedBytes = Walk::kSharedBytes + Walk::kWarps * kWarpBytes;
  static constexpr int kMinBlocks = 2;
  static_assert(kSharedBytes <= 99 * 1024);
  FASTATTN_DEVICE SharedAddress score_address(int row, int column) {
    return shared_base() + static_cast<SharedAddress>(Walk::kSharedBytes + warp_index() * kWarpBytes +
                                                      (row * kPitch + (column ^ (row >> 2 & 1))) * 4);
  }

  // Of the lane's two rows.
  struct State {
    float m[2], l[2], t[2];
    float threshold[2];  // the least score of a full list, which others must exceed
  };

  FASTATTN_DEVICE void run(const Params& p) {
    State state;
    TopList list = {nullptr, nullptr, p.top_k, 0};
    {
      const typename Walk::Place at = Walk::place_again(p.walk);
      const AttentionParams& a = p.walk.attention;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        state.m[n] = -kInfinity;
        state.l[n] = state.t[n] = 0.0f;
        // A row beyond the last keeps no list.
        state.threshold[n] = Walk::lane_row() + 8 * n < at.rows ? -kInfinity : kInfinity;
      }
      const int64_t row = (static_cast<int64_t>(at.b) * a.Hq + at.h) * a.Lq + at.i0 + own_row();
      if (p.top_k > 0) {
        list.scores = p.top_weights + row * p.top_k;
        list.keys = p.top_index + row * p.top_k;
      }
    }
    Walk::run(p.walk, [&](typename Walk::Scores& s, int j0, SharedAddress) {
      add(s, state);
      if (p.top_k > 0) select(s, state, list, j0);
    });
    finish(state, list, p);
  }

  // Lane t of a row's four keeps the list of the lane's row t: 0 or 1.
  FASTATTN_DEVICE bool is_owner() { return (lane_index() & 2) == 0; }
  FASTATTN_DEVICE int own_row() { return Walk::lane_row() + 8 * (lane_index() & 1); }

  FASTATTN_DEVICE void add(const typename Walk::Scores& s, State& state) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float m = state.m[n];
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) m = fmaxf(m, fmaxf(s[0][tile][2 * n], s[0][tile][2 * n + 1]));
      m = fmaxf(m, shuffle_xor(m, 1));
      m = fmaxf(m, shuffle_xor(m, 2));
      // m = -inf: the row has seen nothing. Any finite number does as a base then, and -inf itself would give NaN.
      const float base = m == -kInfinity ? 0.0f : m;
      float l = 0.0f, t = 0.0f;
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = s[0][tile][2 * n + e], weight = weight_below(x, base);
          l += weight;
          t += weight * finite_distance(x, base);
        }
      }
      const float rescale = weight_below(state.m[n], base);
      state.t[n] = rescale * (state.t[n] + state.l[n] * finite_distance(state.m[n], base)) + t;
      state.l[n] = rescale * state.l[n] + l;
      state.m[n] = m;
    }
  }

  // x - base <= 0 as a factor of exp(x - base): where that is 0, no infinity, which would make the product NaN.
  FASTATTN_DEVICE float finite_distance(float x, float base) { return fmaxf(x - base, -200.0f); }

  FASTATTN_DEVICE void select(const typename Walk::Scores& s, State& state, TopList& list, int j0) {
    uint32_t hits[2][kWords] = {};
    uint32_t any = 0;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (s[0][tile][2 * n + e] > state.threshold[n]) hits[n][tile / 4] |= 1u << (8 * (tile % 4) + e);
        }
      }
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        hits[n][word] <<= 2 * (lane_index() & 3);
        hits[n][word] |= shuffle_xor(hits[n][word], 1);
        hits[n][word] |= shuffle_xor(hits[n][word], 2);
        any |= hits[n][word];
      }
    }
    any |= shuffle_xor(any, 4);
    any |= shuffle_xor(any, 8);
    any |= shuffle_xor(any, 16);
    if (any != 0) {
      const int row = lane_index() >> 2;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = 8 * tile + 2 * (lane_index() & 3) + e;
            store_shared_f32(score_address(row + 8 * n, column), s[0][tile][2 * n + e]);
          }
        }
      }
      sync_warp();  // the rows' scores are there, for the lanes that keep the lists
      if (is_owner()) {
        const bool is_high = lane_index() & 1;
        float threshold = is_high ? state.threshold[1] : state.threshold[0];
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          uint32_t mine = is_high ? hits[1][word] : hits[0][word];
          for (; mine != 0; mine &= mine - 1) {
            const int column = 32 * word + lowest_bit(mine);
            const float score = load_shared_f32(score_address(row + 8 * is_high, column));
            if (score > threshold) {
              list.insert(score, j0 + column);
              threshold = list.threshold();
            }
          }
        }
        if (is_high) {
          state.threshold[1] = threshold;
        } else {
          state.threshold[0] = threshold;
        }
      }
    }
    // A threshold only ever rises: the owner's is the largest. The next tile's scores come after the walk's barrier.
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      state.threshold[n] = fmaxf(state.threshold[n], shuffle_xor(state.threshold[n], 1));
      state.threshold[n] = fmaxf(state.threshold[n], shuffle_xor(state.threshold[n], 2));
    }
  }

  FASTATTN_DEVICE void finish(State& state, TopList& list, const Params& p) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        state.l[n] += shuffle_xor(state.l[n], distance);
        state.t[n] += shuffle_xor(state.t[n], distance);
      }
    }
    const typename Walk::Place at = Walk::place_again(p.walk);
    const bool is_high = lane_index() & 1;
    const int row = own_row();
    if (!is_owner() || row >= at.rows) return;

    const AttentionParams& a = p.walk.attention;
    const int64_t i = at.i0 + row, index = (static_cast<int64_t>(at.b) * a.Hq + at.h) * a.Lq + i;
    SoftmaxState<float> keys = {is_high ? state.m[1] : state.m[0], is_high ? state.l[1] : state.l[0]};
    // Maxima pass over a NaN, sums do not: of a row that has one, nothing but NaN is to be said.
    if (keys.l != keys.l) keys.m = keys.l;
    const FinishedRow finished = finish_row(a, keys, at.h);
    write_statistics(a, finished, index);
    const float m = finished.state.m, l = finished.state.l;
    const bool is_empty = l == 0.0f;
    const float inverse_l = is_empty ? 0.0f : 1.0f / l;

    if (p.entropy) {
      float t = is_high ? state.t[1] : state.t[0];
      if (a.sinks && !is_empty) {
        const float sink = static_cast<const float*>(a.sinks)[at.h];
        t = softmax_weight(keys.m, m) * (t + keys.l * finite_distance(keys.m, m)) +
            softmax_weight(sink, m) * finite_distance(sink, m);
      }
      p.entropy[index] = is_empty ? 0.0f : logf(l) - t * inverse_l;
    }
    if (p.max_weight) p.max_weight[index] = is_empty ? 0.0f : weight_below(keys.m, m) * inverse_l;
    for (int n = 0; n < p.top_k; ++n) {
      const bool exists = n < list.count;
      list.scores[n] = (exists ? weight_below(list.scores[n], m) : 0.0f) * inverse_l;  // NaN in a row of a NaN
      if (!exists) list.keys[n] = -1;
    }
    if (p.row_stats) {
      const int64_t* stride = p.row_mask_stride;
      const bool counts = !p.row_mask || p.row_mask[at.b * stride[0] + at.h * stride[1] + i * stride[2]];
      p.row_stats[index] = {{is_empty ? 0.0f : m, counts ? inverse_l : 0.0f, 0.0f, 0.0f}};
    }
  }
};

template <DType kType, int kDim_>
struct SummaryMassKernel {
  using Params = SummaryKernelParams;
  using Walk = KeyWalk<kType, kDim_, true, false>;
  static constexpr int kDim = kDim_;
  static constexpr const char* kName = "summary_mass";
  static constexpr int kBlockM = Walk::kBlockM, kBlockN = Walk::kBlockN, kThreads = Walk::kThreads;
  static constexpr int kSharedBytes = Walk::kSharedBytes;
  static constexpr int kMinBlocks = 2;

  FASTATTN_DEVICE void run(const Params& p) {
    float mass[2] = {0.0f, 0.0f};  // of the lane's two keys, from its own rows
    // A row that does not count may be NaN.
    const auto weigh = [](float score, int, F32x4 row) {
      return row.x[1] == 0.0f ? 0.0f : weight_below(score, row.x[0]) * row.x[1];
    };
    Walk::run(p.walk, p.row_stats, weigh, [&](const typename Walk::Products& weights, SharedAddress) {
      // Each tile by itself first: a sum of sums loses less than one long sum.
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int tile = 0; tile < Walk::kN; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e / 2] += weights[0][tile][e];
      }
      mass[0] += sum[0];
      mass[1] += sum[1];
    });
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mass[n] += shuffle_xor(mass[n], 1);
      mass[n] += shuffle_xor(mass[n], 2);
    }
    const typename Walk::Place at = Walk::place_again(p.walk);
    const AttentionParams& a = p.walk.attention;
    if ((lane_index() & 3) != 0) return;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int j = at.j0 + Walk::lane_row() + 8 * n;
      if (j < a.Lk) p.key_mass[(static_cast<int64_t>(at.b) * a.Hq + at.head) * a.Lk + j] = mass[n];
    }
  }
};

}  // namespace fastattn::cuda
