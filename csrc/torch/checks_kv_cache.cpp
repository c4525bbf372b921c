// The rules that attention_with_kv_cache's arguments must keep; each message has a test in
// tests/test_kv_cache_errors.py. A call that breaks one has written nothing.
#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "core/mask.h"
#include "torch/arguments.h"
#include "torch/checks.h"
#include "torch/errors.h"
#include "torch/tensors.h"

namespace fastattn {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_both(const char* first_name, const OptionalTensor& first, const char* second_name,
                const OptionalTensor& second) {
  if (first.has_value() == second.has_value()) return;
  const char* given = first ? first_name : second_name;
  const char* missing = first ? second_name : first_name;
  value_error(given, " is given but ", missing, " is not; they come together: pass both or neither.");
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* meaning) {
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) equal = equal && tensor.size(i++) == size;
  if (equal) return;
  std::ostringstream wanted;
  i = 0;
  for (const int64_t size : sizes) wanted << (i++ ? ", " : "") << size;
  value_error(name, " has shape ", shape_text(tensor), "; it must be ", meaning, " = (", wanted.str(),
              sizes.size() == 1 ? ",)." : ").");
}

void check_int32(const char* name, const Tensor& tensor) {
  if (dtype_code(tensor) != aoti_torch_dtype_int32()) {
    type_error(name, " is ", dtype_name(dtype_code(tensor)), "; it must be torch.int32: convert with ", name,
               ".to(torch.int32).");
  }
}

void check_float32(const char* name, const Tensor& tensor) {
  if (!has_dtype(tensor, DType::kFloat32)) {
    type_error(name, " is ", dtype_name(dtype_code(tensor)), "; scales must be torch.float32: convert with ", name,
               ".float().");
  }
}

void check_cache_dtype(const char* name, const Tensor& cache, bool has_scales, DType dtype) {
  const int32_t code = dtype_code(cache);
  const bool is_int8 = code == aoti_torch_dtype_int8();
  const std::string own = dtype_name(dtype_code(dtype));
  if (is_int8 && !has_scales) {
    type_error(name, " is torch.int8 but k_scale and v_scale are not given; int8 rows need their scales: pass them.");
  }
  if (!is_int8 && has_scales) {
    type_error(name, " is ", dtype_name(code),
               " but k_scale and v_scale are given; with scales the caches are torch.int8: pass an int8 ", name,
               ", or no scales.");
  }
  if (!is_int8 && code != dtype_code(dtype)) {
    type_error(name, " is ", dtype_name(code), " but q is ", own,
               "; a cache has q's dtype, or torch.int8 with scales: convert q, k and v with .to(", name, ".dtype).");
  }
}

void check_cache_shapes(const KvCacheArguments& a, KvCacheParams* params) {
  AttentionParams& p = params->attention;
  const Tensor &q = a.attention.q, &k_cache = a.attention.k, &v_cache = a.attention.v;
  check_rank("q", q, 4, a.attention.texts);
  check_rank("k_cache", k_cache, 4, a.attention.texts);
  check_rank("v_cache", v_cache, 4, a.attention.texts);
  p.B = q.size(0), p.Hq = q.size(1), p.Lq = q.size(2), p.D = q.size(3);
  p.Hkv = k_cache.size(1), p.Dv = v_cache.size(3);
  const bool is_paged = a.block_table.has_value();
  for (const auto& [name, cache] : {std::pair{"k_cache", &k_cache}, {"v_cache", &v_cache}}) {
    if (!is_paged && cache->size(0) != p.B) {
      value_error(name, " has batch size ", cache->size(0), " but q has ", p.B,
                  "; a contiguous cache has one entry for each sequence: cut it, or pass a block_table.");
    }
  }
  if (v_cache.size(0) != k_cache.size(0)) {
    value_error("v_cache has ", v_cache.size(0), " pages but k_cache has ", k_cache.size(0),
                "; one block_table is for both: pass caches with the same number of pages.");
  }
  if (v_cache.size(1) != p.Hkv) {
    value_error("v_cache has ", v_cache.size(1), " heads but k_cache has ", p.Hkv,
                "; every key head needs one value head: pass caches with the same number of heads.");
  }
  if (p.Hkv == 0 ? p.Hq != 0 : p.Hq % p.Hkv != 0) {
    value_error("k_cache has ", p.Hkv, " heads but q has ", p.Hq, "; q's heads must be a multiple of k_cache's.");
  }
  if (v_cache.size(2) != k_cache.size(2)) {
    value_error("v_cache has length ", v_cache.size(2), " but k_cache has ", k_cache.size(2),
                "; every key needs one value: pass caches of the same length.");
  }
  if (k_cache.size(3) != p.D) {
    value_error("k_cache has head dimension ", k_cache.size(3), " but q has ", p.D,
                "; scores are dot products of q and k, so the two must be equal (v_cache's may differ).");
  }
  if (p.D == 0 || p.Dv == 0) {
    value_error(p.D == 0 ? "q and k_cache have" : "v_cache has", " head dimension 0; it must be at least 1.");
  }
  p.Lk = k_cache.size(2);
  if (is_paged) {
    const Tensor& table = *a.block_table;
    p.page_size = k_cache.size(2);
    p.pages = k_cache.size(0);
    if (p.page_size == 0) value_error("k_cache has page size 0; a page holds at least one key.");
    if (table.dim() != 2 || table.size(0) != p.B) {
      value_error("block_table has shape ", shape_text(table), "; it must be (B, max_pages) with B = ", p.B,
                  ": the pages of each sequence, in order.");
    }
    if (__builtin_mul_overflow(table.size(1), p.page_size, &p.Lk)) {
      value_error("block_table has room for ", table.size(1), " pages of ", p.page_size,
                  " keys; their number must be below 2^63: pass a narrower table.");
    }
  }
  if (!fits({p.B, p.Hq, p.Lq, p.D}) || !fits({p.B, p.Hq, p.Lq, p.Dv})) {
    value_error("q of shape ", shape_text(q),
                " has a result too large to address; it must be below 2^63 bytes: split "
                "the batch.");
  }
}

void check_append(const KvCacheArguments& a, KvCacheParams* params) {
  const AttentionParams& p = params->attention;
  CacheAppendParams& append = params->append;
  if (!a.k) return;
  check_same_dtype("k", *a.k, p.dtype);
  check_same_dtype("v", *a.v, p.dtype);
  check_rank("k", *a.k, 4, a.attention.texts);
  check_rank("v", *a.v, 4, a.attention.texts);
  append.Lnew = a.k->size(2);
  check_shape("k", *a.k, {p.B, p.Hkv, append.Lnew, p.D}, "(B, Hkv, Lnew, D), as q and k_cache have them,");
  check_shape("v", *a.v, {p.B, p.Hkv, append.Lnew, p.Dv}, "(B, Hkv, Lnew, Dv), as k and v_cache have them,");
  if (append.Lnew > p.Lk) {
    value_error("k has length ", append.Lnew, " but the cache holds ", p.Lk,
                " keys; what is appended must fit: pass a longer cache", a.block_table ? " or a wider block_table" : "",
                ", or use fastattn.KVCache, which grows.");
  }
}

void check_rotary(const KvCacheArguments& a, KvCacheParams* params) {
  const AttentionParams& p = params->attention;
  CacheAppendParams& append = params->append;
  if (!a.rotary_cos) return;
  const Tensor &cos = *a.rotary_cos, &sin = *a.rotary_sin;
  const int32_t code = dtype_code(cos);
  if (code != dtype_code(p.dtype) && code != dtype_code(DType::kFloat32)) {
    const std::string own = dtype_name(dtype_code(p.dtype));
    type_error("rotary_cos is ", dtype_name(code), " but q is ", own,
               "; it must have q's dtype or torch.float32: convert with rotary_cos.to(", own, ").");
  }
  if (dtype_code(sin) != code) {
    type_error("rotary_sin is ", dtype_name(dtype_code(sin)), " but rotary_cos is ", dtype_name(code),
               "; they must share one dtype: convert with rotary_sin.to(rotary_cos.dtype).");
  }
  if (cos.dim() != 2 || cos.size(1) < 1 || cos.size(1) > p.D / 2) {
    value_error("rotary_cos has shape ", shape_text(cos),
                "; it must be (positions, rotary_dim / 2), with a rotary_dim of 2 to D = ", p.D,
                ": pass the cosines of one half, cos[:, :rotary_dim // 2].");
  }
  check_shape("rotary_sin", sin, {cos.size(0), cos.size(1)}, "as rotary_cos");
  if (!a.k) {
    value_error(
        "rotary_cos is given but k is not; q is rotated at the positions of the keys that are appended: pass k "
        "and v, or rotate q before the call.");
  }
  if (p.Lq > append.Lnew) {
    value_error("q has length ", p.Lq, " but k has ", append.Lnew,
                "; with a rotary embedding q holds the last of the new tokens: pass a q of at most k's length, or "
                "rotate q and k before the call.");
  }
  append.rotary_dim = 2 * cos.size(1);
  append.positions = cos.size(0);
  append.rotary_interleaved = a.rotary_interleaved;
  to_dtype(code, &append.rotary_dtype);
  if (append.Lnew > append.positions) {
    value_error("rotary_cos has ", append.positions, " positions but ", append.Lnew,
                " tokens are appended; each needs its own: compute rotary_cos and rotary_sin for more positions.");
  }
}

}  // namespace

KvCacheParams check_kv_cache(const KvCacheArguments& a, bool for_cuda) {
  const AttentionArguments& attention = a.attention;
  const Tensor &q = attention.q, &k_cache = attention.k, &v_cache = attention.v;
  KvCacheParams params;
  AttentionParams& p = params.attention;
  check_device("k_cache", k_cache, q);
  check_device("v_cache", v_cache, q);
  check_device("cache_lengths", a.cache_lengths, q);
  const std::pair<const char*, const OptionalTensor*> others[] = {{"k", &a.k},
                                                                  {"v", &a.v},
                                                                  {"block_table", &a.block_table},
                                                                  {"k_scale", &a.k_scale},
                                                                  {"v_scale", &a.v_scale},
                                                                  {"rotary_cos", &a.rotary_cos},
                                                                  {"rotary_sin", &a.rotary_sin},
                                                                  {"alibi_slopes", &attention.alibi_slopes},
                                                                  {"sinks", &attention.sinks}};
  for (const auto& [name, tensor] : others) {
    if (*tensor) check_device(name, **tensor, q);
  }
  check_both("k", a.k, "v", a.v);
  check_both("k_scale", a.k_scale, "v_scale", a.v_scale);
  check_both("rotary_cos", a.rotary_cos, "rotary_sin", a.rotary_sin);

  p.dtype = check_query_dtype(q);
  check_cache_dtype("k_cache", k_cache, a.k_scale.has_value(), p.dtype);
  check_cache_dtype("v_cache", v_cache, a.k_scale.has_value(), p.dtype);
  check_cache_shapes(a, &params);
  check_append(a, &params);
  check_int32("cache_lengths", a.cache_lengths);
  check_shape("cache_lengths", a.cache_lengths, {p.B}, "(B,), the keys of each sequence before the append,");
  if (a.block_table) check_int32("block_table", *a.block_table);
  if (a.k_scale) {
    check_float32("k_scale", *a.k_scale);
    check_float32("v_scale", *a.v_scale);
    const char* meaning = "one scale for each row, the cache's shape without its last dimension,";
    check_shape("k_scale", *a.k_scale, {k_cache.size(0), p.Hkv, k_cache.size(2)}, meaning);
    check_shape("v_scale", *a.v_scale, {k_cache.size(0), p.Hkv, k_cache.size(2)}, meaning);
  }
  check_rotary(a, &params);
  if (for_cuda) check_limits_of_cuda(p, attention.texts);
  if (attention.alibi_slopes) check_alibi_slopes(*attention.alibi_slopes, p);
  if (attention.sinks) check_sinks(*attention.sinks, p);
  check_numbers(attention, &p);
  if (p.causal == Causal::kTopLeft) {
    value_error("causal is 'top_left'; with a cache the last row stands at the last key: pass True or 'bottom_right'.");
  }

  CacheAppendParams& append = params.append;
  append.dtype = p.dtype;
  append.B = p.B, append.Hq = p.Hq, append.Hkv = p.Hkv, append.Lq = p.Lq, append.D = p.D, append.Dv = p.Dv;
  append.max_keys = p.Lk;
  append.page_size = p.page_size;
  append.pages = p.pages;
  return params;
}

namespace {

// The bytes that a tensor covers: runs of `width` at every sum of multiples of the strides.
struct Footprint {
  const char* name;
  const char* data;
  int64_t width;
  struct Dim {
    int64_t stride, size;
  };
  std::vector<Dim> dims;  // the largest stride first
  bool is_empty = false;

  Footprint(const char* name_, const Tensor& tensor)
      : name(name_),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        width(static_cast<int64_t>(tensor.element_size())) {
    const int64_t element = width;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      const int64_t size = tensor.size(d), stride = tensor.stride(d) * element;
      is_empty = is_empty || size == 0;
      if (size <= 1) continue;
      if (stride == element && d == tensor.dim() - 1) {
        width = size * element;
      } else {
        dims.push_back({stride, size});
      }
    }
    std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  }

  int64_t extent() const {
    int64_t bytes = width;
    for (const Dim& dim : dims) bytes += (dim.size - 1) * dim.stride;
    return bytes;
  }

  // Whether some byte may belong to two elements: no, where each stride steps over all that lies inside it.
  bool meets_itself() const {
    int64_t inside = width;
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
      if (dim->stride < inside) return true;
      inside += (dim->size - 1) * dim->stride;
    }
    return false;
  }
};

// Whether two footprints of the same strides and sizes meet, `delta` bytes apart, from dimension d on.
bool meet_at(const Footprint& a, const Footprint& b, int64_t delta, size_t d) {
  if (d == a.dims.size()) return delta < a.width && -delta < b.width;
  const Footprint::Dim& dim = a.dims[d];
  int64_t reach = std::max(a.width, b.width);
  for (size_t inner = d + 1; inner < a.dims.size(); ++inner) reach += (a.dims[inner].size - 1) * a.dims[inner].stride;
  // The steps that bring the two within reach of each other: one or two where the strides nest.
  const int64_t first = std::max(-(dim.size - 1), (delta - reach) / dim.stride - 1);
  const int64_t last = std::min(dim.size - 1, (delta + reach) / dim.stride + 1);
  for (int64_t step = first; step <= last; ++step) {
    if (meet_at(a, b, delta - step * dim.stride, d + 1)) return true;
  }
  return false;
}

// Exact for halves of one tensor, which have the same strides; others count as meeting where their ranges do.
bool meet(const Footprint& a, const Footprint& b) {
  if (a.is_empty || b.is_empty || a.data + a.extent() <= b.data || b.data + b.extent() <= a.data) return false;
  const bool same = std::equal(
      a.dims.begin(), a.dims.end(), b.dims.begin(), b.dims.end(),
      [](const Footprint::Dim& x, const Footprint::Dim& y) { return x.stride == y.stride && x.size == y.size; });
  return !same || meet_at(a, b, b.data - a.data, 0);
}

void check_rows_are_contiguous(const char* name, const Tensor& cache) {
  if (cache.size(3) > 1 && cache.stride(3) != 1) {
    value_error(name, " has stride ", cache.stride(3),
                " in its last dimension; it is used in place, so its rows must be contiguous: allocate it as such, or "
                "call ",
                name, ".contiguous() once.");
  }
}

// What is written must be nobody else's.
void check_memory(const KvCacheArguments& a, const KvCacheParams& params) {
  check_rows_are_contiguous("k_cache", a.attention.k);
  check_rows_are_contiguous("v_cache", a.attention.v);
  if (params.append.B * params.append.Lnew == 0) return;
  std::vector<Footprint> written = {{"k_cache", a.attention.k}, {"v_cache", a.attention.v}};
  if (a.k_scale) {
    written.emplace_back("k_scale", *a.k_scale);
    written.emplace_back("v_scale", *a.v_scale);
  }
  std::vector<Footprint> read = {{"q", a.attention.q}, {"k", *a.k}, {"v", *a.v}, {"cache_lengths", a.cache_lengths}};
  if (a.block_table) read.emplace_back("block_table", *a.block_table);
  if (a.rotary_cos) {
    read.emplace_back("rotary_cos", *a.rotary_cos);
    read.emplace_back("rotary_sin", *a.rotary_sin);
  }
  for (size_t i = 0; i < written.size(); ++i) {
    if (!written[i].is_empty && written[i].meets_itself()) {
      value_error(written[i].name,
                  " has rows that share memory, as expand() makes them; what is appended would land in "
                  "all of them: call ",
                  written[i].name, ".contiguous() once.");
    }
    for (size_t j = i + 1; j < written.size(); ++j) {
      if (meet(written[i], written[j])) {
        value_error(written[j].name, " and ", written[i].name,
                    " share memory; one would overwrite the other: allocate them apart.");
      }
    }
    for (const Footprint& other : read) {
      if (meet(written[i], other)) {
        value_error(other.name, " and ", written[i].name, " share memory; the append would overwrite it: pass ",
                    other.name, ".clone().");
      }
    }
  }
}

// The pages to which sequences append, each with its owner. Few, so that a small table of them stays in the cache
// while all entries of the block table are looked up in it.
class AppendedPages {
 public:
  struct Page {
    int64_t page = -1, b = 0, index = 0;  // entry block_table[b, index]
    int64_t first_row = 0;                // the first row that is written
  };

  explicit AppendedPages(int64_t count) {
    size_t slots = 4;
    while (static_cast<int64_t>(slots) < 2 * count) slots *= 2;
    slots_.resize(slots);
  }
  // The page's slot, or the empty one where it belongs.
  Page& at(int64_t page) {
    size_t slot = static_cast<size_t>(page) * 0x9E3779B97F4A7C15u >> 32;
    while (slots_[slot & (slots_.size() - 1)].page != page && slots_[slot & (slots_.size() - 1)].page != -1) ++slot;
    return slots_[slot & (slots_.size() - 1)];
  }

 private:
  std::vector<Page> slots_;
};

class BlockTable {
 public:
  BlockTable(const Tensor& table, int64_t pages)
      : entries_(static_cast<const int32_t*>(table.const_data_ptr())),
        stride_{table.stride(0), table.stride(1)},
        pages_(pages) {}
  int64_t at(int64_t b, int64_t index) const {
    const int64_t page = entries_[b * stride_[0] + index * stride_[1]];
    if (page < 0 || page >= pages_) {
      value_error("block_table[", b, ", ", index, "] is ", page, " but k_cache has ", pages_,
                  " pages; every entry that a sequence uses must lie in [0, ", pages_,
                  "): allocate the page, or shorten cache_lengths.");
    }
    return page;
  }

 private:
  const int32_t* entries_;
  int64_t stride_[2];
  int64_t pages_;
};

void check_block_table(const KvCacheArguments& a, const KvCacheParams& params,
                       const std::vector<int64_t>& lengths_before) {
  AttentionParams p = params.attention;
  const BlockTable table(*a.block_table, p.pages);
  const int64_t Lnew = params.append.Lnew;
  AppendedPages appended(Lnew == 0 ? 0 : p.B * ((Lnew + p.page_size - 1) / p.page_size + 1));
  const auto end_of = [&](int64_t b) { return lengths_before[static_cast<size_t>(b)] + Lnew; };
  for (int64_t b = 0; b < p.B && Lnew > 0; ++b) {
    const int64_t before = end_of(b) - Lnew;
    for (int64_t index = before / p.page_size; index * p.page_size < end_of(b); ++index) {
      const int64_t page = table.at(b, index);
      AppendedPages::Page& slot = appended.at(page);
      if (slot.page != -1) {
        value_error("block_table[", b, ", ", index, "] and block_table[", slot.b, ", ", slot.index, "] are both page ",
                    page, ", to which both append; what one writes the other would read: give each its own page.");
      }
      slot = {page, b, index, std::max<int64_t>(before - index * p.page_size, 0)};
    }
  }
  for (int64_t b = 0; b < p.B; ++b) {
    // From the first key that any row sees: entries before a window may be gone.
    p.Lk = end_of(b);
    const int64_t first = lo(mask_geometry(p, b), 0);
    for (int64_t index = first / p.page_size; index * p.page_size < end_of(b); ++index) {
      const int64_t page = table.at(b, index);
      if (Lnew == 0) continue;
      const AppendedPages::Page& slot = appended.at(page);
      const bool is_own = slot.b == b && slot.index == index;
      if (slot.page == page && !is_own && slot.first_row < end_of(b) - index * p.page_size) {
        value_error("block_table[", slot.b, ", ", slot.index, "] is page ", page, ", row ", slot.first_row,
                    " of which is to be overwritten, but block_table[", b, ", ", index,
                    "] reads that row of it; copy a shared page before appending to it, as fastattn.KVCache does.");
      }
    }
  }
}

}  // namespace

void check_kv_cache_contents(const KvCacheArguments& a, const KvCacheParams& params) {
  check_memory(a, params);
  // The values are where the host cannot read them without waiting for the device; the kernels clamp them.
  if (!a.cache_lengths.is_cpu()) return;
  const CacheAppendParams& append = params.append;
  const auto* length = static_cast<const int32_t*>(a.cache_lengths.const_data_ptr());
  const int64_t stride = a.cache_lengths.stride(0);
  // int32 is what the lengths after the append are kept in.
  const int64_t limit = std::min<int64_t>(append.max_keys, std::numeric_limits<int32_t>::max());
  std::vector<int64_t> before(static_cast<size_t>(append.B));
  for (int64_t b = 0; b < append.B; ++b) {
    const int64_t n = before[static_cast<size_t>(b)] = length[b * stride];
    if (n < 0 || n + append.Lnew > limit) {
      value_error("cache_lengths[", b, "] is ", n, " and ", append.Lnew, " keys are appended, but the cache holds ",
                  limit, "; every length must lie in [0, ", limit - append.Lnew, "]: pass a longer cache",
                  a.block_table ? " or a wider block_table" : "", ", or use fastattn.KVCache, which grows.");
    }
    if (append.rotary_dim != 0 && n + append.Lnew > append.positions) {
      value_error("cache_lengths[", b, "] is ", n, " and ", append.Lnew, " keys are appended, but rotary_cos has ",
                  append.positions,
                  " positions; each token needs its own: compute rotary_cos and rotary_sin for more positions.");
    }
  }
  if (a.block_table) check_block_table(a, params, before);
}

}  // namespace fastattn
