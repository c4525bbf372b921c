// Cuts a call into work items, chooses the kernel table, and has the workers drain the items.
//
// The decomposition depends on the shape alone, never on the number of threads, and every item is computed by one
// worker: results have the same bits whatever the threads do.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/mask.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/plain.h"

namespace fastattn::cpu {
namespace {

const KernelTable& kernel_table() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      return avx512_bf16::kernels;
    case Isa::kAvx512:
      return avx512::kernels;
    case Isa::kAvx2:
      return avx2::kernels;
#endif
    default:
      return baseline::kernels;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for a call, from the heap or, up to kKept bytes, from what this thread kept of its last call: fresh pages cost
// more than a small call computes.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
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
  ~Workspace() {
    Cache& cache = cached();
    if (bytes_ <= kKept && bytes_ > cache.bytes) {
      std::free(cache.data);
      cache.data = data_;
      cache.bytes = bytes_;
    } else {
      std::free(data_);
    }
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  static constexpr size_t kAlignment = 4096, kKept = size_t{64} << 20;
  struct Cache {
    void* data = nullptr;
    size_t bytes = 0;
  };
  struct Holder {
    Cache cache;
    ~Holder() { std::free(cache.data); }
  };
  static Cache& cached() {
    thread_local Holder holder;
    return holder.cache;
  }
  void* data_;
  size_t bytes_;
};

// Work below this many flop is not worth waking another thread for.
constexpr double kFlopPerWorker = 1e6;

int worker_count(const Parallel& parallel, int64_t items, double flop) {
  const double useful = flop / kFlopPerWorker;
  int64_t workers = min_i64(parallel.threads, items);
  if (useful < static_cast<double>(workers)) workers = static_cast<int64_t>(useful);
  return static_cast<int>(max_i64(1, workers));
}

// Runs body(item, scratch of the worker) for every item in [0, items), in order of their numbers as workers come free.
template <class Body>
void drain(const Parallel& parallel, int64_t items, int workers, char* scratch, size_t scratch_bytes,
           const Body& body) {
  struct Job {
    std::atomic<int64_t> next{0};
    int64_t items;
    char* scratch;
    size_t scratch_bytes;
    const Body* body;
  } job;
  job.items = items;
  job.scratch = scratch;
  job.scratch_bytes = scratch_bytes;
  job.body = &body;
  const auto work = [](void* argument, int worker) {
    Job& mine = *static_cast<Job*>(argument);
    for (int64_t item; (item = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.items;) {
      (*mine.body)(item, mine.scratch + static_cast<size_t>(worker) * mine.scratch_bytes);
    }
  };
  if (workers == 1) {
    work(&job, 0);
  } else {
    parallel.run(parallel, workers, work, &job);
  }
}

size_t worker_stride(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

double score_flop(const AttentionParams& p) {
  // An additive score takes about six operations where a product takes one.
  const int64_t per_score = p.w != nullptr ? 6 * p.D : p.D;
  return 2.0 * static_cast<double>(p.B * p.Hq) * static_cast<double>(p.Lq) * static_cast<double>(p.Lk) *
         static_cast<double>(per_score + p.Dv);
}

// Rows are cut into blocks of whole vectors, as even as that allows: 197 rows become 64 + 48 + 48 + 37.
constexpr int64_t kRowUnit = 16;

struct RowBlocks {
  int64_t units, blocks;
  explicit RowBlocks(int64_t Lq) : units(ceil_div(Lq, kRowUnit)), blocks(ceil_div(units, kBlockRows / kRowUnit)) {}
  int64_t begin(int64_t block) const { return units * block / blocks * kRowUnit; }
};

// How the backward pass is cut, by the shape alone.
struct BackwardPlan {
  int64_t b_groups, h_groups;  // tasks that share a slice of a broadcast bias gradient are one group
  int64_t chunks, chunk_keys;
  int64_t dq_row_floats, dq_head_floats;  // of one chunk's dq partial, per (b, hq, i) and per (b, hq)
  bool has_partials() const { return chunks > 1; }
  int64_t tasks() const { return b_groups * h_groups * chunks; }
};

BackwardPlan plan_backward(const AttentionGradParams& gp, const KernelTable& table) {
  // Tasks enough for this many threads, as long as a chunk has this many keys: a chunk packs its rows again.
  constexpr int64_t kTasks = 16, kChunkKeys = 256;
  constexpr double kPartialBytes = 64 << 20;
  const AttentionParams& p = gp.forward;
  BackwardPlan plan;
  const bool joins_b = gp.d_bias != nullptr && gp.d_bias_stride[0] == 0;
  const bool joins_h = gp.d_bias != nullptr && gp.d_bias_stride[1] == 0;
  plan.b_groups = joins_b ? 1 : p.B;
  plan.h_groups = joins_h ? 1 : p.Hkv;
  const int64_t groups = max_i64(1, plan.b_groups * plan.h_groups);
  plan.dq_row_floats = ceil_div(p.D, table.dq_padding) * table.dq_padding;
  plan.dq_head_floats = ceil_div(p.Lq, kBlockRows) * kBlockRows * plan.dq_row_floats;
  int64_t chunks = min_i64(ceil_div(kTasks, groups), ceil_div(p.Lk, kChunkKeys));
  // Partial dq may take as much memory as q, k and v in float32, or a modest amount.
  const double dq_bytes = 4.0 * static_cast<double>(p.B * p.Hq) * static_cast<double>(plan.dq_head_floats);
  const double qkv_bytes =
      4.0 * static_cast<double>(p.B) *
      (static_cast<double>(p.Hq * p.Lq * p.D) + static_cast<double>(p.Hkv * p.Lk) * static_cast<double>(p.D + p.Dv));
  const double limit = qkv_bytes > kPartialBytes ? qkv_bytes * 0.75 : kPartialBytes;
  while (chunks > 1 && dq_bytes * static_cast<double>(chunks) > limit) --chunks;
  // A bias that broadcasts over keys sums over all chunks: one task must see them all.
  if (gp.d_bias != nullptr && gp.d_bias_stride[3] == 0) chunks = 1;
  chunks = max_i64(1, chunks);
  constexpr int64_t kChunkMultiple = 64;
  plan.chunk_keys = max_i64(1, ceil_div(ceil_div(p.Lk, chunks), kChunkMultiple) * kChunkMultiple);
  plan.chunks = max_i64(1, ceil_div(p.Lk, plan.chunk_keys));
  return plan;
}

int64_t broadcast_elements(const AttentionParams& p, const int64_t (&stride)[4]) {
  const int64_t sizes[4] = {p.B, p.Hq, p.Lq, p.Lk};
  int64_t elements = 1;
  for (int d = 0; d < 4; ++d) elements *= stride[d] == 0 ? 1 : sizes[d];
  return elements;
}

// With one query per head, the query heads that share a key head become the rows of one: they then share each read of
// its keys, and fill the lanes. Only where nothing but the length tells heads and rows apart.
AttentionParams heads_as_rows(const AttentionParams& p) {
  const bool sees_all = p.causal != Causal::kTopLeft && p.window_left == kUnlimited && p.window_right == kUnlimited;
  const bool is_plain = p.w == nullptr && p.bias == nullptr && p.mask == nullptr && p.alibi_slopes == nullptr &&
                        p.sinks == nullptr && p.dropout_p == 0.0;
  if (p.Lq != 1 || p.Hq == p.Hkv || !sees_all || !is_plain) return p;
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

// Zeroes dk or dv, which keys without any query head have too.
void zero_rows(const AttentionParams& p, void* rows, const int64_t (&stride)[3], int64_t columns) {
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t h = 0; h < p.Hkv; ++h) {
      for (int64_t j = 0; j < p.Lk; ++j) {
        char* row = static_cast<char*>(rows) + (b * stride[0] + h * stride[1] + j * stride[2]) * element;
        std::memset(row, 0, static_cast<size_t>(columns * element));
      }
    }
  }
}

}  // namespace

void attention_forward(const AttentionParams& params, const Parallel& parallel) {
  if (params.dtype == DType::kFloat64) return plain_forward_f64(params, parallel);
  if (params.B * params.Hq * params.Lq == 0) return;
  const AttentionParams p = heads_as_rows(params);
  const KernelTable& table = kernel_table();
  const RowBlocks rows(p.Lq);
  const int64_t items = p.B * p.Hq * rows.blocks;
  const int workers = worker_count(parallel, items, score_flop(p));
  const size_t scratch_bytes = worker_stride(table.forward_scratch_bytes(p));
  const Workspace workspace(scratch_bytes * static_cast<size_t>(workers));
  drain(parallel, items, workers, workspace.data(), scratch_bytes, [&](int64_t item, char* scratch) {
    // Within a head the last rows come first: under a causal mask they are the longest items.
    const int64_t head = item / rows.blocks, block = rows.blocks - 1 - item % rows.blocks;
    table.forward_item(p, {head / p.Hq, head % p.Hq, rows.begin(block), min_i64(p.Lq, rows.begin(block + 1))}, scratch);
  });
}

void attention_backward(const AttentionGradParams& gp, const Parallel& parallel) {
  const AttentionParams& p = gp.forward;
  if (p.dtype == DType::kFloat64) return plain_backward_f64(gp, parallel);
  const int64_t heads = p.B * p.Hq;
  if (gp.d_bias != nullptr) {
    std::memset(gp.d_bias, 0, sizeof(float) * static_cast<size_t>(broadcast_elements(p, gp.d_bias_stride)));
  }
  float* d_sinks = static_cast<float*>(gp.d_sinks);
  const int64_t dw_rows = p.w_stride == 0 ? 1 : p.Hq;
  const size_t dw_bytes = gp.dw != nullptr ? sizeof(float) * static_cast<size_t>(dw_rows * p.D) : 0;
  if (heads == 0) {
    if (d_sinks != nullptr) std::memset(d_sinks, 0, sizeof(float) * static_cast<size_t>(p.Hq));
    if (gp.dw != nullptr) std::memset(gp.dw, 0, dw_bytes);
    zero_rows(p, gp.dk, gp.dk_stride, p.D);
    zero_rows(p, gp.dv, gp.dv_stride, p.Dv);
    return;
  }
  const KernelTable& table = kernel_table();
  const BackwardPlan plan = plan_backward(gp, table);
  const int64_t tasks = plan.tasks();
  const int workers = worker_count(parallel, tasks, 2.5 * score_flop(p));
  const size_t scratch_bytes = worker_stride(table.backward_scratch_bytes(gp, plan.chunk_keys, !plan.has_partials()));
  const int64_t chunk_stride = heads * plan.dq_head_floats;
  const size_t partial_bytes =
      plan.has_partials() ? sizeof(float) * static_cast<size_t>(plan.chunks * chunk_stride) : 0;
  const size_t sink_bytes = d_sinks != nullptr ? sizeof(float) * static_cast<size_t>(heads) : 0;
  const int64_t dw_chunk_floats = gp.dw != nullptr ? heads * plan.dq_row_floats : 0;
  const size_t dw_partial_bytes = sizeof(float) * static_cast<size_t>(plan.chunks * dw_chunk_floats);
  const Workspace workspace(worker_stride(partial_bytes) + worker_stride(sink_bytes) + worker_stride(dw_partial_bytes) +
                            scratch_bytes * static_cast<size_t>(workers));
  float* partials = reinterpret_cast<float*>(workspace.data());
  float* sink_partials = reinterpret_cast<float*>(workspace.data() + worker_stride(partial_bytes));
  float* dw_partials =
      reinterpret_cast<float*>(workspace.data() + worker_stride(partial_bytes) + worker_stride(sink_bytes));
  char* scratch_memory = reinterpret_cast<char*>(dw_partials) + worker_stride(dw_partial_bytes);

  const int64_t groups = plan.b_groups * plan.h_groups;
  drain(parallel, tasks, workers, scratch_memory, scratch_bytes, [&](int64_t item, char* scratch) {
    // Chunks are the outer order: under a causal mask the first keys are seen by the most rows.
    const int64_t chunk = item / groups, group = item % groups;
    const int64_t b = group / plan.h_groups, h = group % plan.h_groups;
    BackwardTask task;
    task.b0 = plan.b_groups == p.B ? b : 0;
    task.b1 = plan.b_groups == p.B ? b + 1 : p.B;
    task.hkv0 = plan.h_groups == p.Hkv ? h : 0;
    task.hkv1 = plan.h_groups == p.Hkv ? h + 1 : p.Hkv;
    task.j0 = min_i64(p.Lk, chunk * plan.chunk_keys);
    task.j1 = min_i64(p.Lk, task.j0 + plan.chunk_keys);
    task.dq_partial = plan.has_partials() ? partials + chunk * chunk_stride : nullptr;
    task.d_sinks_partial = d_sinks != nullptr && chunk == 0 ? sink_partials : nullptr;
    task.dw_partial = gp.dw != nullptr ? dw_partials + chunk * dw_chunk_floats : nullptr;
    table.backward_task(gp, task, scratch);
  });

  if (plan.has_partials()) {
    const int64_t blocks = ceil_div(p.Lq, kBlockRows);
    drain(parallel, heads * blocks, workers, scratch_memory, 0, [&](int64_t item, char*) {
      const int64_t head = item / blocks, i0 = item % blocks * kBlockRows;
      table.reduce_dq(gp, head / p.Hq, head % p.Hq, i0, min_i64(p.Lq, i0 + kBlockRows), partials, plan.chunks,
                      chunk_stride);
    });
  }
  if (gp.dw != nullptr) {
    float* dw = static_cast<float*>(gp.dw);
    std::memset(dw, 0, dw_bytes);
    // By chunks, batches and heads, as the partials lie.
    for (int64_t part = 0; part < plan.chunks * heads; ++part) {
      float* to = dw + part % dw_rows * p.D;
      const float* from = dw_partials + part * plan.dq_row_floats;
      for (int64_t d = 0; d < p.D; ++d) to[d] += from[d];
    }
  }
  if (d_sinks != nullptr) {
    for (int64_t h = 0; h < p.Hq; ++h) {
      float sum = 0.0f;
      for (int64_t b = 0; b < p.B; ++b) sum += sink_partials[b * p.Hq + h];
      d_sinks[h] = sum;
    }
  }
}

double measure_peak_flops(DType dtype, const Parallel& parallel) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 200000;
  constexpr int kRepeats = 9;
  const KernelTable& table = kernel_table();
  double best = 0.0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::atomic<double> flop{0.0};
    const Clock::time_point start = Clock::now();
    drain(parallel, parallel.threads, parallel.threads, nullptr, 0, [&](int64_t, char*) {
      float sink;
      const double mine = table.multiply_adds(dtype, kRounds, &sink);
      double before = flop.load();
      while (!flop.compare_exchange_weak(before, before + mine)) {
      }
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (flop.load() / seconds > best) best = flop.load() / seconds;
  }
  return best;
}

void hard_attention_forward(const HardAttentionParams&, const Parallel&) { throw std::bad_alloc(); }
void hard_attention_backward(const HardAttentionGradParams&, const Parallel&) { throw std::bad_alloc(); }
void attention_summary(const SummaryParams&, const Parallel&) { throw std::bad_alloc(); }

}  // namespace fastattn::cpu
