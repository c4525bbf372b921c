// Hard attention, forward: of each row one key, drawn from softmax(s) or the one with the largest score, in one pass.
//
//   index_i = argmax_j  s_ij + g_ij = argmax_j  exp(s_ij - m) / e_ij        e = exponential_variate (core/gumbel.h)
//   log_prob_i = s_ij - lse_i at j = index_i        o_i = v[index_i]
//
// The walk finds the row's maximum m and sum l as attention does, and beside them the best candidate exp(s - m) / e,
// its score and its key; when m moves, the candidate is brought to the new maximum as the sum is. Each part of the keys
// leaves 20 bytes for a row, and a second kernel merges the parts and copies the values: nothing of size Lq x Dv but o
// is written.
//
// Most keys need no logarithm: e = -log(u) >= 1 - u, and 1 - u is the word itself but for a factor, so that a key whose
// exp(s - m) / (1 - u) is below the best so far cannot win. Near u = 1, where winners come from, the two bounds meet.
//
// The four words of a Philox call are those of four neighbouring keys of a row, of which a lane holds two in each of
// two rows: lanes draw for each other and exchange words, so that no draw is made twice.
//
// (Gumbel, 1954; Maddison, Tarlow and Minka, "A* sampling", 2014, section 2.)
#pragma once

#include "core/gumbel.h"
#include "cuda/finish.cuh"
#include "cuda/score_walk.cuh"

namespace fastattn::cuda {

// What a part of the keys has found of a row.
struct HardPart {
  float m, l;   // maximum of the scores, sum of exp(s - m)
  float best;   // the largest exp(s - m) / e, or without noise the largest score
  float score;  // of that key

  FASTATTN_DEVICE HardPart from(F32x4 v) { return {v.x[0], v.x[1], v.x[2], v.x[3]}; }
};

struct HardForwardParams {
  WalkParams walk;
  bool is_sampled = false;
  F32x4* parts = nullptr;       // [splits, B, Hq, Lq] of HardPart
  int32_t* part_key = nullptr;  // [splits, B, Hq, Lq], -1: it sees no key

  int64_t* index = nullptr;    // [B, Hq, Lq]
  float* log_prob = nullptr;   // [B, Hq, Lq]
  bool copies_chunks = false;  // every row of v and of o starts at a multiple of 16 bytes
};

// The words of the four elements of an accumulator tile [query][key], element e in words[e]. The tile's corner is
// (i_low - lane / 4, j0), j0 a multiple of 8; i_high = i_low + 8. All lanes of the warp take part.
FASTATTN_DEVICE void draw_words(uint32_t (&words)[4], DropoutSeed seed, int64_t bh, int i_low, int i_high, int j0) {
  const int t = thread_index() & 3;
  const bool is_odd = t & 1;
  // Lanes t and t ^ 1 hold keys 4n..4n+3 of both rows: the even one draws for the low row, the odd one for the high.
  const PhiloxWords drawn =
      philox4x32(seed.seed, static_cast<uint32_t>((j0 >> 2) + (t >> 1)), static_cast<uint32_t>(is_odd ? i_high : i_low),
                 static_cast<uint32_t>(bh), static_cast<uint32_t>(seed.offset));
  const uint32_t first = shuffle_xor(is_odd ? drawn.w[0] : drawn.w[2], 1);
  const uint32_t second = shuffle_xor(is_odd ? drawn.w[1] : drawn.w[3], 1);
  words[0] = is_odd ? first : drawn.w[0];
  words[1] = is_odd ? second : drawn.w[1];
  words[2] = is_odd ? drawn.w[2] : first;
  words[3] = is_odd ? drawn.w[3] : second;
}

// Below exponential_variate of the word: 1 - u, less a little for the rounding of either.
FASTATTN_DEVICE float least_variate(uint32_t word) {
  return (static_cast<float>(~word) + 0.5f) * (0.99999f / 4294967296.0f);
}

template <DType kType, int kDim_>
struct HardForwardKernel {
  using Params = HardForwardParams;
  using Walk = RowWalk<kType, kDim_, false>;
  static constexpr int kDim = kDim_;
  static constexpr const char* kName = "hard_attention_forward";
  static constexpr int kBlockM = Walk::kBlockM, kBlockN = Walk::kBlockN, kThreads = Walk::kThreads, kN = Walk::kN;
  static constexpr int kSharedBytes = Walk::kSharedBytes;
  static constexpr int kMinBlocks = 2;

  // Of the lane's two rows; best, score and key are the lane's own until the end.
  struct State {
    float m[2], l[2], best[2], score[2];
    uint32_t key[2];  // 0xffffffff: none
  };

  FASTATTN_DEVICE void run(const Params& p) {
    State state;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      state.m[n] = -kInfinity;
      state.l[n] = 0.0f;
      // Candidates are positive: the row's maximum has one of 1 / e.
      state.best[n] = p.is_sampled ? 0.0f : -kInfinity;
      state.score[n] = 0.0f;
      state.key[n] = 0xffffffffu;
    }
    Walk::run(p.walk, [&](typename Walk::Scores& s, int j0, SharedAddress) { take(s, state, p, j0); });
    gather_lanes(state);
    write(state, p);
  }

  FASTATTN_DEVICE void take(const typename Walk::Scores& s, State& state, const Params& p, int j0) {
    float base[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float m = state.m[n];
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) m = fmaxf(m, fmaxf(s[0][tile][2 * n], s[0][tile][2 * n + 1]));
      m = fmaxf(m, shuffle_xor(m, 1));
      m = fmaxf(m, shuffle_xor(m, 2));
      // m = -inf: the row has seen nothing. Any finite number does as a base then, and -inf itself would give NaN.
      base[n] = m == -kInfinity ? 0.0f : m;
      const float rescale = weight_below(state.m[n], base[n]);
      state.m[n] = m;
      state.l[n] *= rescale;
      if (p.is_sampled) state.best[n] *= rescale;
    }
    const typename Walk::Place at = Walk::place_again(p.walk);
    const int i = at.i0 + Walk::lane_row();
    const int64_t bh = at.b * p.walk.attention.Hq + at.h;
    const DropoutSeed seed = dropout_seed(p.walk.attention);
#pragma unroll
    for (int tile = 0; tile < kN; ++tile) {
      const int j = j0 + 8 * tile + 2 * (lane_index() & 3);
      uint32_t words[4] = {};
      if (p.is_sampled) draw_words(words, seed, bh, i, i + 8, j0 + 8 * tile);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int n = e / 2;
        const float x = s[0][tile][e], weight = weight_below(x, base[n]);
        sum[n] += weight;
        // Keys come in ascending order, and an equal one does not replace the best.
        if (p.is_sampled) {
          if (weight > state.best[n] * least_variate(words[e])) {
            const float candidate = weight / exponential_variate<float>(words[e]);
            if (candidate > state.best[n]) replace_best(state, n, candidate, x, j + e % 2);
          }
        } else if (x > state.best[n]) {
          replace_best(state, n, x, x, j + e % 2);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) state.l[n] += sum[n];
  }

  FASTATTN_DEVICE void replace_best(State& state, int n, float best, float score, int key) {
    state.best[n] = best;
    state.score[n] = score;
    state.key[n] = static_cast<uint32_t>(key);
  }

  // The four lanes of a row each have sums and a candidate of their own.
  FASTATTN_DEVICE void gather_lanes(State& state) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        state.l[n] += shuffle_xor(state.l[n], distance);
        const float best = shuffle_xor(state.best[n], distance), score = shuffle_xor(state.score[n], distance);
        const uint32_t key = shuffle_xor(state.key[n], distance);
        if (best > state.best[n] || (best == state.best[n] && key < state.key[n])) {
          state.best[n] = best;
          state.score[n] = score;
          state.key[n] = key;
        }
      }
    }
  }

  FASTATTN_DEVICE void write(const State& state, const Params& p) {
    const typename Walk::Place at = Walk::place_again(p.walk);
    const AttentionParams& a = p.walk.attention;
    const int row = Walk::lane_row();
    const int64_t first = ((static_cast<int64_t>(at.split) * a.B + at.b) * a.Hq + at.h) * a.Lq + at.i0;
    if ((lane_index() & 3) != 0) return;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (row + 8 * n >= at.rows) continue;
      p.parts[first + row + 8 * n] = {{state.m[n], state.l[n], state.best[n], state.score[n]}};
      p.part_key[first + row + 8 * n] = static_cast<int32_t>(state.key[n]);
    }
  }
};

// Merges the parts of a row, and copies the value that it takes. One warp = one row [b, hq, i].
template <DType kType>
struct HardFinishKernel {
  using Params = HardForwardParams;
  static constexpr const char* kName = "hard_attention_finish";
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 0;
  static constexpr int kRowsPerBlock = kThreads / 32;
  static constexpr int kBytes = kElementBytes<kType>;
  static constexpr int kChunk = 16 / kBytes;  // elements in 16 bytes

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.walk.attention;
    const int lane = thread_index() & 31;
    const int64_t rows = a.B * a.Hq * a.Lq;
    const int64_t row = block_index() * kRowsPerBlock + (thread_index() >> 5);
    if (row >= rows) return;
    const int64_t i = row % a.Lq, h = row / a.Lq % a.Hq, b = row / a.Lq / a.Hq;

    SoftmaxState<float> state = {-kInfinity, 0.0f};
    for (int split = 0; split < p.walk.splits; ++split) {
      const HardPart part = HardPart::from(p.parts[split * rows + row]);
      state = softmax_merge(state, SoftmaxState<float>{part.m, part.l});
    }
    float best = -kInfinity, score = 0.0f;
    int32_t key = -1;
    for (int split = 0; split < p.walk.splits; ++split) {
      const HardPart part = HardPart::from(p.parts[split * rows + row]);
      const int32_t part_key = p.part_key[split * rows + row];
      const float candidate = p.is_sampled ? part.best * softmax_weight(part.m, state.m) : part.best;
      // Parts are in the order of their keys, and an equal one does not replace the best.
      if (part_key >= 0 && candidate > best) {
        best = candidate;
        score = part.score;
        key = part_key;
      }
    }
    // A NaN among the scores of a row compares with nothing, and makes the sum NaN: any visible key will do, but it
    // must be one and the same everywhere.
    if (state.l != state.l) key = static_cast<int32_t>(first_visible_key(a, mask_geometry(a, b), b, h, i));
    if (lane == 0) {
      write_statistics(a, {state, 0.0f}, row);
      p.index[row] = key;
      // m and log(l) apart: beside a score of -1e9 their sum would lose log(l).
      p.log_prob[row] = key < 0 ? 0.0f : (score - state.m) - logf(state.l);
    }
    char* const out = static_cast<char*>(a.o) + (b * a.o_stride[0] + h * a.o_stride[1] + i * a.o_stride[2]) * kBytes;
    const char* const value = RowPointer<kBytes>::make(a.v, a.v_stride, b, h / (a.Hq / a.Hkv)).at(key < 0 ? 0 : key);
    copy_row(out, value, key >= 0, a.Dv, lane, p.copies_chunks);
  }

  // Bit for bit; without a value, zeros.
  FASTATTN_DEVICE void copy_row(char* out, const char* value, bool has_value, int64_t Dv, int lane, bool by_chunks) {
    const int64_t chunks = by_chunks ? Dv / kChunk : 0;
    for (int64_t c = lane; c < chunks; c += 32) {
      store_global_u32x4(out + c * 16, has_value ? load_global_u32x4(value + c * 16) : U32x4{{0, 0, 0, 0}});
    }
    for (int64_t d = chunks * kChunk + lane; d < Dv; d += 32) {
      const uint32_t bits = has_value ? load_element_bits(value, static_cast<int>(d), kBytes) : 0;
      if constexpr (kBytes == 4) {
        reinterpret_cast<uint32_t*>(out)[d] = bits;
      } else {
        reinterpret_cast<uint16_t*>(out)[d] = static_cast<uint16_t>(bits);
      }
    }
  }
};

}  // namespace fastattn::cuda
