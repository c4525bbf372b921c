// A call's work items, the memory they take, and the workers that drain them.
//
// The decomposition depends on the shape alone, never on the number of threads, and every item is computed by one
// worker: results have the same bits whatever the threads do.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

#include "core/mask.h"
#include "core/params.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

// Of the active instruction set.
const KernelTable& kernel_table();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for a call, from the heap or, up to kKept bytes, from what this thread kept of its last call: fresh pages cost
// more than a small call computes. Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  static constexpr size_t kAlignment = 4096, kKept = size_t{64} << 20;
  struct Cache {
    void* data = nullptr;
    size_t bytes = 0;
  };
  static Cache& cached();
  void* data_;
  size_t bytes_;
};

// Pieces of a workspace begin on pages.
inline size_t whole_pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

int worker_count(const Parallel& parallel, int64_t items, double flop);

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

// Flop of S and O.
double score_flop(const AttentionParams& p);

// Rows are cut into blocks of whole vectors, as even as that allows: 197 rows become 64 + 48 + 48 + 37.
constexpr int64_t kRowUnit = 16;

struct RowBlocks {
  int64_t units, blocks;
  explicit RowBlocks(int64_t Lq) : units(ceil_div(Lq, kRowUnit)), blocks(ceil_div(units, kBlockRows / kRowUnit)) {}
  int64_t begin(int64_t block) const { return units * block / blocks * kRowUnit; }
};

// The forward item of a number in [0, B * Hq * rows.blocks). Within a head the last rows come first: under a causal
// mask they are the longest items.
inline ForwardItem forward_item(const AttentionParams& p, const RowBlocks& rows, int64_t item) {
  const int64_t head = item / rows.blocks, block = rows.blocks - 1 - item % rows.blocks;
  return {head / p.Hq, head % p.Hq, rows.begin(block), min_i64(p.Lq, rows.begin(block + 1))};
}

// With one query per head, the query heads that share a key head become the rows of one: they then share each read of
// its keys, and fill the lanes. Only where nothing but the length tells heads and rows apart; else p itself.
AttentionParams heads_as_rows(const AttentionParams& p);

// Of parts in the order of their items, the one that has this item; `first` is the member that numbers its first.
template <class Part>
const Part& owner_of(const std::vector<Part>& parts, int64_t item, int64_t Part::* first) {
  const auto next = std::upper_bound(parts.begin(), parts.end(), item,
                                     [&](int64_t number, const Part& part) { return number < part.*first; });
  return *(next - 1);
}

int64_t element_bytes(DType dtype);
// Rows [first, end) of every head become 0, `columns` elements of each.
void zero_rows(DType dtype, void* rows, const int64_t (&stride)[3], int64_t batches, int64_t heads, int64_t first,
               int64_t end, int64_t columns);

// The passes of dense problems that make up one call, as one list of items. All differ in nothing but sizes and
// pointers, and share d_sinks and dw.
void run_forward(const std::vector<AttentionParams>& problems, const Parallel& parallel);
// attention's gradients, or, where `hard` is not null, what hard_attention_backward asks of its one problem. d_bias has
// been cleared.
void run_backward(const std::vector<AttentionGradParams>& problems, const HardAttentionGradParams* hard,
                  const Parallel& parallel);

}  // namespace fastattn::cpu
