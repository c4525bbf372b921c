// Attention: how its forward and backward passes are cut into work items. The peak rates, too.
#include <chrono>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/plain.h"
#include "cpu/work.h"

namespace fastattn::cpu {
namespace {

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
  const size_t scratch_bytes = whole_pages(table.forward_scratch_bytes(p));
  const Workspace workspace(scratch_bytes * static_cast<size_t>(workers));
  drain(parallel, items, workers, workspace.data(), scratch_bytes,
        [&](int64_t item, char* scratch) { table.forward_item(p, forward_item(p, rows, item), scratch); });
}

void attention_backward(const AttentionGradParams& gp, const Parallel& parallel) {
  if (gp.forward.dtype == DType::kFloat64) return plain_backward_f64(gp, parallel);
  run_backward(gp, nullptr, parallel);
}

void run_backward(const AttentionGradParams& gp, const HardAttentionGradParams* hard, const Parallel& parallel) {
  const AttentionParams& p = gp.forward;
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
  const size_t scratch_bytes =
      whole_pages(table.backward_scratch_bytes(gp, plan.chunk_keys, !plan.has_partials(), hard != nullptr));
  const int64_t chunk_stride = heads * plan.dq_head_floats;
  const size_t partial_bytes =
      plan.has_partials() ? sizeof(float) * static_cast<size_t>(plan.chunks * chunk_stride) : 0;
  const size_t sink_bytes = d_sinks != nullptr ? sizeof(float) * static_cast<size_t>(heads) : 0;
  const int64_t dw_chunk_floats = gp.dw != nullptr ? heads * plan.dq_row_floats : 0;
  const size_t dw_partial_bytes = sizeof(float) * static_cast<size_t>(plan.chunks * dw_chunk_floats);
  const Workspace workspace(whole_pages(partial_bytes) + whole_pages(sink_bytes) + whole_pages(dw_partial_bytes) +
                            scratch_bytes * static_cast<size_t>(workers));
  float* partials = reinterpret_cast<float*>(workspace.data());
  float* sink_partials = reinterpret_cast<float*>(workspace.data() + whole_pages(partial_bytes));
  float* dw_partials =
      reinterpret_cast<float*>(workspace.data() + whole_pages(partial_bytes) + whole_pages(sink_bytes));
  char* scratch_memory = reinterpret_cast<char*>(dw_partials) + whole_pages(dw_partial_bytes);

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
    task.hard = hard;
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
    // In the partials' order: chunks, batches, heads. In double, for a float's sum of very many batches would drift.
    constexpr int64_t kColumns = 64;
    for (int64_t row = 0; row < dw_rows; ++row) {
      for (int64_t d0 = 0; d0 < p.D; d0 += kColumns) {
        const int64_t columns = min_i64(kColumns, p.D - d0);
        double sum[kColumns] = {};
        for (int64_t part = row; part < plan.chunks * heads; part += dw_rows) {
          const float* from = dw_partials + part * plan.dq_row_floats + d0;
          for (int64_t d = 0; d < columns; ++d) sum[d] += static_cast<double>(from[d]);
        }
        float* to = static_cast<float*>(gp.dw) + row * p.D + d0;
        for (int64_t d = 0; d < columns; ++d) to[d] = static_cast<float>(sum[d]);
      }
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

}  // namespace fastattn::cpu
