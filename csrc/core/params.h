// What a kernel is asked to compute: plain structs, filled by csrc/torch (or a test) and read by every backend.
//
//   s[b,h,i,j] = softcap(x) + bias[b,h,i,j] - slope[b,h] * |i + Lk - Lq - j|
//   x          = scale * q[b,h,i,:] . k[b,h/G,j,:], or w[h,:] . tanh(q[b,h,i,:] + k[b,h/G,j,:])
//   p          = softmax over the visible j (and the sink of head h, which takes mass but has no value)
//   o[b,h,i,:] = sum_j dropout(p[b,h,i,j]) * v[b,h/G,j,:]                                  G = Hq / Hkv
//
// Strides count elements; the last dimension of q, k, v, o and of their gradients is contiguous. A stride of 0
// broadcasts. "Accumulator type" is float, or double when dtype is kFloat64.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

enum class Causal : int32_t { kNone = 0, kTopLeft = 1, kBottomRight = 2 };

// A window side without a limit.
constexpr int64_t kUnlimited = -1;

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t B = 0, Hq = 0, Hkv = 0, Lq = 0, Lk = 0, D = 0, Dv = 0;

  const void* q = nullptr;                                       // [B, Hq, Lq, D]
  const void* k = nullptr;                                       // [B, Hkv, Lk, D]
  const void* v = nullptr;                                       // [B, Hkv, Lk, Dv]
  int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {};  // batch, head, row

  // Packed sequences: the rows of q and o are those of all sequences one after the other, [packed_rows, Hq, D], and
  // those of k and v too. Sequence b has the rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) and the keys [cu_seqlens_k[b],
  // cu_seqlens_k[b + 1]); Lq and Lk are what the longest may have, and batch strides of q, k, v, o and their gradients
  // mean nothing. Rows of no sequence count as rows that see no key. Null: B sequences of Lq rows and Lk keys.
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1], both or none
  const int32_t* cu_seqlens_k = nullptr;
  int64_t packed_rows = 0, packed_keys = 0;  // of all sequences together; 0: not packed
  // The number of the first sequence, where these are a part of a larger call: dropout counts sequences from there.
  int64_t first_batch = 0;

  // A cache in pages, in the forward pass: key j of sequence b is row j % page_size of page
  // block_table[b * block_table_stride + j / page_size]; k [pages, Hkv, page_size, D] and v alike, the batch strides go
  // from page to page. Entries beyond a sequence's keys are not read, nor are those of keys before the first row's
  // window. All others lie in [0, pages); on a GPU, where nobody can check that, others count as the nearest that do.
  // Null: each sequence has rows of its own.
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0, page_size = 0, pages = 0;
  // Keys and values as int8, in the forward pass: number times the scale of its row, [B (or pages), Hkv, row], float.
  // Both or none; null: k and v are of dtype.
  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
  int64_t k_scale_stride[3] = {}, v_scale_stride[3] = {};  // batch (or page), head, row

  // Additive scores (Bahdanau), w . tanh(q_i + k_j) in place of scale * q_i . k_j: w [Hq, D] of dtype, its rows
  // contiguous; w_stride from head to head, 0 where they share one. Null: dot products.
  const void* w = nullptr;
  int64_t w_stride = 0;

  double scale = 1.0;
  double softcap = 0.0;  // 0 = none, else s <- softcap * tanh(s / softcap)

  const void* bias = nullptr;  // [B, Hq, Lq, Lk], of bias_dtype: dtype or kFloat32 (kFloat64 with kFloat64)
  DType bias_dtype = DType::kFloat32;
  int64_t bias_stride[4] = {};    // batch, head, query, key
  const uint8_t* mask = nullptr;  // [B, Hq, Lq, Lk], nonzero = keep
  int64_t mask_stride[4] = {};
  const void* alibi_slopes = nullptr;  // [B, Hq], accumulator type
  int64_t alibi_stride[2] = {};
  const void* sinks = nullptr;          // [Hq], contiguous, accumulator type
  const int32_t* kv_lengths = nullptr;  // [B], contiguous; values beyond [0, Lk] count as the nearest within

  Causal causal = Causal::kNone;
  int64_t window_left = kUnlimited, window_right = kUnlimited;

  double dropout_p = 0.0;  // in [0, 1]
  uint64_t seed = 0, offset = 0;
  // The CUDA engine alone: (seed, offset) in device memory, contiguous, in place of the two numbers above. The host
  // does not know them: to fetch them would wait for the device, and a captured CUDA graph would replay one mask for
  // ever.
  const int64_t* rng_state = nullptr;

  // Results. lse, row_max and row_sum are contiguous [B, Hq, Lq], or of packed sequences [Hq, packed_rows], in the
  // accumulator type; a null pointer is not written. row_max and row_sum stay apart because lse = row_max +
  // log(row_sum) loses log(row_sum) once row_max is as large as a finite mask value, and the backward pass would then
  // be wrong by a factor of up to Lk.
  void* o = nullptr;  // [B, Hq, Lq, Dv]
  int64_t o_stride[3] = {};
  void* lse = nullptr;
  void* row_max = nullptr;  // max over the visible scores and the sink, -inf for a row that sees nothing
  void* row_sum = nullptr;  // sum of exp(score - row_max), the sink's included, 0 for a row that sees nothing
  // The backward pass takes a row_sum of exactly 1 to say that one key, or the sink, has all of the row's weight, so
  // that no gradient flows through its scores. Who has only lse passes (lse - log 2, 2).
};

// In the backward pass o, row_max and row_sum of `forward` are inputs (lse is not used), forward.o has its own strides.
struct AttentionGradParams {
  AttentionParams forward;

  const void* d_o = nullptr;  // [B, Hq, Lq, Dv]
  int64_t d_o_stride[3] = {};
  const void* d_lse = nullptr;  // as forward.lse, or null

  void* dq = nullptr;  // [B, Hq, Lq, D]
  void* dk = nullptr;  // [B, Hkv, Lk, D]
  void* dv = nullptr;  // [B, Hkv, Lk, Dv]
  int64_t dq_stride[3] = {}, dk_stride[3] = {}, dv_stride[3] = {};

  // Accumulator type, contiguous in the bias's own shape; a dimension that the bias broadcasts has stride 0. Null: not
  // wanted.
  void* d_bias = nullptr;
  int64_t d_bias_stride[4] = {};
  void* d_sinks = nullptr;  // [Hq], accumulator type, or null
  void* dw = nullptr;  // [Hq, D], or [D] where heads share w; contiguous, accumulator type; not null where w is not
};

// Hard attention: each row takes the value of one key,
//
//   index_i = argmax_j  s_ij + g_ij        g_ij = -log(-log(u_ij)) (Gumbel noise; core/gumbel.h), or 0
//   o_i     = v[index_i]                   log_prob_i = s_ij - lse_i at j = index_i
//
// so that with noise index_i is drawn with the probabilities softmax(s_i). The lowest key wins among equals. A row
// that sees no key has index -1, o 0, log_prob 0.
struct HardAttentionParams {
  // Without w, softcap, bias, alibi_slopes, sinks and dropout; o is v[index], lse is not written. A temperature is in
  // scale. The noise is drawn from (seed, offset), or rng_state.
  AttentionParams attention;
  bool is_sampled = false;   // false: no noise
  int64_t* index = nullptr;  // [B, Hq, Lq], contiguous
  void* log_prob = nullptr;  // [B, Hq, Lq], contiguous, accumulator type
};

// What flows back through log_prob into the scores, and through o to the values that were taken:
//
//   dS_ij = d_log_prob_i * ((j == index_i) - p_ij)         dv_j = sum of d_o_i over the rows with index_i = j
struct HardAttentionGradParams {
  AttentionParams forward;         // row_max and row_sum of the forward pass are inputs; o is not used
  const int64_t* index = nullptr;  // [B, Hq, Lq], contiguous, within [-1, Lk)

  const void* d_log_prob = nullptr;  // [B, Hq, Lq], contiguous, accumulator type; null: 0
  const void* d_o = nullptr;         // [B, Hq, Lq, Dv]; null: 0
  int64_t d_o_stride[3] = {};

  // Every element of each is written.
  void* dq = nullptr;  // [B, Hq, Lq, D]
  void* dk = nullptr;  // [B, Hkv, Lk, D]
  void* dv = nullptr;  // [B, Hkv, Lk, Dv]
  int64_t dq_stride[3] = {}, dk_stride[3] = {}, dv_stride[3] = {};
};

constexpr int64_t kMaxTopK = 128;

// What there is to know about the weights without holding them all. p as above, before dropout; a sink takes its mass.
struct SummaryParams {
  // Without w, v, o and dropout (Dv is 0); lse, row_max and row_sum are written where not null.
  AttentionParams attention;

  // Contiguous; null: not wanted. "Real" is the accumulator type.
  void* entropy = nullptr;       // [B, Hq, Lq] Real: -sum_j p_ij log p_ij, the sink's term included; 0 for an empty row
  void* max_weight = nullptr;    // [B, Hq, Lq] Real: the largest p_ij; 0 for an empty row
  int64_t top_k = 0;             // at most kMaxTopK
  void* top_weights = nullptr;   // [B, Hq, Lq, top_k] Real: the largest first, the lower key first among equals;
  int64_t* top_index = nullptr;  // [B, Hq, Lq, top_k], their keys; past the visible keys: weight 0, index -1
  void* key_mass = nullptr;      // [B, Hq, Lk] Real: sum of p_ij over the rows i that row_mask keeps
  const uint8_t* row_mask = nullptr;  // [B, Hq, Lq], nonzero = counts for key_mass; null: all do
  int64_t row_mask_stride[3] = {};
};

}  // namespace fastattn
