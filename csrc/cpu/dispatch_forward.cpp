// Attention's forward pass: how it is cut into work items.
//
// Many rows: an item is a block of rows of one (b, hq) (forward.h). Few rows: all rows of the query heads that share a
// key head (decode.h). Where that leaves few items, each with many keys, the keys are cut as well, and a second pass
// merges the parts.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/attention.h"
#include "cpu/packed.h"
#include "cpu/plain.h"
#include "cpu/work.h"

namespace fastattn::cpu {
namespace {

// The keys [begin + part * part_keys, begin + (part + 1) * part_keys) for each part.
struct KeyParts {
  int64_t begin = 0, part_keys = 0, parts = 1;
};

constexpr int64_t kLeastKeys = 256;

// By what one sequence is, not by the batch it comes in: its results have the same bits in any batch.
KeyParts cut_keys(const AttentionParams& p, int64_t b, int64_t items) {
  // Parts enough for this many items, as long as each has so many keys; and more where a part would have too many for
  // a batch of sequences of very different lengths.
  constexpr int64_t kItems = 16, kMostKeys = 4096, kKeyMultiple = 64;
  const TileRange seen = key_range(mask_geometry(p, b), 0, p.Lq);
  const int64_t keys = seen.end - seen.begin;
  const int64_t parts = max_i64(min_i64(ceil_div(kItems, items), keys / kLeastKeys), ceil_div(keys, kMostKeys));
  KeyParts cut{seen.begin, keys, 1};
  if (parts > 1) {
    cut.part_keys = ceil_div(ceil_div(keys, parts), kKeyMultiple) * kKeyMultiple;
    cut.parts = ceil_div(keys, cut.part_keys);
  }
  return cut;
}

// A problem, or a sequence of it, with its share of the call's items.
struct ForwardPart {
  const AttentionParams* p;
  int64_t first_item;
  int64_t b0, b1;
  RowBlocks rows;
  bool decodes;
  int64_t head_items;  // decoding: items that the query heads of a key head make
  KeyParts keys;
  bool keeps_head = false;
  int64_t first_partial = 0;  // of its partial rows, in floats
  int64_t first_merge = 0;

  int64_t blocks() const { return (b1 - b0) * (decodes ? p->Hkv * head_items : p->Hq * rows.blocks); }
  int64_t items() const { return blocks() * keys.parts; }
  bool has_partials() const { return keys.parts > 1; }
  int64_t part_floats() const { return p->Hq * p->Lq * partial_row_floats(*p); }
};

// Few rows make poor use of tiles whose lanes are rows. Where row_max and row_sum are kept, a backward pass follows:
// its weights are exp(score - row_max) of scores that it computes again, as forward.h does to the bit, and decode.h
// not.
bool decodes(const AttentionParams& p) {
  // Of the time that tiles take (D = 128, 512 keys in the second-level cache, bfloat16 and float32 on AVX-512), 1 row
  // of a head took 0.23 to 0.57, 8 rows 0.54 to 0.59, 12 rows 0.8, 16 rows 1.0 to 1.1: docs/experiments.md has more.
  constexpr int64_t kMostRowsOfHead = 15;
  return p.Lq <= kMostRowsOfHead && p.w == nullptr && p.dropout_p == 0.0 && p.row_max == nullptr &&
         p.row_sum == nullptr && !is_small_forward(p);
}

// How many blocks of a head's rows see a key, at most.
int64_t blocks_of_key(const AttentionParams& p, const RowBlocks& rows) {
  const int64_t right = p.causal != Causal::kNone ? 0 : p.window_right;
  if (p.window_left == kUnlimited || right == kUnlimited) return rows.blocks;
  const int64_t left = min_i64(p.window_left, p.Lk);
  return min_i64(rows.blocks, ceil_div(left + min_i64(right, p.Lk), kBlockRows) + 1);
}

class ForwardPlan {
 public:
  ForwardPlan(const std::vector<AttentionParams>& problems, const KernelTable& table) : table_(table) {
    problems_.reserve(problems.size());
    for (const AttentionParams& problem : problems) {
      if (problem.B * problem.Hq * problem.Lq == 0) continue;
      problems_.push_back(decodes(problem) ? problem : heads_as_rows(problem));
      const AttentionParams& p = problems_.back();
      flop += score_flop(p);
      if (decodes(problem)) {
        const int64_t group = p.Hq / p.Hkv;
        const int64_t head_items = ceil_div(group, max_i64(1, kBlockRows / p.Lq));
        for (int64_t b = 0; b < p.B; ++b) {
          add({&p, items, b, b + 1, RowBlocks(p.Lq), true, head_items, cut_keys(p, b, p.Hkv * head_items)});
        }
        scratch_bytes = std::max(scratch_bytes, table.decode_scratch_bytes(p));
        continue;
      }
      scratch_bytes = std::max(scratch_bytes, table.forward_scratch_bytes(p));
      const RowBlocks rows(p.Lq);
      if (rows.blocks > 1 || p.Lk < 2 * kLeastKeys) {
        add({&p, items, 0, p.B, rows, false, 0, {0, p.Lk, 1}});
        continue;
      }
      for (int64_t b = 0; b < p.B; ++b) add({&p, items, b, b + 1, rows, false, 0, cut_keys(p, b, p.Hq)});
    }
    scratch_bytes = whole_pages(scratch_bytes);
  }

  // Decides for which parts a worker's copies of heads are of use, and how much memory it gets for them.
  void keep_heads(int workers) {
    constexpr size_t kMostOfAll = size_t{32} << 20;
    const AttentionParams* last = nullptr;
    size_t bytes = 0;
    for (ForwardPart& part : parts_) {
      // Where keys are cut, items that follow one another are parts of them, and have no tile in common.
      if (part.decodes || part.keys.parts > 1) continue;
      const int64_t items_of_key = blocks_of_key(*part.p, part.rows) * (part.p->Hq / part.p->Hkv);
      if (part.p != last) bytes = whole_pages(table_.head_copy_bytes(*part.p, items_of_key / workers));
      last = part.p;
      if (bytes * static_cast<size_t>(workers) > kMostOfAll) continue;
      part.keeps_head = bytes != 0;
      head_copy_bytes = std::max(head_copy_bytes, bytes);
    }
  }

  // scratch: scratch_bytes and, after them, head_copy_bytes.
  void run(int64_t item, float* partials, char* scratch) const {
    const ForwardPart& part = owner_of(parts_, item, &ForwardPart::first_item);
    const AttentionParams& p = *part.p;
    const int64_t number = item - part.first_item, block = number / part.keys.parts;
    const int64_t key_part = number % part.keys.parts;
    const int64_t j0 = part.keys.begin + key_part * part.keys.part_keys, j1 = j0 + part.keys.part_keys;
    float* partial = part.has_partials() ? partials + part.first_partial + key_part * part.part_floats() : nullptr;
    if (part.decodes) {
      const int64_t hkv = block / part.head_items, share = block % part.head_items, group = p.Hq / p.Hkv;
      const int64_t first = hkv * group;
      table_.decode_item(p,
                         {part.b0, first + group * share / part.head_items,
                          first + group * (share + 1) / part.head_items, j0, j1, partial},
                         scratch);
      return;
    }
    ForwardItem rows = forward_item(p, part.rows, block);
    rows.b += part.b0;
    rows.j0 = j0;
    rows.j1 = j1;
    rows.partial = partial;
    if (part.keeps_head) rows.head_copy = scratch + scratch_bytes;
    table_.forward_item(p, rows, scratch);
  }

  // Every head's rows that several parts have a share in are one item.
  void merge(int64_t item, float* partials) const {
    const ForwardPart& part = owner_of(merged_, item, &ForwardPart::first_merge);
    table_.merge_rows(*part.p, {part.b0, item - part.first_merge, 0, part.p->Lq}, partials + part.first_partial,
                      part.keys.parts, part.part_floats());
  }

  int64_t items = 0, merge_items = 0, partial_floats = 0;
  double flop = 0.0;
  size_t scratch_bytes = 0, head_copy_bytes = 0;

 private:
  void add(ForwardPart part) {
    items += part.items();
    if (part.has_partials()) {
      part.first_partial = partial_floats;
      part.first_merge = merge_items;
      partial_floats += part.keys.parts * part.part_floats();
      merge_items += part.p->Hq;
      merged_.push_back(part);
    }
    parts_.push_back(part);
  }

  const KernelTable& table_;
  std::vector<AttentionParams> problems_;
  std::vector<ForwardPart> parts_, merged_;
};

}  // namespace

void run_forward(const std::vector<AttentionParams>& problems, const Parallel& parallel) {
  ForwardPlan plan(problems, kernel_table());
  if (plan.items == 0) return;
  const int workers = worker_count(parallel, plan.items, plan.flop);
  plan.keep_heads(workers);
  const size_t partial_bytes = whole_pages(sizeof(float) * static_cast<size_t>(plan.partial_floats));
  const size_t worker_bytes = plan.scratch_bytes + plan.head_copy_bytes;
  const Workspace workspace(partial_bytes + worker_bytes * static_cast<size_t>(workers));
  float* partials = reinterpret_cast<float*>(workspace.data());
  char* scratch = workspace.data() + partial_bytes;
  if (plan.head_copy_bytes != 0) {
    for (int w = 0; w < workers; ++w) {
      std::memset(scratch + static_cast<size_t>(w) * worker_bytes + plan.scratch_bytes, 0, kHeadCopyState);
    }
  }
  drain(parallel, plan.items, workers, scratch, worker_bytes,
        [&](int64_t item, char* mine) { plan.run(item, partials, mine); });
  if (plan.merge_items == 0) return;
  drain(parallel, plan.merge_items, workers, nullptr, 0, [&](int64_t item, char*) { plan.merge(item, partials); });
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
