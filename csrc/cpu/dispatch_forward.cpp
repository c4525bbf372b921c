// Attention's forward pass: how it is cut into work items.
#include <algorithm>
#include <vector>

#include "cpu/attention.h"
#include "cpu/packed.h"
#include "cpu/plain.h"
#include "cpu/work.h"

namespace fastattn::cpu {
namespace {

// One problem with its share of the call's items.
struct ForwardPart {
  AttentionParams p;
  RowBlocks rows;
  int64_t first_item;
  int64_t items() const { return p.B * p.Hq * rows.blocks; }
};

}  // namespace

void run_forward(const std::vector<AttentionParams>& problems, const Parallel& parallel) {
  const KernelTable& table = kernel_table();
  std::vector<ForwardPart> parts;
  parts.reserve(problems.size());
  int64_t items = 0;
  double flop = 0.0;
  size_t scratch_bytes = 0;
  for (const AttentionParams& problem : problems) {
    if (problem.B * problem.Hq * problem.Lq == 0) continue;
    const AttentionParams p = heads_as_rows(problem);
    parts.push_back({p, RowBlocks(p.Lq), items});
    items += parts.back().items();
    flop += score_flop(p);
    scratch_bytes = std::max(scratch_bytes, whole_pages(table.forward_scratch_bytes(p)));
  }
  if (items == 0) return;
  const int workers = worker_count(parallel, items, flop);
  const Workspace workspace(scratch_bytes * static_cast<size_t>(workers));
  drain(parallel, items, workers, workspace.data(), scratch_bytes, [&](int64_t item, char* scratch) {
    const ForwardPart& part = owner_of(parts, item, &ForwardPart::first_item);
    table.forward_item(part.p, forward_item(part.p, part.rows, item - part.first_item), scratch);
  });
}

void attention_forward(const AttentionParams& params, const Parallel& parallel) {
  std::vector<AttentionParams> problems{params};
  if (params.cu_seqlens_q != nullptr) {
    clear_rows_of_no_sequence(params);
    problems = packed_problems(params);
  }
  if (params.dtype != DType::kFloat64) return run_forward(problems, parallel);
  for (const AttentionParams& problem : problems) plain_forward_f64(problem, parallel);
}

}  // namespace fastattn::cpu
