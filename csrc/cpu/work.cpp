#include "cpu/work.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/attention.h"

namespace fastattn::cpu {

const KernelTable& kernel_table() {
#define FASTATTN_TABLE(enumerator, name) &name::kernels,
  static constexpr const KernelTable* kTables[] = {FASTATTN_LEVELS(FASTATTN_TABLE)};
#undef FASTATTN_TABLE
  return *kTables[static_cast<int>(active_isa())];
}

Workspace::Workspace(size_t bytes) {
  Cache& cache = cached();
  if (bytes <= cache.bytes) {
    data_ = cache.data;
    bytes_ = cache.bytes;
    cache = Cache{};
    return;
  }
  bytes_ = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  data_ = std::aligned_alloc(kAlignment, bytes_);
  if (data_ == nullptr) throw std::bad_alloc();
}

Workspace::~Workspace() {
  Cache& cache = cached();
  if (bytes_ <= kKept && bytes_ > cache.bytes) {
    std::free(cache.data);
    cache.data = data_;
    cache.bytes = bytes_;
  } else {
    std::free(data_);
  }
}

Workspace::Cache& Workspace::cached() {
  struct Holder {
    Cache cache;
    ~Holder() { std::free(cache.data); }
  };
  thread_local Holder holder;
  return holder.cache;
}

// Work below this many flop is not worth waking another thread for.
constexpr double kFlopPerWorker = 1e6;

int worker_count(const Parallel& parallel, int64_t items, double flop) {
  const double useful = flop / kFlopPerWorker;
  int64_t workers = min_i64(parallel.threads, items);
  if (useful < static_cast<double>(workers)) workers = static_cast<int64_t>(useful);
  return static_cast<int>(max_i64(1, workers));
}

double score_flop(const AttentionParams& p) {
  // An additive score takes about six operations where a product takes one.
  const int64_t per_score = p.w != nullptr ? 6 * p.D : p.D;
  return 2.0 * static_cast<double>(p.B * p.Hq) * static_cast<double>(p.Lq) * static_cast<double>(p.Lk) *
         static_cast<double>(per_score + p.Dv);
}

AttentionParams heads_as_rows(const AttentionParams& p) {
  const bool sees_all = p.causal != Causal::kTopLeft && p.window_left == kUnlimited && p.window_right == kUnlimited;
  const bool is_plain = p.w == nullptr && p.bias == nullptr && p.mask == nullptr && p.alibi_slopes == nullptr &&
                        p.sinks == nullptr && p.dropout_p == 0.0;
  if (p.Lq != 1 || p.Hq == p.Hkv || !sees_all || !is_plain || p.packed_rows != 0) return p;
  AttentionParams joined = p;
  joined.Lq = p.Hq / p.Hkv;
  joined.Hq = p.Hkv;
  joined.causal = Causal::kNone;  // the last query of a sequence sees every key
  joined.q_stride[2] = p.q_stride[1];
  joined.q_stride[1] = p.q_stride[1] * joined.Lq;
  joined.o_stride[2] = p.o_stride[1];
  joined.o_stride[1] = p.o_stride[1] * joined.Lq;
  return joined;
}

int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

void zero_rows(DType dtype, void* rows, const int64_t (&stride)[3], int64_t batches, int64_t heads, int64_t first,
               int64_t end, int64_t columns) {
  const int64_t element = element_bytes(dtype);
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = first; i < end; ++i) {
        char* row = static_cast<char*>(rows) + (b * stride[0] + h * stride[1] + i * stride[2]) * element;
        std::memset(row, 0, static_cast<size_t>(columns * element));
      }
    }
  }
}

}  // namespace fastattn::cpu
