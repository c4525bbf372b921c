// The rules that arguments must keep. Every message names the argument, what was given, the rule and the remedy, and
// has a test in tests/test_errors.py.
#include "torch/checks.h"

#include <cmath>
#include <limits>

#include "cuda/attention.h"
#include "torch/arguments.h"
#include "torch/errors.h"
#include "torch/tensors.h"

namespace fastattn {

void check_rank(const char* name, const Tensor& tensor, int64_t rank, const OperatorTexts& texts) {
  if (tensor.dim() != rank) {
    value_error(name, " has ", tensor.dim(), " dimensions, shape ", shape_text(tensor), "; ", texts.ranks,
                ": add or merge dimensions with unsqueeze or flatten.");
  }
}

void check_device(const char* name, const Tensor& tensor, const Tensor& q) {
  const Device here = device_of(tensor), wanted = device_of(q);
  if (here != wanted) {
    value_error(name, " is on ", device_name(here), " but q is on ", device_name(wanted),
                "; all tensors must be on one device: move it with ", name, ".to(q.device).");
  }
}

DType check_query_dtype(const Tensor& q) {
  DType dtype;
  if (!to_dtype(dtype_code(q), &dtype)) {
    type_error(
        "q is ", dtype_name(dtype_code(q)),
        "; attention takes torch.float32, torch.bfloat16, torch.float16 and torch.float64: convert with q.to().");
  }
  return dtype;
}

void check_same_dtype(const char* name, const Tensor& tensor, DType dtype) {
  if (!has_dtype(tensor, dtype)) {
    const std::string wanted = dtype_name(dtype_code(dtype));
    type_error(name, " is ", dtype_name(dtype_code(tensor)), " but q is ", wanted,
               "; q, k and v must share one dtype: convert with ", name, ".to(", wanted, ").");
  }
}

void check_accumulator_dtype(const char* name, const Tensor& tensor, DType dtype) {
  if (!has_dtype(tensor, accumulator_dtype(dtype))) {
    const std::string wanted = dtype_name(dtype_code(accumulator_dtype(dtype)));
    type_error(name, " is ", dtype_name(dtype_code(tensor)), " but must be ", wanted, " with q in ",
               dtype_name(dtype_code(dtype)), ": convert with ", name, ".to(", wanted, ").");
  }
}

namespace {

void check_shapes(const AttentionArguments& a, AttentionParams* p) {
  // (B, H, L, D), or packed (total, H, D).
  const bool is_packed = a.packed != nullptr;
  const int64_t rank = is_packed ? 3 : 4;
  check_rank("q", a.q, rank, a.texts);
  check_rank("k", a.k, rank, a.texts);
  check_rank("v", a.v, rank, a.texts);
  const IntHeaderOnlyArrayRef q = a.q.sizes(), k = a.k.sizes(), v = a.v.sizes();
  const size_t length = is_packed ? 0 : 2, last = is_packed ? 2 : 3;
  p->B = is_packed ? 1 : q[0], p->Hq = q[1], p->Lq = q[length], p->D = q[last];
  p->Hkv = k[1], p->Lk = k[length], p->Dv = v[last];
  if (!is_packed && (k[0] != p->B || v[0] != p->B)) {
    const bool is_k = k[0] != p->B;
    const char* name = is_k ? "k" : "v";
    value_error(name, " has batch size ", is_k ? k[0] : v[0], " but q has ", p->B,
                "; the batch sizes must be equal: expand() makes a view that shares its rows.");
  }
  if (v[1] != p->Hkv) {
    value_error("v has ", v[1], " heads but k has ", p->Hkv,
                "; every key head needs one value head: pass k and v with the same number of heads.");
  }
  if (p->Hkv == 0 ? p->Hq != 0 : p->Hq % p->Hkv != 0) {
    value_error("k has ", p->Hkv, " heads but q has ", p->Hq, "; q's heads must be a multiple of k's.");
  }
  if (v[length] != p->Lk) {
    value_error("v has length ", v[length], " but k has ", p->Lk,
                "; every key needs one value: cut or pad them alike.");
  }
  if (k[last] != p->D) {
    value_error("k has head dimension ", k[last], " but q has ", p->D, "; ",
                a.w ? "additive scores add" : "scores are dot products of",
                " q and k, so the two must be equal (v's may differ).");
  }
  if (p->D == 0 || p->Dv == 0) {
    value_error(p->D == 0 ? "q and k have" : "v has", " head dimension 0; it must be at least 1.");
  }
}

}  // namespace

bool fits(std::initializer_list<int64_t> sizes) {
  int64_t bytes = 2 * sizeof(double);  // two statistics per row
  for (const int64_t size : sizes) {
    if (size == 0) return true;
  }
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) return false;
  }
  return true;
}

namespace {

void check_sizes_fit(const AttentionParams& p) {
  if (!fits({p.B, p.Hq, p.Lq, p.D}) || !fits({p.B, p.Hq, p.Lq, p.Dv}) || !fits({p.B, p.Hkv, p.Lk, p.D}) ||
      !fits({p.B, p.Hkv, p.Lk, p.Dv})) {
    value_error("q, k and v of shapes (", p.B, ", ", p.Hq, ", ", p.Lq, ", ", p.D, "), (", p.B, ", ", p.Hkv, ", ", p.Lk,
                ", ", p.D, ") and (", p.B, ", ", p.Hkv, ", ", p.Lk, ", ", p.Dv,
                ") have a result too large to address; it must be below 2^63 bytes: split the batch.");
  }
}

// One of the two cu_seqlens of B sequences, and that none of them is longer than max_seqlen.
void check_cu_seqlens(const char* name, const Tensor& cu_seqlens, const char* rows, int64_t total, const char* max_name,
                      int64_t max_seqlen) {
  if (dtype_code(cu_seqlens) != aoti_torch_dtype_int32()) {
    type_error(name, " is ", dtype_name(dtype_code(cu_seqlens)), "; it must be torch.int32: convert with ", name,
               ".to(torch.int32).");
  }
  if (cu_seqlens.dim() != 1 || cu_seqlens.size(0) == 0) {
    value_error(name, " has shape ", shape_text(cu_seqlens),
                "; it must be (B + 1,): 0, and then where each of the B sequences ends.");
  }
  if (max_seqlen < 0 || max_seqlen > std::numeric_limits<int32_t>::max()) {
    value_error(max_name, " is ", max_seqlen, "; it must be the length of the longest sequence, or more, below 2^31.");
  }
  // On a GPU the host cannot read the values without waiting for the device; packed_sequence() clamps them.
  if (!cu_seqlens.is_cpu()) return;
  const auto* ends = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t stride = cu_seqlens.stride(0), B = cu_seqlens.size(0) - 1;
  if (ends[0] != 0) value_error(name, "[0] is ", ends[0], "; it must be 0, where the first sequence begins.");
  for (int64_t b = 0; b < B; ++b) {
    const int64_t begin = ends[b * stride], end = ends[(b + 1) * stride];
    if (end < begin) {
      value_error(name, "[", b + 1, "] is ", end, " but ", name, "[", b, "] is ", begin,
                  "; the sequences must lie one after the other: pass the cumulative sums of their lengths.");
    }
    if (end > total) {
      value_error(name, "[", b + 1, "] is ", end, " but ", rows, " ", total,
                  " rows; every sequence must lie within them: pass the cumulative sums of the lengths.");
    }
    if (end - begin > max_seqlen) {
      value_error(max_name, " is ", max_seqlen, " but sequence ", b, " of ", name, " has length ", end - begin,
                  "; no sequence may be longer: pass the length of the longest.");
    }
  }
}

void check_packed(const PackedArguments& packed, AttentionParams* p) {
  p->packed_rows = p->Lq;
  p->packed_keys = p->Lk;
  p->Lq = packed.max_seqlen_q;
  p->Lk = packed.max_seqlen_k;
  check_cu_seqlens("cu_seqlens_q", packed.cu_seqlens_q, "q has", p->packed_rows, "max_seqlen_q", p->Lq);
  check_cu_seqlens("cu_seqlens_k", packed.cu_seqlens_k, "k has", p->packed_keys, "max_seqlen_k", p->Lk);
  p->B = packed.cu_seqlens_q.size(0) - 1;
  if (packed.cu_seqlens_k.size(0) != p->B + 1) {
    value_error("cu_seqlens_k has shape ", shape_text(packed.cu_seqlens_k), " but cu_seqlens_q has ",
                shape_text(packed.cu_seqlens_q), "; both must count the same sequences, (B + 1,).");
  }
}

}  // namespace

// What the CPU takes and the CUDA kernels do not.
void check_limits_of_cuda(const AttentionParams& p, const OperatorTexts& texts) {
  if (p.dtype == DType::kFloat64) {
    type_error(
        "q is torch.float64, which the CUDA kernels do not take; they take torch.float32, torch.bfloat16 and "
        "torch.float16: convert with q.float(), or move the tensors to the CPU with q.cpu(), where torch.float64 "
        "works.");
  }
  for (const auto& [names, dim] : {std::pair{"q and k have", p.D}, {"v has", p.Dv}}) {
    if (dim > cuda::kMaxHeadDim) {
      value_error(names, " head dimension ", dim, "; the CUDA kernels take at most ", cuda::kMaxHeadDim,
                  ": move the tensors to the CPU with q.cpu(), where there is no limit, or call ", texts.wide_heads,
                  ".");
    }
  }
  for (const auto& [names, length, remedy] :
       {std::tuple{"q has", p.Lq, "cut q into parts and concatenate their results"},
        {texts.keys, p.Lk, texts.many_keys}}) {
    if (length > cuda::kMaxLength) {
      value_error(names, " length ", length, "; the CUDA kernels take at most ", cuda::kMaxLength, ": ", remedy, ".");
    }
  }
}

namespace {

// Missing leading dimensions count as 1.
void check_broadcasts(const char* name, const Tensor& tensor, const AttentionParams& p) {
  const int64_t full[4] = {p.B, p.Hq, p.Lq, p.Lk};
  const IntHeaderOnlyArrayRef sizes = tensor.sizes();
  bool broadcasts = sizes.size() <= 4;
  for (size_t i = 0; broadcasts && i < sizes.size(); ++i) {
    broadcasts = sizes[i] == 1 || sizes[i] == full[4 - sizes.size() + i];
  }
  if (!broadcasts) {
    value_error(name, " has shape ", shape_text(tensor), ", which does not broadcast to (B, Hq, Lq, Lk) = (", p.B, ", ",
                p.Hq, ", ", p.Lq, ", ", p.Lk, "); each of its dimensions, from the last, must be 1 or that size.");
  }
}

void check_bias(const Tensor& bias, AttentionParams* p) {
  check_broadcasts("bias", bias, *p);
  const int32_t code = dtype_code(bias);
  if (code == aoti_torch_dtype_bool()) {
    type_error("bias is torch.bool but is added to the scores; it must be a float tensor: pass a bool tensor as mask.");
  }
  if (code != dtype_code(p->dtype) && code != dtype_code(accumulator_dtype(p->dtype))) {
    const std::string own = dtype_name(dtype_code(p->dtype));
    type_error("bias is ", dtype_name(code), " but q is ", own, "; bias must have q's dtype",
               p->dtype == DType::kBFloat16 || p->dtype == DType::kFloat16 ? " or torch.float32" : "",
               ": convert with bias.to(", own, ").");
  }
  to_dtype(code, &p->bias_dtype);
}

void check_mask(const Tensor& mask, const AttentionParams& p) {
  check_broadcasts("mask", mask, p);
  if (dtype_code(mask) != aoti_torch_dtype_bool()) {
    type_error(
        "mask is ", dtype_name(dtype_code(mask)),
        "; it must be torch.bool, True = keep: convert with mask.to(torch.bool), or pass floats that are added to "
        "the scores as bias.");
  }
}

}  // namespace

void check_alibi_slopes(const Tensor& slopes, const AttentionParams& p) {
  const bool per_head = slopes.dim() == 1 && slopes.size(0) == p.Hq;
  const bool per_batch = slopes.dim() == 2 && slopes.size(0) == p.B && slopes.size(1) == p.Hq;
  if (!per_head && !per_batch) {
    value_error("alibi_slopes has shape ", shape_text(slopes), "; it must be (Hq,) = (", p.Hq, ",) or (B, Hq) = (", p.B,
                ", ", p.Hq, "), one slope for each head of q.");
  }
  check_accumulator_dtype("alibi_slopes", slopes, p.dtype);
}

void check_sinks(const Tensor& sinks, const AttentionParams& p) {
  if (sinks.dim() != 1 || sinks.size(0) != p.Hq) {
    value_error("sinks has shape ", shape_text(sinks), "; it must be (Hq,) = (", p.Hq,
                ",), one score for each head of q.");
  }
  check_accumulator_dtype("sinks", sinks, p.dtype);
}

namespace {

void check_kv_lengths(const Tensor& lengths, const AttentionParams& p) {
  if (dtype_code(lengths) != aoti_torch_dtype_int32()) {
    type_error("kv_lengths is ", dtype_name(dtype_code(lengths)),
               "; it must be torch.int32: convert with kv_lengths.to(torch.int32).");
  }
  if (lengths.dim() != 1 || lengths.size(0) != p.B) {
    value_error("kv_lengths has shape ", shape_text(lengths), "; it must be (B,) = (", p.B,
                ",), one length for each sequence.");
  }
  // The values are where the host cannot read them without waiting for the device; mask_geometry() clamps them.
  if (!lengths.is_cpu()) return;
  const auto* length = static_cast<const int32_t*>(lengths.const_data_ptr());
  const int64_t stride = lengths.stride(0);
  for (int64_t b = 0; b < p.B; ++b) {
    if (length[b * stride] < 0 || length[b * stride] > p.Lk) {
      value_error("kv_lengths[", b, "] is ", length[b * stride], " but k has length ", p.Lk,
                  "; every length must lie in [0, ", p.Lk, "]: clamp it, or pass longer keys.");
    }
  }
}

void check_w(const Tensor& w, const AttentionParams& p) {
  const bool is_shared = w.dim() == 1 && w.size(0) == p.D;
  const bool per_head = w.dim() == 2 && w.size(0) == p.Hq && w.size(1) == p.D;
  if (!is_shared && !per_head) {
    value_error("w has shape ", shape_text(w), "; it must be (D,) = (", p.D, ",), shared by all heads, or (Hq, D) = (",
                p.Hq, ", ", p.D, "), a row for each head of q.");
  }
  if (!has_dtype(w, p.dtype)) {
    const std::string wanted = dtype_name(dtype_code(p.dtype));
    type_error("w is ", dtype_name(dtype_code(w)), " but q is ", wanted,
               "; q, k, v and w must share one dtype: convert with w.to(", wanted, ").");
  }
}

void check_rng_state(const Tensor& state) {
  if (state.dim() != 1 || state.size(0) != 2) {
    value_error("rng_state has shape ", shape_text(state), "; it must be (2,), the numbers (seed, offset).");
  }
  if (dtype_code(state) != aoti_torch_dtype_int64()) {
    type_error("rng_state is ", dtype_name(dtype_code(state)),
               "; it must be torch.int64: convert with rng_state.to(torch.int64).");
  }
}

void check_probability(double p) {
  if (!(p >= 0.0 && p <= 1.0)) {
    value_error("dropout_p is ", p, "; it is a probability and must lie in [0, 1].");
  }
}

// A number that is finite as a double can still be infinite in the type that the kernels compute in.
bool is_finite(double x, DType dtype) {
  return std::isfinite(accumulator_dtype(dtype) == DType::kFloat64 ? x : static_cast<double>(static_cast<float>(x)));
}

}  // namespace

void check_numbers(const AttentionArguments& a, AttentionParams* p) {
  if (a.causal < 0 || a.causal > 2) {
    value_error("causal is ", a.causal, "; it must be 0 (none), 1 (top_left) or 2 (bottom_right).");
  }
  p->causal = static_cast<Causal>(a.causal);
  if (a.window_left < kUnlimited || a.window_right < kUnlimited) {
    value_error("window is (", a.window_left, ", ", a.window_right,
                "); each side counts keys and must be at least 0: pass None for a side without a limit.");
  }
  p->window_left = a.window_left;
  p->window_right = a.window_right;
  p->scale = a.scale ? *a.scale : 1.0 / std::sqrt(static_cast<double>(p->D));
  if (!is_finite(p->scale, p->dtype)) {
    value_error("scale is ", p->scale, "; it must be finite in ", dtype_name(dtype_code(accumulator_dtype(p->dtype))),
                ": pass None for 1/sqrt(D).");
  }
  p->softcap = a.softcap;
  if (!is_finite(p->softcap, p->dtype) || p->softcap < 0.0) {
    value_error("softcap is ", p->softcap, "; it must be finite and positive: pass None for no cap.");
  }
  check_probability(a.dropout_p);
  p->dropout_p = a.dropout_p;
}

namespace {

void check_rows(const char* name, const Tensor& tensor, const Shape& shape, int32_t dtype) {
  bool equal = tensor.dim() == shape.dim;
  for (int64_t i = 0; equal && i < shape.dim; ++i) equal = tensor.size(i) == shape.size[i];
  if (!equal) {
    std::ostringstream wanted;
    for (int64_t i = 0; i < shape.dim; ++i) wanted << (i ? ", " : "") << shape.size[i];
    value_error(name, " has shape ", shape_text(tensor), "; it must be (", wanted.str(),
                "), as the forward pass gave.");
  }
  if (dtype_code(tensor) != dtype) {
    type_error(name, " is ", dtype_name(dtype_code(tensor)), "; it must be ", dtype_name(dtype),
               ", as the forward pass gave.");
  }
}

void check_rows(const char* name, const Tensor& tensor, const Shape& shape, DType dtype) {
  check_rows(name, tensor, shape, dtype_code(dtype));
}

}  // namespace

Shape row_shape(const AttentionArguments& a, const AttentionParams& p) {
  if (a.packed) return {p.packed_rows, p.Hq, p.Dv};
  return {p.B, p.Hq, p.Lq, p.Dv};
}

Shape statistic_shape(const AttentionArguments& a, const AttentionParams& p) {
  if (a.packed) return {p.Hq, p.packed_rows};
  return {p.B, p.Hq, p.Lq};
}

Shape stats_shape(const AttentionArguments& a, const AttentionParams& p) {
  if (a.packed) return {2, p.Hq, p.packed_rows};
  return {2, p.B, p.Hq, p.Lq};
}

AttentionParams check_attention(const AttentionArguments& a, bool for_cuda) {
  AttentionParams p;
  const std::pair<const char*, const std::optional<Tensor>*> others[] = {{"bias", &a.bias},
                                                                         {"mask", &a.mask},
                                                                         {"alibi_slopes", &a.alibi_slopes},
                                                                         {"sinks", &a.sinks},
                                                                         {"kv_lengths", &a.kv_lengths},
                                                                         {"rng_state", &a.rng_state}};
  check_device("k", a.k, a.q);
  check_device("v", a.v, a.q);
  for (const auto& [name, tensor] : others) {
    if (*tensor) check_device(name, **tensor, a.q);
  }
  if (a.w) check_device("w", *a.w, a.q);
  if (a.packed) {
    check_device("cu_seqlens_q", a.packed->cu_seqlens_q, a.q);
    check_device("cu_seqlens_k", a.packed->cu_seqlens_k, a.q);
  }
  p.dtype = check_query_dtype(a.q);
  check_same_dtype("k", a.k, p.dtype);
  check_same_dtype("v", a.v, p.dtype);
  check_shapes(a, &p);
  check_sizes_fit(p);
  if (a.packed) check_packed(*a.packed, &p);
  if (for_cuda) check_limits_of_cuda(p, a.texts);
  if (a.bias) check_bias(*a.bias, &p);
  if (a.mask) check_mask(*a.mask, p);
  if (a.alibi_slopes) check_alibi_slopes(*a.alibi_slopes, p);
  if (a.sinks) check_sinks(*a.sinks, p);
  if (a.kv_lengths) check_kv_lengths(*a.kv_lengths, p);
  if (a.w) check_w(*a.w, p);
  check_numbers(a, &p);
  if (a.rng_state) check_rng_state(*a.rng_state);
  if (p.dropout_p > 0.0 && !a.rng_state) {
    value_error("dropout_p is ", p.dropout_p, " but rng_state is missing; dropout draws from (seed, offset).");
  }
  return p;
}

namespace {

void check_stats(const Tensor& stats, const AttentionArguments& a, const AttentionParams& p) {
  check_device("stats", stats, a.q);
  if (stats.dim() == 1 && stats.size(0) == 0) {
    value_error("stats is empty; the backward pass needs them: call the forward operator with save_stats=True.");
  }
  check_rows("stats", stats, stats_shape(a, p), accumulator_dtype(p.dtype));
}

void check_index(const Tensor& index, const Tensor& q, const AttentionParams& p) {
  check_device("index", index, q);
  check_rows("index", index, {p.B, p.Hq, p.Lq}, aoti_torch_dtype_int64());
  // The kernels for CUDA compare indices and never follow them.
  if (!index.is_cpu()) return;
  const Tensor dense = as_contiguous(index);
  const auto* at = static_cast<const int64_t*>(dense.const_data_ptr());
  for (int64_t i = 0; i < dense.numel(); ++i) {
    if (at[i] < -1 || at[i] >= p.Lk) {
      value_error("index holds ", at[i], " but k has length ", p.Lk, "; every index must lie in [-1, ", p.Lk,
                  "), as the forward pass gave.");
    }
  }
}

void check_row_mask(const Tensor& mask, const AttentionParams& p) {
  const int64_t full[3] = {p.B, p.Hq, p.Lq};
  const IntHeaderOnlyArrayRef sizes = mask.sizes();
  bool broadcasts = sizes.size() <= 3;
  for (size_t i = 0; broadcasts && i < sizes.size(); ++i) {
    broadcasts = sizes[i] == 1 || sizes[i] == full[3 - sizes.size() + i];
  }
  if (!broadcasts) {
    value_error("rows has shape ", shape_text(mask), ", which does not broadcast to (B, Hq, Lq) = (", p.B, ", ", p.Hq,
                ", ", p.Lq, "); each of its dimensions, from the last, must be 1 or that size.");
  }
  if (dtype_code(mask) != aoti_torch_dtype_bool()) {
    type_error("rows is ", dtype_name(dtype_code(mask)),
               "; it must be torch.bool, True = counts for the key mass: convert with rows.to(torch.bool).");
  }
}

}  // namespace

AttentionParams check_attention_grad(const AttentionGradArguments& a, bool for_cuda) {
  const AttentionParams p = check_attention(a.forward, for_cuda);
  check_device("d_o", a.d_o, a.forward.q);
  check_device("o", a.o, a.forward.q);
  check_rows("d_o", a.d_o, row_shape(a.forward, p), p.dtype);
  check_rows("o", a.o, row_shape(a.forward, p), p.dtype);
  check_stats(a.stats, a.forward, p);
  if (a.d_lse) {
    check_device("d_lse", *a.d_lse, a.forward.q);
    check_rows("d_lse", *a.d_lse, statistic_shape(a.forward, p), accumulator_dtype(p.dtype));
  }
  if (a.need_d_bias && !a.forward.bias) value_error("need_d_bias is True but there is no bias.");
  if (a.need_d_sinks && !a.forward.sinks) value_error("need_d_sinks is True but there are no sinks.");
  return p;
}

AttentionParams check_hard_attention_grad(const HardAttentionGradArguments& a, bool for_cuda) {
  const Tensor& q = a.attention.q;
  const AttentionParams p = check_attention(a.attention, for_cuda);
  if (a.d_o) {
    check_device("d_o", *a.d_o, q);
    check_rows("d_o", *a.d_o, {p.B, p.Hq, p.Lq, p.Dv}, p.dtype);
  }
  if (a.d_log_prob) {
    check_device("d_log_prob", *a.d_log_prob, q);
    check_rows("d_log_prob", *a.d_log_prob, {p.B, p.Hq, p.Lq}, accumulator_dtype(p.dtype));
  }
  check_index(a.index, q, p);
  check_stats(a.stats, a.attention, p);
  return p;
}

AttentionParams check_summary(const SummaryArguments& a, bool for_cuda) {
  if (a.row_mask) check_device("rows", *a.row_mask, a.attention.q);
  AttentionParams p = check_attention(a.attention, for_cuda);
  if (a.row_mask) check_row_mask(*a.row_mask, p);
  if (a.top_k < 0 || a.top_k > kMaxTopK) {
    value_error("top_k is ", a.top_k, "; it must lie in [0, ", kMaxTopK,
                "]: for more weights of a row call attention_weights.");
  }
  p.Dv = 0;
  return p;
}

void check_dropout_mask(const Tensor& rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p) {
  check_rng_state(rng_state);
  check_probability(p);
  if (B < 0 || H < 0 || Lq < 0 || Lk < 0 || !fits({B, H, Lq, Lk})) {
    value_error("a dropout mask of shape (", B, ", ", H, ", ", Lq, ", ", Lk,
                ") was asked for; sizes must be at least 0 and the mask below 2^63 bytes.");
  }
}

}  // namespace fastattn
