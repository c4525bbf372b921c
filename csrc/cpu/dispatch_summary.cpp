// The summary of attention weights: how its two passes are cut into work items.
#include <algorithm>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/plain.h"
#include "cpu/work.h"

namespace fastattn::cpu {
namespace {

// Keys of an item of the second pass: items enough for this many threads, as long as one has kLeastKeys, for each packs
// the rows again.
int64_t mass_chunk_keys(const AttentionParams& p) {
  constexpr int64_t kItems = 16, kLeastKeys = 256, kMostKeys = 2048, kMultiple = 64;
  const int64_t chunks = clamp_i64(ceil_div(kItems, p.B * p.Hq), ceil_div(p.Lk, kMostKeys), ceil_div(p.Lk, kLeastKeys));
  return ceil_div(ceil_div(p.Lk, chunks), kMultiple) * kMultiple;
}

}  // namespace

void attention_summary(const SummaryParams& params, const Parallel& parallel) {
  if (params.attention.dtype == DType::kFloat64) return plain_summary_f64(params, parallel);
  SummaryParams sp = params;
  AttentionParams& p = sp.attention;
  const int64_t heads = p.B * p.Hq;
  if (heads * p.Lq == 0) {
    if (sp.key_mass != nullptr) std::memset(sp.key_mass, 0, sizeof(float) * static_cast<size_t>(heads * p.Lk));
    return;
  }
  const KernelTable& table = kernel_table();
  SummaryParams joined = sp;
  joined.attention = heads_as_rows(p);
  const RowBlocks rows(joined.attention.Lq);
  const int64_t row_items = joined.attention.B * joined.attention.Hq * rows.blocks;
  const int row_workers = worker_count(parallel, row_items, score_flop(p));
  const size_t row_scratch = whole_pages(table.summary_scratch_bytes(joined));

  const bool wants_mass = sp.key_mass != nullptr && p.Lk > 0;
  const int64_t chunk_keys = wants_mass ? mass_chunk_keys(p) : 0;
  const int64_t mass_items = wants_mass ? heads * ceil_div(p.Lk, chunk_keys) : 0;
  const int mass_workers = worker_count(parallel, mass_items, score_flop(p));
  const size_t mass_scratch = wants_mass ? whole_pages(table.key_mass_scratch_bytes(sp, chunk_keys)) : 0;
  // The second pass reads the statistics of all rows, whether the caller wants them or not.
  const size_t statistic = wants_mass ? whole_pages(sizeof(float) * static_cast<size_t>(heads * p.Lq)) : 0;

  const Workspace workspace(2 * statistic + std::max(row_scratch * static_cast<size_t>(row_workers),
                                                     mass_scratch * static_cast<size_t>(mass_workers)));
  if (wants_mass && p.row_max == nullptr) p.row_max = joined.attention.row_max = workspace.data();
  if (wants_mass && p.row_sum == nullptr) p.row_sum = joined.attention.row_sum = workspace.data() + statistic;
  char* scratch_memory = workspace.data() + 2 * statistic;
  drain(parallel, row_items, row_workers, scratch_memory, row_scratch, [&](int64_t item, char* scratch) {
    table.summary_item(joined, forward_item(joined.attention, rows, item), scratch);
  });
  drain(parallel, mass_items, mass_workers, scratch_memory, mass_scratch, [&](int64_t item, char* scratch) {
    // Chunks are the outer order: under a causal mask the first keys are seen by the most rows.
    const int64_t head = item % heads, j0 = item / heads * chunk_keys;
    table.key_mass_item(sp, {head / p.Hq, head % p.Hq, j0, min_i64(p.Lk, j0 + chunk_keys)}, scratch);
  });
}

}  // namespace fastattn::cpu
