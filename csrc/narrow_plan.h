// How a launch of the narrow wgmma convolution is cut into blocks, and a block's shared memory, for its host side.
#pragma once

#include "wgmma_inside.h"
#include "wgmma_transform.h"

namespace fed {

constexpr int NARROW_SHARED = 227 * 1024;  // bytes that a block may have

// How a launch is cut into blocks, and a block's shared memory.
struct NarrowPlan {
  int taps;  // of source 0; source 1 has one
  int parts;  // blocks that share a group's tiles
  int chunk;  // input channels of a box: 16, 32 or 64
  int chunks[2];  // of a source
  int stages, stage_bytes;  // of the ring
  int boxes;  // of a tile
  int tap_at[MOST_TAPS], tap_weight[MOST_TAPS];  // offsets in a box and in the weights of chunk 0
  int weight_bytes;
  int buffers, other_buffers, tables, numbers, weights, ring, total;  // offsets; total is 0 where it does not fit
  Divisor images;
  BoxPositions positions;
};

// With boxes of `chunk` channels.
template <class Kernel>
NarrowPlan narrow_plan(
    const ConvGeometry& at, int taps, bool on_load, bool other, int groups, int multiprocessors, int chunk) {
  constexpr int N = Kernel::N, CONSUMERS = Kernel::CONSUMERS, BUFFER_BYTES = Kernel::BUFFER_BYTES;
  NarrowPlan plan{};
  plan.taps = taps;
  plan.chunk = chunk;
  for (int source = 0; source < at.sources; ++source)
    plan.chunks[source] = (at.in_channels[source] + chunk - 1) / chunk;
  plan.parts = block_parts(groups, 1, (at.tile.count + CONSUMERS - 1) / CONSUMERS, multiprocessors);
  plan.images = divisor(at.tile.images);
  plan.positions = box_positions(at.steps, at.tile);
  const int tap_bytes = chunk * N * 2;  // of a chunk
  plan.weight_bytes = (taps * plan.chunks[0] + plan.chunks[1]) * tap_bytes;
  int farthest = 0;
  for (int phase = 0; phase < at.steps.phases; ++phase) {
    const bool any = phase_height(at, phase) > 0 && phase_width(at, phase) > 0;
    for (int i = at.steps.first_step[phase]; i < at.steps.first_step[phase + 1]; ++i) {
      const ConvStep& step = at.steps.step[i];
      if (any) plan.boxes += plan.chunks[step.source] * (Kernel::GRADIENT && on_load && step.source == 0 ? 2 : 1);
      for (int tap = step.first_tap; tap < step.first_tap + step.taps; ++tap) {
        const ConvTap& of = at.steps.tap[tap];
        const int position = tap_position(at.steps, at.tile, of);
        farthest = std::max(farthest, position);
        plan.tap_at[tap] = position * chunk * 2;
        plan.tap_weight[tap] = (step.source == 0 ? of.weight : taps) * plan.chunks[0] * tap_bytes;
      }
    }
  }
  // All 32 lines of a product are read, also those that a small tile lacks.
  const int read = farthest + (TILE_LINES - 1) * at.steps.columns + TILE_COLUMNS;
  const auto aligned = [](int bytes) { return (bytes + 1023) / 1024 * 1024; };
  plan.stage_bytes = aligned(std::max(plan.positions.count, read) * chunk * 2);
  plan.buffers = Kernel::BARRIER_BYTES;
  plan.other_buffers = plan.buffers + CONSUMERS * BUFFER_BYTES;
  plan.tables = plan.other_buffers + (other ? CONSUMERS * BUFFER_BYTES : 0);
  plan.numbers = plan.tables + CONSUMERS * Kernel::TABLE_BYTES;
  plan.weights = plan.numbers + (on_load ? aligned(Kernel::NUMBERS_OF * plan.chunks[0] * chunk * 4) : 0);
  plan.ring = plan.weights + aligned(plan.weight_bytes);
  plan.stages = std::min(Kernel::MOST_STAGES, (NARROW_SHARED - plan.ring) / plan.stage_bytes);
  plan.total = plan.stages >= 2 ? plan.ring + plan.stages * plan.stage_bytes : 0;
  return plan;
}

inline bool on_load(const ConvSide& side) { return side.in_scale.values != nullptr || has_norm(side); }
inline bool has_other(const ConvLaunch& launch, const ConvSide& side) {
  return launch.gradient ? has_z(side) : has_second_output(side);
}

// With the widest boxes of which four fit, else the narrowest.
template <class Kernel>
NarrowPlan narrow_plan(const ConvLaunch& launch) {
  const ConvSide& one = launch.side[0];
  const ConvSide& two = launch.side[1];
  const auto plan = [&](int chunk) {
    return narrow_plan<Kernel>(launch.at, launch.tensors[0].taps, on_load(one) || on_load(two),
                               has_other(launch, one) || has_other(launch, two), groups_of(launch),
                               launch.multiprocessors, chunk);
  };
  const int most = std::max(launch.at.in_channels[0], launch.at.in_channels[1]);
  for (int chunk = most <= 16 ? 16 : most <= 32 ? 32 : 64;; chunk /= 2)
    if (const NarrowPlan found = plan(chunk); found.stages >= 4 || chunk == 16) return found;
}

}  // namespace fed
