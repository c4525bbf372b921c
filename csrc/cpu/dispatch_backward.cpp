// Attention's backward pass: how it is cut into tasks, and the sums over their partial results.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/attention.h"
#include "cpu/packed.h"
#include "cpu/plain.h"
#include "cpu/work.h"

namespace fastattn::cpu {
namespace {

// One problem, and where its partial results lie in the workspace.
struct BackwardPart {
  const AttentionGradParams& gp;
  int64_t chunks;          // of its keys
  int64_t dq_head_floats;  // of one chunk's partial dq, for one head
  int64_t first_reduction = 0;
  float *dq = nullptr, *d_sinks = nullptr, *dw = nullptr;

  const AttentionParams& p() const { return gp.forward; }
  int64_t heads() const { return p().B * p().Hq; }
  bool has_partials() const { return chunks > 1; }
  int64_t chunk_stride() const { return heads() * dq_head_floats; }
  int64_t dq_floats() const { return has_partials() ? chunks * chunk_stride() : 0; }
  int64_t row_blocks() const { return ceil_div(p().Lq, kBlockRows); }
  int64_t reductions() const { return has_partials() ? heads() * row_blocks() : 0; }
};

// Problems that are cut alike. Mostly one alone; all of them where they share the gradient of a bias that broadcasts
// over sequences: one worker then forms each of its sums, in order.
struct BackwardBundle {
  size_t first_part, end_part;
  int64_t b_groups, h_groups;  // tasks that share a slice of a broadcast bias gradient are one group
  int64_t chunks, chunk_keys;
  int64_t first_item = 0;
  int64_t groups() const { return b_groups * h_groups; }
  int64_t items() const { return groups() * chunks; }
};

bool joins(const AttentionGradParams& gp, int dim) { return gp.d_bias != nullptr && gp.d_bias_stride[dim] == 0; }

// The backward pass of a call, cut by its shape alone.
class BackwardPlan {
 public:
  BackwardPlan(const std::vector<AttentionGradParams>& problems, const KernelTable& table)
      : dq_row_floats_(ceil_div(problems.front().forward.D, table.dq_padding) * table.dq_padding) {
    double dq_bytes = 0.0, qkv_bytes = 0.0;
    for (const AttentionGradParams& gp : problems) {
      const AttentionParams& p = gp.forward;
      flop_ += 2.5 * score_flop(p);
      dq_bytes += 4.0 * static_cast<double>(p.B * p.Hq) * static_cast<double>(dq_head_floats(p));
      qkv_bytes += 4.0 * static_cast<double>(p.B) *
                   (static_cast<double>(p.Hq * p.Lq * p.D) +
                    static_cast<double>(p.Hkv * p.Lk) * static_cast<double>(p.D + p.Dv));
    }
    // Partial dq may take as much memory as q, k and v in float32, or a modest amount.
    constexpr double kPartialBytes = 64 << 20;
    const double limit = qkv_bytes > kPartialBytes ? qkv_bytes * 0.75 : kPartialBytes;
    most_chunks_ = std::max(1.0, dq_bytes == 0.0 ? 1e9 : limit / dq_bytes);

    if (joins(problems.front(), 0)) {
      add_bundle(problems, 0, problems.size());
    } else {
      for (size_t i = 0; i < problems.size(); ++i) add_bundle(problems, i, i + 1);
    }
  }

  std::vector<BackwardPart> parts;
  std::vector<BackwardBundle> bundles;
  int64_t items() const { return bundles.back().first_item + bundles.back().items(); }
  double flop() const { return flop_; }
  int64_t dq_row_floats() const { return dq_row_floats_; }

 private:
  int64_t dq_head_floats(const AttentionParams& p) const {
    return ceil_div(p.Lq, kBlockRows) * kBlockRows * dq_row_floats_;
  }

  void add_bundle(const std::vector<AttentionGradParams>& problems, size_t first, size_t end) {
    // Tasks enough for this many threads, as long as a chunk has this many keys: a chunk packs its rows again.
    constexpr double kTasks = 16.0;
    constexpr int64_t kChunkKeys = 256, kChunkMultiple = 64;
    const AttentionGradParams& gp = problems[first];
    BackwardBundle bundle;
    bundle.first_part = first;
    bundle.end_part = end;
    bundle.b_groups = joins(gp, 0) ? 1 : gp.forward.B;
    bundle.h_groups = joins(gp, 1) ? 1 : gp.forward.Hkv;
    double flop = 0.0;
    int64_t Lk = 0;
    for (size_t i = first; i < end; ++i) {
      flop += 2.5 * score_flop(problems[i].forward);
      Lk = max_i64(Lk, problems[i].forward.Lk);
    }
    // Of several bundles each takes a share of the tasks.
    const double share = first == 0 && end == problems.size() ? 1.0 : flop_ == 0.0 ? 0.0 : flop / flop_;
    const int64_t wanted = static_cast<int64_t>(kTasks * share + 0.999);
    const int64_t most = most_chunks_ < 1e6 ? static_cast<int64_t>(most_chunks_) : 1000000;
    int64_t chunks = min_i64(ceil_div(wanted, max_i64(1, bundle.groups())), min_i64(ceil_div(Lk, kChunkKeys), most));
    // A bias that broadcasts over keys sums over all chunks: one task must see them all.
    if (joins(gp, 3)) chunks = 1;
    chunks = max_i64(1, chunks);
    bundle.chunk_keys = max_i64(1, ceil_div(ceil_div(Lk, chunks), kChunkMultiple) * kChunkMultiple);
    bundle.chunks = max_i64(1, ceil_div(Lk, bundle.chunk_keys));
    if (!bundles.empty()) bundle.first_item = bundles.back().first_item + bundles.back().items();
    bundles.push_back(bundle);
    for (size_t i = first; i < end; ++i) {
      const AttentionParams& p = problems[i].forward;
      BackwardPart part{problems[i], max_i64(1, ceil_div(p.Lk, bundle.chunk_keys)), dq_head_floats(p)};
      if (!parts.empty()) part.first_reduction = parts.back().first_reduction + parts.back().reductions();
      parts.push_back(part);
    }
  }

  double flop_ = 0.0, most_chunks_ = 1.0;
  int64_t dq_row_floats_;
};

int64_t broadcast_elements(const AttentionParams& p, const int64_t (&stride)[4]) {
  const int64_t sizes[4] = {p.B, p.Hq, p.Lq, p.Lk};
  int64_t elements = 1;
  for (int d = 0; d < 4; ++d) elements *= stride[d] == 0 ? 1 : sizes[d];
  return elements;
}

// In the partials' order: parts, chunks, batches, heads. In double, for a float's sum of very many would drift.
void sum_dw(const BackwardPlan& plan, float* dw) {
  const AttentionParams& p = plan.parts.front().p();
  const int64_t rows = p.w_stride == 0 ? 1 : p.Hq;
  constexpr int64_t kColumns = 64;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t d0 = 0; d0 < p.D; d0 += kColumns) {
      const int64_t columns = min_i64(kColumns, p.D - d0);
      double sum[kColumns] = {};
      for (const BackwardPart& part : plan.parts) {
        for (int64_t head = row; head < part.chunks * part.heads(); head += rows) {
          const float* from = part.dw + head * plan.dq_row_floats() + d0;
          for (int64_t d = 0; d < columns; ++d) sum[d] += static_cast<double>(from[d]);
        }
      }
      for (int64_t d = 0; d < columns; ++d) dw[row * p.D + d0 + d] = static_cast<float>(sum[d]);
    }
  }
}

void sum_d_sinks(const BackwardPlan& plan, float* d_sinks) {
  const int64_t Hq = plan.parts.front().p().Hq;
  for (int64_t h = 0; h < Hq; ++h) {
    float sum = 0.0f;
    for (const BackwardPart& part : plan.parts) {
      for (int64_t b = 0; b < part.p().B; ++b) sum += part.d_sinks[b * Hq + h];
    }
    d_sinks[h] = sum;
  }
}

// Gives pieces of a workspace away, one after the other; the first round, without memory, finds its size.
class Pieces {
 public:
  explicit Pieces(char* memory) : memory_(memory) {}
  float* floats(int64_t count) {
    float* piece = memory_ == nullptr ? nullptr : reinterpret_cast<float*>(memory_ + bytes_);
    bytes_ += whole_pages(sizeof(float) * static_cast<size_t>(count));
    return piece;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

void place_partials(const AttentionGradParams& gp, BackwardPlan* plan, Pieces* pieces) {
  for (BackwardPart& part : plan->parts) {
    part.dq = pieces->floats(part.dq_floats());
    part.d_sinks = pieces->floats(gp.d_sinks != nullptr ? part.heads() : 0);
    part.dw = pieces->floats(gp.dw != nullptr ? part.chunks * part.heads() * plan->dq_row_floats() : 0);
  }
}

}  // namespace

void clear_d_bias(const AttentionGradParams& gp) {
  if (gp.d_bias == nullptr) return;
  std::memset(gp.d_bias, 0, sizeof(float) * static_cast<size_t>(broadcast_elements(gp.forward, gp.d_bias_stride)));
}

void run_backward(const std::vector<AttentionGradParams>& problems, const HardAttentionGradParams* hard,
                  const Parallel& parallel) {
  const AttentionGradParams& any = problems.front();
  const AttentionParams& p = any.forward;
  float* d_sinks = static_cast<float*>(any.d_sinks);
  if (p.B * p.Hq == 0) {
    const int64_t dw_rows = p.w_stride == 0 ? 1 : p.Hq;
    if (d_sinks != nullptr) std::memset(d_sinks, 0, sizeof(float) * static_cast<size_t>(p.Hq));
    if (any.dw != nullptr) std::memset(any.dw, 0, sizeof(float) * static_cast<size_t>(dw_rows * p.D));
    for (const AttentionGradParams& gp : problems) {
      // Keys without any query head.
      const AttentionParams& one = gp.forward;
      zero_rows(one.dtype, gp.dk, gp.dk_stride, one.B, one.Hkv, 0, one.Lk, one.D);
      zero_rows(one.dtype, gp.dv, gp.dv_stride, one.B, one.Hkv, 0, one.Lk, one.Dv);
    }
    return;
  }
  const KernelTable& table = kernel_table();
  BackwardPlan plan(problems, table);
  const int64_t items = plan.items();
  const int workers = worker_count(parallel, items, plan.flop());
  size_t scratch_bytes = 0;
  for (const BackwardBundle& bundle : plan.bundles) {
    for (size_t i = bundle.first_part; i < bundle.end_part; ++i) {
      const BackwardPart& part = plan.parts[i];
      scratch_bytes = std::max(scratch_bytes, whole_pages(table.backward_scratch_bytes(
                                                  part.gp, bundle.chunk_keys, !part.has_partials(), hard != nullptr)));
    }
  }
  Pieces sizes(nullptr);
  place_partials(any, &plan, &sizes);
  const Workspace workspace(sizes.bytes() + scratch_bytes * static_cast<size_t>(workers));
  Pieces pieces(workspace.data());
  place_partials(any, &plan, &pieces);
  char* scratch_memory = workspace.data() + pieces.bytes();

  drain(parallel, items, workers, scratch_memory, scratch_bytes, [&](int64_t number, char* scratch) {
    const BackwardBundle& bundle = owner_of(plan.bundles, number, &BackwardBundle::first_item);
    const int64_t item = number - bundle.first_item;
    // Chunks are the outer order: under a causal mask the first keys are seen by the most rows.
    const int64_t chunk = item / bundle.groups(), group = item % bundle.groups();
    const int64_t b = group / bundle.h_groups, h = group % bundle.h_groups;
    for (size_t i = bundle.first_part; i < bundle.end_part; ++i) {
      const BackwardPart& part = plan.parts[i];
      if (chunk >= part.chunks) continue;
      const AttentionParams& mine = part.p();
      BackwardTask task;
      task.b0 = bundle.b_groups == mine.B ? b : 0;
      task.b1 = bundle.b_groups == mine.B ? b + 1 : mine.B;
      task.hkv0 = bundle.h_groups == mine.Hkv ? h : 0;
      task.hkv1 = bundle.h_groups == mine.Hkv ? h + 1 : mine.Hkv;
      task.j0 = min_i64(mine.Lk, chunk * bundle.chunk_keys);
      task.j1 = min_i64(mine.Lk, task.j0 + bundle.chunk_keys);
      task.dq_partial = part.has_partials() ? part.dq + chunk * part.chunk_stride() : nullptr;
      task.d_sinks_partial = d_sinks != nullptr && chunk == 0 ? part.d_sinks : nullptr;
      task.dw_partial = any.dw != nullptr ? part.dw + chunk * part.heads() * plan.dq_row_floats() : nullptr;
      task.hard = hard;
      table.backward_task(part.gp, task, scratch);
    }
  });

  const int64_t reductions = plan.parts.back().first_reduction + plan.parts.back().reductions();
  drain(parallel, reductions, workers, scratch_memory, 0, [&](int64_t number, char*) {
    const BackwardPart& part = owner_of(plan.parts, number, &BackwardPart::first_reduction);
    const int64_t item = number - part.first_reduction, Hq = part.p().Hq;
    const int64_t head = item / part.row_blocks(), i0 = item % part.row_blocks() * kBlockRows;
    table.reduce_dq(part.gp, head / Hq, head % Hq, i0, min_i64(part.p().Lq, i0 + kBlockRows), part.dq, part.chunks,
                    part.chunk_stride());
  });
  if (any.dw != nullptr) sum_dw(plan, static_cast<float*>(any.dw));
  if (d_sinks != nullptr) sum_d_sinks(plan, d_sinks);
}

void attention_backward(const AttentionGradParams& gp, const Parallel& parallel) {
  const bool is_packed = gp.forward.cu_seqlens_q != nullptr;
  if (is_packed) clear_rows_of_no_sequence(gp);
  const std::vector<AttentionGradParams> problems =
      is_packed ? packed_problems(gp) : std::vector<AttentionGradParams>{gp};
  if (gp.forward.dtype == DType::kFloat64) return plain_backward_f64(gp, problems, parallel);
  clear_d_bias(gp);
  run_backward(problems, nullptr, parallel);
}

}  // namespace fastattn::cpu
