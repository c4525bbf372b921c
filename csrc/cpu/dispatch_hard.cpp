// Hard attention: how its passes are cut into work items.
#include "cpu/attention.h"
#include "cpu/plain.h"
#include "cpu/work.h"

namespace fastattn::cpu {

void hard_attention_forward(const HardAttentionParams& params, const Parallel& parallel) {
  if (params.attention.dtype == DType::kFloat64) return plain_hard_forward_f64(params, parallel);
  HardAttentionParams hp = params;
  AttentionParams& p = hp.attention;
  if (p.B * p.Hq * p.Lq == 0) return;
  // A draw is tied to its head and row.
  if (!hp.is_sampled) p = heads_as_rows(p);
  const KernelTable& table = kernel_table();
  const RowBlocks rows(p.Lq);
  const int64_t items = p.B * p.Hq * rows.blocks;
  const int workers = worker_count(parallel, items, score_flop(p));
  const size_t scratch_bytes = whole_pages(table.hard_scratch_bytes(hp));
  const Workspace workspace(scratch_bytes * static_cast<size_t>(workers));
  drain(parallel, items, workers, workspace.data(), scratch_bytes,
        [&](int64_t item, char* scratch) { table.hard_item(hp, forward_item(p, rows, item), scratch); });
}

void hard_attention_backward(const HardAttentionGradParams& hard, const Parallel& parallel) {
  if (hard.forward.dtype == DType::kFloat64) return plain_hard_backward_f64(hard, parallel);
  AttentionGradParams gp;
  gp.forward = hard.forward;
  gp.dq = hard.dq;
  gp.dk = hard.dk;
  gp.dv = hard.dv;
  for (int dim = 0; dim < 3; ++dim) {
    gp.dq_stride[dim] = hard.dq_stride[dim];
    gp.dk_stride[dim] = hard.dk_stride[dim];
    gp.dv_stride[dim] = hard.dv_stride[dim];
  }
  run_backward({gp}, &hard, parallel);
}

}  // namespace fastattn::cpu
