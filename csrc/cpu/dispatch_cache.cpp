// Appending to a cache: how it is cut into work items.
#include "cpu/attention.h"
#include "cpu/plain.h"
#include "cpu/work.h"

namespace fastattn::cpu {
namespace {

// Tokens of an item: enough that finding the next item costs nothing beside them.
constexpr int64_t kItemTokens = 16;

}  // namespace

void append_to_cache(const CacheAppendParams& p, const Parallel& parallel) {
  for (int64_t b = 0; b < p.B; ++b) p.new_lengths[b] = static_cast<int32_t>(tokens_before(p, b) + p.Lnew);
  if (p.B * p.Lnew == 0) return;
  if (p.dtype == DType::kFloat64) return plain_append_f64(p);
  const KernelTable& table = kernel_table();
  const int64_t blocks = ceil_div(p.Lnew, kItemTokens), items = p.B * blocks;
  // A number that is read, changed and written costs about as much as a few flop.
  const double numbers = static_cast<double>(p.B * p.Lnew) * static_cast<double>(p.Hkv * (p.D + p.Dv) + p.Hq * p.D);
  const int workers = worker_count(parallel, items, 8.0 * numbers);
  const size_t scratch_bytes = whole_pages(table.append_scratch_bytes(p));
  const Workspace workspace(scratch_bytes * static_cast<size_t>(workers));
  drain(parallel, items, workers, workspace.data(), scratch_bytes, [&](int64_t item, char* scratch) {
    const int64_t t0 = item % blocks * kItemTokens;
    table.append_item(p, {item / blocks, t0, min_i64(p.Lnew, t0 + kItemTokens)}, scratch);
  });
}

}  // namespace fastattn::cpu
