// Tiles and block shapes of the halo convolution, their shared memory, and what nvcc makes of them.
#pragma once

#include <climits>

#include "numbers.h"

namespace fed {

constexpr int HALO_POSITIONS = 256;  // of a block
constexpr int HALO_BORDERED = 405;  // with the border: five images of 7x7; four of 8x8 are 400, 8 rows of 32 340

FED_HD constexpr int pieces(int size, int piece) { return (size + piece - 1) / piece; }

// n / by for 0 <= n, by <= 407 (n · by < 2^20) in two instructions instead of some twenty-five.
struct Divisor {
  int by, magic;
  FED_HD int of(int n) const { return n * magic >> 20; }
};
FED_HD Divisor divisor(int by) { return {by, (1 << 20) / by + 1}; }

// Positions of a block: images x rows x columns, neighbours. An image is cut into tiles of rows and columns; a tile has
// more than one image only where it holds whole ones.
struct HaloTile {
  int images, rows, columns;
  int across, down, count;  // of the tiles: in a row, in a column, of a group
  Divisor by_rows, by_columns, by_bordered_rows, by_bordered_columns;
};

inline HaloTile halo_tile(int images, int rows, int columns, int N, int H, int W) {
  const int across = pieces(W, columns), down = pieces(H, rows);
  return {images, rows, columns, across, down, across * down * pieces(N, images), divisor(rows), divisor(columns),
          divisor(rows + 2), divisor(columns + 2)};
}

FED_HD int positions(const HaloTile& tile) { return tile.images * tile.rows * tile.columns; }
FED_HD int bordered(const HaloTile& tile) { return tile.images * (tile.rows + 2) * (tile.columns + 2); }

// Image, row and column in a tile.
struct Place {
  int image, h, w;
};
FED_HD Place place(int n, Divisor rows, Divisor columns) {
  const int line = columns.of(n), image = rows.of(line);
  return {image, line - image * rows.by, n - line * columns.by};
}

// COLUMNS channels of the result in a block and WARPS_N warps side by side over them; DEPTH channels of the input at a
// time; BLOCKS resident on a multiprocessor, for which registers are kept free.
template <int COLUMNS_, int DEPTH_, int WARPS_N_, int TAPS_, int STAGES_, int BLOCKS_>
struct HaloShape {
  static constexpr int COLUMNS = COLUMNS_, DEPTH = DEPTH_, WARPS_N = WARPS_N_, TAPS = TAPS_, STAGES = STAGES_;
  static constexpr int BLOCKS = BLOCKS_, WARPS_M = HALO_POSITIONS / 64, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WIDTH = COLUMNS / WARPS_N;  // of a warp
  static constexpr int ROW_BLOCKS = 4, COLUMN_BLOCKS = WIDTH / 8;  // of a warp: 16x8 accumulators
  static constexpr int IN_CHUNKS = DEPTH / 8, WEIGHT_CHUNKS = COLUMNS / 8;  // 16 bytes each
  static constexpr int STEPS = 9 / TAPS;  // for DEPTH channels
  static constexpr int STAGE_BYTES = TAPS * DEPTH * COLUMNS * 2;
  static constexpr int STAGING = WIDTH + 8;  // floats in a staged row: the eight keep a fragment's rows in other banks
  static constexpr int STAGING_BYTES = 16 * STAGING * 4;  // of a warp
  static_assert(9 % TAPS == 0 && STEPS >= STAGES - 1, "the next channels must have arrived when their first tap comes");
};

// What nvcc 13.0 makes of them for sm_90a, forward / gradient, without spills (sm_80 and sm_100: a few registers less);
// shared memory of the layers that count, and the blocks of an H200's multiprocessor (228 KB):
//
//   shape    threads  registers  shared memory                                      blocks
//   Halo16     128    121 / 123  24 KB                                              4
//   Halo32     128    164 / 164  43 KB; 65 KB from 160 channels                     3
//   Halo64     128    255 / 255  72 KB at 32x32, 80 KB at 8x8; 110 KB from 320      2
//   Halo128    256    250 / 250  136 KB at 16x16, 156 KB at 8x8                     1
//
// Two warps to a scheduler hold the registers of 64x64 accumulators each; the tensor cores then wait for shared memory
// in turns. The most, 156 KB, fits compute capability 8.0, 9.0 and 10.x, not the 99 KB of 8.6, 8.9 and 12.0.
using Halo16 = HaloShape<16, 16, 1, 9, 2, 4>;
using Halo32 = HaloShape<32, 32, 1, 3, 3, 3>;
using Halo64 = HaloShape<64, 64, 1, 1, 3, 2>;
using Halo128 = HaloShape<128, 64, 2, 1, 3, 1>;

// Whether the kernel has a body where __CUDA_ARCH__ is `arch`: none for 8.6, 8.9 and 12.x, whose shared memory is too
// small for most layers. Launching it there is an error.
FED_HD constexpr bool halo_has_body(int arch) { return arch != 860 && arch != 890 && arch < 1200; }

// Byte offsets into a block's shared memory: one or two buffers of the input, the ring of weights; where these were,
// the epilogue stages accumulators; then the tables.
struct HaloLayout {
  int halo, ring, in_offset, out_position, residual_position, sums, total;
};

template <class Shape>
FED_HD constexpr HaloLayout halo_layout(int bordered, int channels) {
  HaloLayout at{};
  at.halo = pieces(bordered * Shape::DEPTH * 2, 128) * 128;
  at.ring = (channels > Shape::DEPTH ? 2 : 1) * at.halo;
  const int ring_end = at.ring + Shape::STAGES * Shape::STAGE_BYTES;
  const int staged = Shape::THREADS / 32 * Shape::STAGING_BYTES;
  at.in_offset = ring_end > staged ? ring_end : staged;
  at.out_position = at.in_offset + bordered * 4;
  at.residual_position = at.out_position + HALO_POSITIONS * 4;
  at.sums = at.residual_position + HALO_POSITIONS * 4;
  at.total = at.sums + Shape::WARPS_M * 2 * Shape::COLUMNS * 4;
  return at;
}
template <class Shape>
FED_HD HaloLayout halo_layout(const HaloTile& tile, int channels) {
  return halo_layout<Shape>(bordered(tile), channels);
}

// Bytes of shared memory of the largest tile and the most channels, and of the shape that needs the most.
template <class Shape>
constexpr int HALO_SHARED = halo_layout<Shape>(HALO_BORDERED, INT_MAX).total;
constexpr int HALO_MOST_SHARED = HALO_SHARED<Halo128>;
static_assert(HALO_MOST_SHARED <= 163 * 1024, "compute capability 8.0 has no more");

}  // namespace fed
