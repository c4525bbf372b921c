// The tiles of the kernels that walk over scores without values (score_walk.cuh): hard attention and the summary. Pure
// host functions of a problem's shape, as in heuristics.h.
#pragma once

#include "cuda/heuristics.h"

namespace fastattn::cuda {

// Head dims that these kernels are compiled for: of D alone, since no tile holds values.
constexpr int kWalkDims[] = {64, 128, 256};

constexpr int walk_dim_bucket(int64_t D) {
  for (const int dim : kWalkDims) {
    if (D <= dim) return dim;
  }
  return 0;
}

// Rows that stay in shared memory, 16 to a warp, and rows of the other operand that pass by, two tiles of them.
struct WalkTiles {
  int resident, streamed, warps;
};

// The same for every kernel. What a gradient of 256 columns leaves of the registers, and two stages of the 99 KB of
// shared memory that every device has, bound the wide ones.
constexpr WalkTiles walk_tiles(DType type, int dim) {
  if (type == DType::kFloat32) return dim <= 128 ? WalkTiles{64, 32, 4} : WalkTiles{32, 16, 2};
  return dim <= 128 ? WalkTiles{64, 64, 4} : WalkTiles{64, 32, 4};
}

constexpr int walk_shared_bytes(DType type, int dim, WalkTiles tiles) {
  return (tiles.resident + 2 * tiles.streamed) * dim * (type == DType::kFloat32 ? 4 : 2);
}

struct WalkPlan {
  int dim = 0;
  int row_blocks = 0, key_blocks = 0;
  int splits = 1;  // parts of the keys of each tile of rows, each for a CTA of its own
};

inline WalkPlan plan_walk(const AttentionParams& p) {
  WalkPlan plan;
  plan.dim = walk_dim_bucket(p.D);
  const WalkTiles tiles = walk_tiles(p.dtype, plan.dim);
  plan.row_blocks = static_cast<int>(divide_up(p.Lq, tiles.resident));
  plan.key_blocks = static_cast<int>(divide_up(p.Lk, tiles.resident));
  return plan;
}

// Where rows are few, the forward pass of hard attention splits the keys, as attention's does.
inline WalkPlan plan_hard_forward(const AttentionParams& p, const DeviceProperties& device) {
  WalkPlan plan = plan_walk(p);
  const WalkTiles tiles = walk_tiles(p.dtype, plan.dim);
  const int64_t resident = device.multiprocessors * resident_blocks(walk_shared_bytes(p.dtype, plan.dim, tiles),
                                                                    blocks_by_registers(tiles.warps), device);
  const int64_t key_tiles = divide_up(visible_keys(p, min_i64(p.Lq, tiles.resident) + 1), tiles.streamed);
  plan.splits = choose_splits(plan.row_blocks * p.Hq * p.B, key_tiles, resident);
  return plan;
}

}  // namespace fastattn::cuda
