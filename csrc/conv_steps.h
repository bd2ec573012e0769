// How a convolution, or its data gradient, is cut into tiles and steps for kernels that hold a tile of their input in
// shared memory: which boxes are fetched, and which taps read which box where. Plain integers, computed once per launch
// on the host; the kernels follow the lists.
//
// A tile is TILE_COLUMNS columns x `rows` rows x `images` images of positions of the result: lines of eight positions,
// rows outside, images inside, so that a shift by a tap is the same distance for every line. A box holds what a tile's
// taps read: lines of `columns` positions, eight and the border's, a position's channels together.
//
// A convolution of stride s and padding p reads, in each direction, position s · y + t - p at tap t: of the input's
// positions of phase (t - p) mod s the one shifted by floor((t - p) / s). Its data gradient makes the result's position
// s · y + phase from the gradient's, shifted by (phase + p - t) / s, at the taps where that is a whole number. So every
// box is one of a dense tensor, the positions of one phase, and strides are gone.
#pragma once

#include <algorithm>

#include "numbers.h"

namespace fed {

constexpr int TILE_COLUMNS = 8, TILE_LINES = 32, BORDERED_LINES = 40;
// Of a tile: an operand has all lines, also where the images are too small to fill them, and what it reads past a box
// of many borders would take too much memory.
constexpr int MOST_IMAGES = 8;
constexpr int MOST_TAPS = 18, MOST_STEPS = 16, MOST_PHASES = 4;

// Of what a launch computes: N images of H x W positions; a strided data gradient's are those of one phase, rounded up.
struct ConvTile {
  int images, rows;
  int across, down, along, count;  // tiles: in a row, in a column, over the images, in all
};

// The tile of most positions with an even number of lines, at most `lines` and `bordered` with a border of one; it may
// reach past the images, where boxes are zero and nothing is stored.
inline ConvTile conv_tile(int N, int H, int W, int lines = TILE_LINES, int bordered = BORDERED_LINES) {
  const auto pieces = [](int size, int piece) { return (size + piece - 1) / piece; };
  int rows = std::min({H, lines, bordered - 2});
  rows = pieces(H, pieces(H, rows));
  int images = rows == H ? std::max(1, std::min({N + N % 2, lines / rows, bordered / (rows + 2), MOST_IMAGES})) : 1;
  if (rows * images % 2 != 0 && images > 1) --images;
  if (rows * images % 2 != 0) ++rows;
  const int across = pieces(W, TILE_COLUMNS), down = pieces(H, rows), along = pieces(N, images);
  return {images, rows, across, down, along, across * down * along};
}

// Where a tile begins: its first column, row and image.
struct TileCorner {
  int column, row, image;
};
FED_HD TileCorner tile_corner(const ConvTile& tile, int index) {
  const int line = index / tile.across, image = line / tile.down;
  return {(index - line * tile.across) * TILE_COLUMNS, (line - image * tile.down) * tile.rows, image * tile.images};
}

// Of a tap in one direction: the phase it reads (of the result, in a gradient, the one it belongs to) and the shift.
struct TapShift {
  int phase, shift;
};
FED_HD int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
FED_HD TapShift forward_shift(int tap, int stride, int padding) {
  const int shift = floor_div(tap - padding, stride);
  return {tap - padding - shift * stride, shift};
}
FED_HD TapShift gradient_shift(int tap, int stride, int padding) {
  const int shift = -floor_div(tap - padding, stride);
  return {tap - padding + shift * stride, shift};
}

// Positions of a phase along a side.
FED_HD int phase_size(int size, int stride, int phase) { return (size - phase + stride - 1) / stride; }

// A box of one phase's positions, and the taps that read it.
struct ConvStep {
  int source;  // 0, or 1 for the second K segment
  int phase;  // of that source's input, row phase · stride + column phase: which map
  int row, column;  // of the box's first line and position, from the tile's
  int first_tap, taps;
};
struct ConvTap {
  int line, position;  // of the box, where the tile's first position reads
  int weight;  // index in the packing that is multiplied
};

// The steps of each phase of the result (a forward convolution has one), and the boxes' extents.
struct ConvSteps {
  int phases;
  int first_step[MOST_PHASES + 1];
  ConvStep step[MOST_STEPS];
  ConvTap tap[MOST_TAPS];
  int taps;
  int columns;  // of every box
  int border;  // lines of every box beyond the tile's, per image
};

FED_HD int box_lines(const ConvSteps& steps, const ConvTile& tile) { return (tile.rows + steps.border) * tile.images; }
// Positions of a box from its first to where a tap's first line starts.
FED_HD int tap_position(const ConvSteps& steps, const ConvTile& tile, const ConvTap& tap) {
  return tap.line * tile.images * steps.columns + tap.position;
}

struct ConvSource {
  int kernel, stride, padding;
};

// `gradient`: weights are in the packing of the data gradient, taps reversed. `copies`: a box for every shift along a
// row, eight positions wide, so that a tap starts at a multiple of eight positions: for hardware that swizzles first.
inline ConvSteps conv_steps(const ConvSource* sources, int count, bool gradient, bool copies) {
  struct Found {
    int source, out, in, row, column, weight;
  };
  Found found[MOST_TAPS];
  ConvSteps steps{};
  int taps = 0;
  steps.phases = gradient ? sources[0].stride * sources[0].stride : 1;
  for (int s = 0; s < count; ++s) {
    const auto [kernel, stride, padding] = sources[s];
    for (int tap = 0; tap < kernel * kernel && taps < MOST_TAPS; ++tap) {
      const auto shift = gradient ? gradient_shift : forward_shift;
      const TapShift y = shift(tap / kernel, stride, padding), x = shift(tap % kernel, stride, padding);
      const int phase = y.phase * stride + x.phase;
      found[taps++] = {s, gradient ? phase : 0, gradient ? 0 : phase, y.shift, x.shift,
                       gradient ? kernel * kernel - 1 - tap : tap};
    }
  }
  steps.columns = TILE_COLUMNS;
  const auto together = [&](const Found& a, const Found& b) {  // in one box
    return a.source == b.source && a.in == b.in && (!copies || a.column == b.column);
  };
  int left[MOST_TAPS], top[MOST_TAPS];  // of the box that a tap reads
  for (int i = 0; i < taps; ++i) {
    int right = found[i].column, bottom = found[i].row;
    left[i] = right;
    top[i] = bottom;
    for (int j = 0; j < taps; ++j) {
      if (!together(found[i], found[j])) continue;
      left[i] = std::min(left[i], found[j].column);
      top[i] = std::min(top[i], found[j].row);
      right = std::max(right, found[j].column);
      bottom = std::max(bottom, found[j].row);
    }
    steps.columns = std::max(steps.columns, TILE_COLUMNS + right - left[i]);
    steps.border = std::max(steps.border, bottom - top[i]);
  }
  int n = 0;
  for (int phase = 0; phase < steps.phases; ++phase) {
    steps.first_step[phase] = n;
    bool taken[MOST_TAPS] = {};
    for (int i = 0; i < taps; ++i) {
      if (taken[i] || found[i].out != phase) continue;
      ConvStep& step = steps.step[n++];
      step = {found[i].source, found[i].in, top[i], left[i], steps.taps, 0};
      for (int j = i; j < taps; ++j) {
        if (taken[j] || found[j].out != phase || !together(found[i], found[j])) continue;
        taken[j] = true;
        steps.tap[steps.taps++] = {found[j].row - top[i], found[j].column - left[i], found[j].weight};
        ++step.taps;
      }
    }
  }
  steps.first_step[steps.phases] = n;
  return steps;
}

}  // namespace fed
