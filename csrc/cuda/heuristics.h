// From a problem's shape to the tiles that serve it: pure host functions, tested as such. A plan depends on shapes and
// on the device alone, never on what else runs, so that a call's bits do not change from one time to the next.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/mask.h"
#include "core/params.h"
#include "cuda/attention.h"

namespace fastattn::cuda {

constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};

// The smallest of kHeadDims that holds D and Dv; what is missing in a row is filled with zeros.
constexpr int head_dim_bucket(int64_t D, int64_t Dv) {
  for (const int dim : kHeadDims) {
    if (D <= dim && Dv <= dim) return dim;
  }
  return 0;
}

// kPlain: scale * q . k behind an interval mask, many rows. kModified: everything. kFewRows: at most 16 rows,
// everything.
enum class ForwardVariant { kPlain, kModified, kFewRows };

struct ForwardTiles {
  int block_m, block_n, warps;
};

// As large as registers allow without a spill: 32 rows for each warp where they can, because a fragment of k or v is
// then loaded once for two products. float32 has only kModified, with tiles of q, k and v that together stay below the
// 99 KB that every device has.
constexpr ForwardTiles forward_tiles(DType type, int dim, ForwardVariant variant) {
  if (type == DType::kFloat32) return {64, dim <= 64 ? 64 : dim <= 128 ? 32 : 16, 4};
  if (variant == ForwardVariant::kFewRows) return {16, dim % 64 == 0 && dim != 192 ? 64 : 32, 1};
  if (variant == ForwardVariant::kModified || dim > 128) return {64, 64, 4};
  return {128, 64, 4};
}

constexpr int forward_shared_bytes(DType type, int dim, ForwardTiles tiles) {
  return (tiles.block_m + 2 * tiles.block_n) * dim * (type == DType::kFloat32 ? 4 : 2);
}

struct ForwardPlan {
  int dim = 0;
  ForwardVariant variant = ForwardVariant::kPlain;
  int packed_heads = 1;
  int row_blocks = 1;
  int splits = 1;
  int64_t blocks = 0;
};

constexpr int kMaxSplits = 128;
constexpr int kPackedRows = 64;  // heads that share keys are packed when all their rows fit into one tile

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// CTAs that fit into the 64 K registers of a multiprocessor, whatever the kernel takes.
constexpr int blocks_by_registers(int warps) { return 65536 / (255 * 32 * warps); }

// CTAs that a multiprocessor should hold at once: as many as fit by shared memory (each CTA costs 1 KB more) and by
// registers, up to three. Three have up to 96 KB of keys and values under way, more than twice of what memory with a
// latency of 1 us and 5 TB/s wants; more parts than that only mean more partial results.
inline int64_t resident_blocks(int shared_bytes, int by_registers, const DeviceProperties& device) {
  const int64_t by_shared = (device.shared_bytes + 1024) / (shared_bytes + 1024);
  return clamp_i64(min_i64(by_shared, by_registers), 1, 3);
}

// Keys that the row tile with the most of them sees, at most.
inline int64_t visible_keys(const AttentionParams& p, int64_t rows) {
  const int64_t right = p.causal != Causal::kNone ? 0 : p.window_right;
  if (p.window_left == kUnlimited || right == kUnlimited) return p.Lk;
  return min_i64(p.Lk, min_i64(p.window_left, p.Lk) + min_i64(right, p.Lk) + rows);
}

// The number of parts into which the keys of each tile of rows are split: the smallest whose waves of CTAs are at least
// 0.85 times as full as those of the best. 1 where the CTAs without a split fill 0.8 of the device.
inline int choose_splits(int64_t blocks, int64_t key_tiles, int64_t resident) {
  if (blocks == 0 || key_tiles <= 1 || 10 * blocks >= 8 * resident) return 1;
  const int64_t most = min_i64(key_tiles, kMaxSplits);
  const auto efficiency = [&](int64_t splits) {
    const double waves = static_cast<double>(blocks * splits) / static_cast<double>(resident);
    return waves / static_cast<double>(divide_up(blocks * splits, resident));
  };
  // A number that leaves the longest part no shorter than a smaller number does is not eligible.
  const auto is_eligible = [&](int64_t splits) {
    return splits == 1 || divide_up(key_tiles, splits) != divide_up(key_tiles, splits - 1);
  };
  double best = 0.0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    if (is_eligible(splits) && efficiency(splits) > best) best = efficiency(splits);
  }
  for (int64_t splits = 1; splits <= most; ++splits) {
    if (is_eligible(splits) && efficiency(splits) >= 0.85 * best) return static_cast<int>(splits);
  }
  return 1;
}

inline ForwardPlan plan_forward(const AttentionParams& p, bool has_modifiers, const DeviceProperties& device) {
  ForwardPlan plan;
  plan.dim = head_dim_bucket(p.D, p.Dv);
  const int64_t group = p.Hkv > 0 ? p.Hq / p.Hkv : 1;
  plan.packed_heads = group > 1 && p.Lq * group <= kPackedRows ? static_cast<int>(group) : 1;
  const int64_t rows = p.Lq * plan.packed_heads;
  plan.variant = p.dtype != DType::kFloat32 && rows <= 16                    ? ForwardVariant::kFewRows
                 : p.dtype == DType::kFloat32 || has_modifiers || rows <= 64 ? ForwardVariant::kModified
                                                                             : ForwardVariant::kPlain;
  const ForwardTiles tiles = forward_tiles(p.dtype, plan.dim, plan.variant);
  plan.row_blocks = static_cast<int>(divide_up(rows, tiles.block_m));
  const int64_t blocks = plan.row_blocks * (p.Hq / plan.packed_heads) * p.B;
  // Of packed sequences most may be shorter than the longest, and have no use for all of its tiles: those that do are
  // at most so many.
  int64_t busy = blocks;
  if (p.packed_rows != 0) {
    const int64_t tiles_with_rows = p.packed_rows * plan.packed_heads / tiles.block_m + p.B;
    busy = min_i64(blocks, tiles_with_rows * (p.Hq / plan.packed_heads));
  }
  const int64_t resident = device.multiprocessors * resident_blocks(forward_shared_bytes(p.dtype, plan.dim, tiles),
                                                                    blocks_by_registers(tiles.warps), device);
  const int64_t block_queries = divide_up(min_i64(rows, tiles.block_m), plan.packed_heads) + 1;
  plan.splits = choose_splits(busy, divide_up(visible_keys(p, block_queries), tiles.block_n), resident);
  plan.blocks = blocks * plan.splits;
  return plan;
}

// Tiles of the backward kernels: rows that stay (keys for dk and dv, queries for dq), and rows that pass by.
struct BackwardTiles {
  int resident, streamed, warps, stages;
};

// The widest within the 99 KB of shared memory that every device has, and without a spill.
constexpr BackwardTiles backward_tiles(DType type, int dim) {
  if (type == DType::kFloat32) {
    return dim <= 64    ? BackwardTiles{64, 32, 4, 2}
           : dim <= 128 ? BackwardTiles{64, 16, 4, 2}
           : dim <= 192 ? BackwardTiles{32, 16, 2, 2}
                        : BackwardTiles{32, 16, 2, 1};
  }
  return dim <= 64    ? BackwardTiles{128, 32, 4, 2}
         : dim <= 96  ? BackwardTiles{64, 64, 4, 2}
         : dim <= 192 ? BackwardTiles{64, 32, 4, 2}
                      : BackwardTiles{64, 32, 4, 1};
}

// The parts into which the columns of dq, dk and dv are cut, each for a CTA of its own: in float32, whose operands are
// held in two parts, 256 columns and what it takes to compute them do not fit into registers.
constexpr int gradient_parts(DType type, int dim) { return type == DType::kFloat32 && dim == 256 ? 2 : 1; }

// dk and dv are accumulated in one kernel where both fit into registers, else in one kernel each.
constexpr bool splits_dk_dv(DType type, int dim) { return dim > (type == DType::kFloat32 ? 96 : 128); }

struct BackwardPlan {
  int dim = 0;
  bool is_plain = false;
  int key_blocks = 0, row_blocks = 0;
  int64_t key_ctas = 0, query_ctas = 0;
  // The bias's gradient, along batch, head, query tile and key tile: see BiasGradientParams.
  int64_t bias_kept[4] = {1, 1, 1, 1}, bias_summed[4] = {1, 1, 1, 1};
  int64_t bias_steps = 1, bias_chunks = 1, bias_elements = 0, bias_ctas = 0;
};

constexpr int64_t kMaxBiasSumBytes = 256 << 20;  // of all chunks together

inline BackwardPlan plan_backward(const AttentionGradParams& g, bool has_modifiers, const DeviceProperties& device) {
  const AttentionParams& p = g.forward;
  BackwardPlan plan;
  plan.dim = head_dim_bucket(p.D, p.Dv);
  plan.is_plain = !has_modifiers && p.dtype != DType::kFloat32;
  const BackwardTiles tiles = backward_tiles(p.dtype, plan.dim);
  plan.key_blocks = static_cast<int>(divide_up(p.Lk, tiles.resident));
  plan.row_blocks = static_cast<int>(divide_up(p.Lq, tiles.resident));
  const int parts = gradient_parts(p.dtype, plan.dim);
  plan.key_ctas = plan.key_blocks * p.Hkv * p.B * parts;
  plan.query_ctas = plan.row_blocks * p.Hq * p.B * parts;
  if (g.d_bias) {
    const int64_t sizes[4] = {p.B, p.Hq, p.Lq, p.Lk};
    const int64_t extents[4] = {p.B, p.Hq, plan.row_blocks, divide_up(p.Lk, tiles.streamed)};
    int64_t ctas = 1;
    plan.bias_elements = 1;
    for (int dim = 0; dim < 4; ++dim) {
      const bool is_kept = g.d_bias_stride[dim] != 0;
      plan.bias_kept[dim] = is_kept ? extents[dim] : 1;
      plan.bias_summed[dim] = is_kept ? 1 : extents[dim];
      plan.bias_elements *= is_kept ? sizes[dim] : 1;
      plan.bias_steps *= plan.bias_summed[dim];
      ctas *= plan.bias_kept[dim];
    }
    // Enough chunks for two waves of CTAs, each of at least four steps, and not too much memory.
    const int64_t wanted = divide_up(4 * device.multiprocessors, max_i64(ctas, 1));
    const int64_t affordable = kMaxBiasSumBytes / 4 / max_i64(plan.bias_elements, 1);
    plan.bias_chunks = max_i64(1, min_i64(min_i64(wanted, affordable), plan.bias_steps / 4));
    plan.bias_ctas = ctas * plan.bias_chunks;
  }
  return plan;
}

// Additive scores (additive.cuh): rows that stay, rows that pass by, and columns that are in shared memory at a time.
constexpr int kAdditiveResident = 32, kAdditiveStreamed = 64, kAdditiveColumns = 64, kAdditiveWarps = 4;
constexpr int kAdditiveForwardBlocks = 3;  // CTAs for which the forward kernel bounds its registers

// Shared memory with sums of `rows` rows of `columns` columns, which are padded to whole steps. Before them come the
// two tiles with 16 bytes more for each row, w, flags, and the weights between the two tiles. The kernels count D and
// Dv at run time, and so these bytes.
constexpr int additive_shared_bytes(int rows, int64_t columns) {
  const int tiles = (kAdditiveResident + kAdditiveStreamed) * (kAdditiveColumns + 4) * 4;
  const int weights = kAdditiveResident * kAdditiveStreamed * 4;
  const int sums = rows * static_cast<int>(divide_up(columns, kAdditiveColumns)) * kAdditiveColumns * 4;
  return tiles + kAdditiveColumns * 4 + kAdditiveWarps * 4 + weights + sums;
}

inline ForwardPlan plan_additive_forward(const AttentionParams& p, const DeviceProperties& device) {
  const int shared_bytes = additive_shared_bytes(kAdditiveResident, p.Dv);
  ForwardPlan plan;
  plan.row_blocks = static_cast<int>(divide_up(p.Lq, kAdditiveResident));
  const int64_t blocks = plan.row_blocks * p.Hq * p.B;
  const int64_t resident = device.multiprocessors * resident_blocks(shared_bytes, kAdditiveForwardBlocks, device);
  const int64_t key_tiles = divide_up(visible_keys(p, min_i64(p.Lq, kAdditiveResident)), kAdditiveStreamed);
  plan.splits = choose_splits(blocks, key_tiles, resident);
  plan.blocks = blocks * plan.splits;
  return plan;
}

inline BackwardPlan plan_additive_backward(const AttentionParams& p) {
  BackwardPlan plan;
  plan.key_blocks = static_cast<int>(divide_up(p.Lk, kAdditiveResident));
  plan.row_blocks = static_cast<int>(divide_up(p.Lq, kAdditiveResident));
  plan.key_ctas = plan.key_blocks * p.Hkv * p.B;
  plan.query_ctas = plan.row_blocks * p.Hq * p.B;
  return plan;
}

}  // namespace fastattn::cuda
