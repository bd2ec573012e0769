// How a launch of the wide wgmma convolution is cut into blocks, and a block's shared memory.
#pragma once

#include "wgmma_epilogue.h"
#include "wgmma_transform.h"

namespace fed {

constexpr int CHUNK = 64, PIECE_BYTES = CHUNK * 64 * 2;  // of weights, a consumer's
constexpr int MOST_SHARED = 227 * 1024;  // of a block
constexpr int MOST_BOXES = 4, MOST_PIECES = 32;  // stages of the rings

// Where barriers are in shared memory, and how many bytes they take.
struct Barriers {
  static constexpr int full = 0, empty = full + 8 * MOST_BOXES, ready = empty + 8 * MOST_BOXES;
  static constexpr int full_z = ready + 8 * MOST_BOXES;
  static constexpr int full_weights = full_z + 8, empty_weights = full_weights + 8 * MOST_PIECES;
  static constexpr int fetched = empty_weights + 8 * MOST_PIECES, bytes = 1024;
  static_assert(fetched + 2 * 8 <= bytes);
};

// How a launch is cut into blocks, and a block's shared memory.
struct WidePlan {
  bool pair;  // the consumers take two blocks of channels of a tile; else two tiles
  int channel_blocks, items, parts;  // of a group: items are tiles or pairs of them, which `parts` blocks share
  int box_bytes, boxes, norm_boxes;
  int piece_bytes, pieces;
  bool resident;  // all weights
  int source_pieces[2];  // of weights, of each source, for all phases of a result that have positions
  int staging, masks, box, norm_box, piece, total;  // offsets; total is 0 where it does not fit
  BoxPositions positions;
};

inline int chunks_of(int channels) { return (channels + CHUNK - 1) / CHUNK; }

inline WidePlan wide_plan(const ConvGeometry& at, bool gradient, bool norm, int groups, int multiprocessors) {
  WidePlan plan{};
  const int blocks = chunks_of(at.channels);
  int farthest = 0;
  for (int phase = 0; phase < at.steps.phases; ++phase) {
    // Of a phase without positions no weights come: one lap of those that stay is one result of every other phase.
    const bool any = phase_height(at, phase) > 0 && phase_width(at, phase) > 0;
    for (int i = at.steps.first_step[phase]; i < at.steps.first_step[phase + 1]; ++i) {
      const ConvStep& step = at.steps.step[i];
      if (any) plan.source_pieces[step.source] += step.taps * chunks_of(at.in_channels[step.source]);
      for (int tap = step.first_tap; tap < step.first_tap + step.taps; ++tap)
        farthest = std::max(farthest, tap_position(at.steps, at.tile, at.steps.tap[tap]));
    }
  }
  const int taps = plan.source_pieces[0] + plan.source_pieces[1];
  // All 32 lines of the product are read, also those that a small tile lacks.
  const int read = farthest + (TILE_LINES - 1) * at.steps.columns + TILE_COLUMNS;
  const int positions = std::max(box_lines(at.steps, at.tile) * at.steps.columns, read);
  plan.positions = box_positions(at.steps, at.tile);
  plan.box_bytes = (positions * 128 + 1023) / 1024 * 1024;
  plan.staging = Barriers::bytes;
  plan.masks = plan.staging + 2 * STAGING_BYTES;
  plan.box = plan.masks + (gradient ? 2 * MASK_BYTES : 0);
  const auto arrange = [&](bool pair) {
    const int free = MOST_SHARED - plan.box;
    plan.pair = pair;
    plan.piece_bytes = (pair ? 2 : 1) * PIECE_BYTES;
    plan.boxes = 2;
    plan.norm_boxes = norm ? 1 : 0;
    const auto left = [&] { return free - (plan.boxes + plan.norm_boxes) * plan.box_bytes; };
    const int wanted = std::min(4, taps) * plan.piece_bytes;
    plan.resident = taps <= MOST_PIECES && taps * plan.piece_bytes <= left();
    plan.pieces = plan.resident ? taps : std::max(0, std::min(MOST_PIECES, left() / plan.piece_bytes));
    if (plan.pieces < 2 && plan.pieces < taps) return false;
    const int held = plan.resident ? taps * plan.piece_bytes : wanted;
    // Of two tiles' boxes every consumer has its own: one that it does not wait for would be a lap away unnoticed.
    const int step = pair ? 1 : 2;
    while (plan.boxes + step <= MOST_BOXES && left() - step * plan.box_bytes >= held) plan.boxes += step;
    if (!plan.resident) plan.pieces = std::min(MOST_PIECES, left() / plan.piece_bytes);
    return true;
  };
  const bool fits = arrange(blocks % 2 == 0 && !norm);  // z's boxes leave no room for pairs
  plan.channel_blocks = plan.pair ? blocks / 2 : blocks;
  plan.items = plan.pair ? at.tile.count : (at.tile.count + 1) / 2;
  plan.parts = block_parts(groups, plan.channel_blocks, plan.items, multiprocessors);
  plan.norm_box = plan.box + plan.boxes * plan.box_bytes;
  plan.piece = plan.norm_box + plan.norm_boxes * plan.box_bytes;
  plan.total = fits ? plan.piece + plan.pieces * plan.piece_bytes : 0;
  return plan;
}

// A place in a ring, and the parity of the phases that its barriers are in on this lap.
struct Ring {
  int stages, stage, parity;
  FED_HD void advance(int by = 1) {
    for (stage += by; stage >= stages; stage -= stages) parity ^= 1;
  }
};

inline WidePlan wide_plan(const ConvLaunch& launch) {
  return wide_plan(launch.at, launch.gradient, has_norm(launch.side[0]), groups_of(launch), launch.multiprocessors);
}

inline int wide_statistics_rows(const ConvLaunch& launch) {
  const WidePlan plan = wide_plan(launch);
  return plan.pair ? plan.parts : 2 * plan.parts;
}

inline const char* wide_uncovered(const ConvLaunch& launch) {
  return wide_plan(launch).total == 0 ? "more shared memory than there is" : nullptr;
}

}  // namespace fed
