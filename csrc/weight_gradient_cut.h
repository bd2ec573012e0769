// How a weight gradient is cut into blocks, tiles and multiplications of 64 x N by 16 positions. Plain integers, made
// once per launch on the host; the kernel follows them (csrc/wgmma_weight_gradient.h), and so does the copy engine.
//
//   dW[tap, i, o] = sum over positions of d  x[stride · position + tap - padding, i] · d[position, o]
//
// Both operands lie in shared memory as the copy engine brings them, a position's channels together, positions in lines
// of eight. A multiplication takes two lines, 16 positions, of both. Its 64 rows are windows of x, its columns three
// windows of d; a window is `width` channels at some shift of the positions, and one distance leads from each window to
// the next, so that one multiplication covers several taps:
//
//   convolution        windows of x                                windows of d
//   3x3 at stride 1    the three columns of taps: shifts by one    the three rows of taps: shifts by a line
//                      position in one box with a border
//   3x3 at stride 2    the three columns of taps, a box each of    chunks of output channels, a box each
//                      the phase that they read; a block has one
//                      row of taps
//   1x1                chunks of input channels, a box each        chunks of output channels, a box each
//
// 64 rows are four windows of 16 channels, two of 32 or one of 64: one, two or three multiplications for the three
// windows of a block. A warpgroup has one each or, where there is only one, all three take turns at the steps and leave
// results of their own. Windows past the last multiply what happens to lie there, within the stage; nobody stores the product.
//
// Lines past the tile's images are positions outside, where both operands are zero: every box is written in full.
// `copies`: the shifts along a row are boxes of their own too, at distances that are multiples of eight positions.
//
// What that should reach on an H100, four groups of 512 images; a prediction, none of it is measured. Cycles of a tile:
// of the tensor cores; of shared memory at 128 bytes; of the L2 at 23.7 bytes, a 132nd of 5.5 TB/s; then what bounds it
// and TFLOP/s, with 85% of that bound (798 TFLOP/s, 5.5 TB/s, 3.0 TB/s of memory), the blocks that fill the last wave,
// and partial results written and read. In brackets with the gradient of a BatchNorm on load, which reads half as much
// again; its arithmetic (43 instructions for 16 bytes of x, 63 of d, by one warp of each scheduler) hides behind that.
//
//   3x3             lines   tensor  shared    L2    bound              TFLOP/s
//   64 at 32x32       32     4608    3664    3197   tensor (memory)    620 (470)
//   128 at 16x16      16     2304    1840    1642   tensor             620 (620)
//   256 at 8x8        16     2304    1856    1728   tensor             620 (620)
//   160 at 32x32      32     4608    3664    3197   tensor, 69% used   460 (460)
//   640 at 8x8        16     2304    1856    1728   tensor             570 (570)
//   16 at 32x32       32      384     596     799   memory             165 (115)
//   32 at 16x16       32     1536    1584    1642   memory             300 (210)
//   16 to 64          32     1536    1376    1901   memory             270 (155)
//   64 to 128, s2      8     1152    1088    1728   L2                 340 (250)
//   16 to 32, s2      32      384     768    1728   L2                  85  (60)
//
// At stride 2 every row of taps loads x and d again: a block for all nine would hold four phases with borders, and half
// of its multiplications' columns would be nobody's. Such layers are a tenth of a network's work.
#pragma once

#include "conv_steps.h"

namespace fed {

constexpr int GRADIENT_WINDOWS = 3, STAGE_ALIGNMENT = 1024;
// One is loaded, one is changed on load or waits, one is multiplied: a stage is free only once all its positions are.
constexpr int LEAST_STAGES = 3, MOST_STAGES = 6;
// A step is two multiplications, so that while a warpgroup waits for one step another is under way.
constexpr int STEP_LINES = 4;
constexpr int GRADIENT_SHARED = 227 * 1024 - 256;  // bytes of a ring; the barriers come after it
constexpr int OUTSIDE = 1 << 24;  // rows and columns of an image are fewer
// What a block costs beside its tiles, in tiles: filling the ring, and results that are written and summed again.
constexpr int GRADIENT_OVERHEAD = 6;

struct WeightGradientSizes {
  int G, N, H, W, Ci, Co;  // of x: one group's images, their size; channels in and out, multiples of 16
  int kernel, stride;  // 3 with padding 1 or 1 with padding 0; 1 or 2
  bool normed;  // a second tensor of d's size is loaded
  bool copies;
};

// A box of x: which map it is cut from, and its first position and channel from the tile's and the block's.
struct GradientBox {
  int map, row, column, channel;
};

// Of one operand: boxes of `width` channels, `columns` positions a line, `lines` lines, and windows into them.
struct GradientOperand {
  int width;  // channels of a window: 16, 32 or 64
  int windows;  // that a block has
  int boxes, columns, lines, bytes;  // of a box: what the copy engine counts
  int offset, distance;  // in a stage, of the first box and from one to the next
  int leading;  // bytes from one window to the next
  int blocks;  // of channels
};

struct WeightGradientCut {
  GradientOperand x, d;
  int rows;  // blocks that differ in the row of taps: three, or one for all
  int products;  // multiplications for a block's windows of x
  int parts;  // consumers that take turns at a tile's steps: three where there is one product, and as many steps
  int splits;  // blocks that share the tiles
  int border;  // of d's boxes: rows beyond the tile's, half of them before it
  GradientBox box[3][GRADIENT_WINDOWS];  // of x, by row of taps
  ConvTile tile;
  int norm_offset;  // in a stage, of the second tensor's boxes
  int stage_bytes, stages;
};

FED_HD int consumers(const WeightGradientCut& cut) { return cut.parts > 1 ? cut.parts : cut.products; }
FED_HD int steps(const WeightGradientCut& cut) { return cut.tile.rows * cut.tile.images / STEP_LINES; }
FED_HD int blocks(const WeightGradientCut& cut) { return cut.rows * cut.x.blocks * cut.d.blocks; }
// Partial results of every gradient.
FED_HD int partials(const WeightGradientCut& cut) { return cut.splits * cut.parts; }
FED_HD int row_bytes(const GradientOperand& operand) { return 2 * operand.width; }

// The tile of whole steps and at most `lines` lines, `bordered` with d's border, that leaves the fewest lines unused:
// of one image or of several whole ones.
inline ConvTile gradient_tile(int N, int H, int W, int lines, int border, int bordered) {
  const auto pieces = [](int size, int piece) { return (size + piece - 1) / piece; };
  ConvTile best{};
  int64_t least = 0;
  for (int images = 1; images <= std::min(N, lines); ++images) {
    int rows = images > 1 ? H : pieces(H, pieces(H, std::min({H, lines, bordered - border})));
    while (rows * images % STEP_LINES != 0) ++rows;
    if (images > 1 && (rows * images > lines || (rows + border) * images > bordered)) continue;
    const int across = pieces(W, TILE_COLUMNS), down = pieces(H, rows), along = pieces(N, images);
    const int64_t total = int64_t(down) * along * rows * images;
    if (images == 1 || total <= least) least = total, best = {images, rows, across, down, along, across * down * along};
  }
  return best;
}

// Splits that take the least time, counted in tiles: waves of blocks times a block's tiles.
inline int weight_gradient_splits(int blocks, int tiles, int multiprocessors) {
  const auto pieces = [](int64_t size, int64_t piece) { return (size + piece - 1) / piece; };
  int best = 1;
  int64_t least = 0;
  for (int splits = 1; splits <= std::min(tiles, multiprocessors); ++splits) {
    const int64_t waves = pieces(int64_t(blocks) * splits, multiprocessors);
    const int64_t time = waves * (pieces(tiles, splits) + GRADIENT_OVERHEAD);
    if (splits == 1 || time < least) least = time, best = splits;
  }
  return best;
}

inline WeightGradientCut weight_gradient_cut(const WeightGradientSizes& sizes, int multiprocessors) {
  const auto pieces = [](int size, int piece) { return (size + piece - 1) / piece; };
  const auto aligned = [&](int bytes) { return pieces(bytes, STAGE_ALIGNMENT) * STAGE_ALIGNMENT; };
  const auto [G, N, H, W, Ci, Co, kernel, stride, normed, copies] = sizes;
  const bool square = kernel == 3, shifted = square && stride == 1, overlapped = shifted && !copies;
  WeightGradientCut cut{};
  GradientOperand &x = cut.x, &d = cut.d;
  const auto channels = [&](GradientOperand& operand, int count, bool chunks) {
    const int all = pieces(count, operand.width);
    operand.blocks = chunks ? pieces(all, GRADIENT_WINDOWS) : all;
    operand.windows = chunks ? pieces(all, operand.blocks) : GRADIENT_WINDOWS;
  };
  x.width = std::min(Ci, 64) / 16 == 3 ? 64 : std::min(Ci, 64);
  channels(x, Ci, !square);
  const int chunk = Co <= 48 ? 16 : Co <= 96 ? 32 : 64;
  d.width = !shifted ? chunk : Co <= 32 ? Co : 64;
  channels(d, Co, !shifted);
  cut.products = pieces(x.windows, 64 / x.width);
  cut.rows = square && !shifted ? 3 : 1;
  cut.border = shifted ? 2 : 0;

  x.columns = overlapped ? TILE_COLUMNS + 2 : TILE_COLUMNS;
  d.columns = TILE_COLUMNS;
  x.boxes = overlapped ? 1 : x.windows;
  d.boxes = shifted ? 1 : d.windows;
  for (int row = 0; row < cut.rows; ++row)
    for (int i = 0; i < x.boxes; ++i) {
      const TapShift none{0, 0}, down = cut.rows > 1 ? forward_shift(row, stride, 1) : none;
      const TapShift across = square ? forward_shift(i, stride, 1) : none;
      cut.box[row][i] = {down.phase * stride + across.phase, down.shift, across.shift, square ? 0 : i * x.width};
      if (phase_size(H, stride, down.phase) * phase_size(W, stride, across.phase) == 0)
        cut.box[row][i] = {0, OUTSIDE, OUTSIDE, 0};  // a phase without positions
    }

  const int out_height = pieces(H, stride), out_width = pieces(W, stride);
  for (int lines = TILE_LINES; lines > 0; lines -= STEP_LINES) {  // as many as leave room for enough stages
    cut.tile = gradient_tile(N, out_height, out_width, lines, cut.border, shifted ? lines + lines / 4 : lines);
    x.lines = cut.tile.rows * cut.tile.images;
    d.lines = (cut.tile.rows + cut.border) * cut.tile.images;
    for (GradientOperand* operand : {&x, &d}) {
      operand->bytes = operand->lines * operand->columns * row_bytes(*operand);
      operand->distance = aligned(operand->bytes);
      operand->leading = operand->windows > 1 ? operand->distance : 0;
    }
    if (overlapped) x.leading = row_bytes(x);
    if (shifted) d.leading = cut.tile.images * TILE_COLUMNS * row_bytes(d);
    d.offset = x.boxes * x.distance;
    cut.norm_offset = d.offset + d.boxes * d.distance;
    // All windows, those that nobody needs too
    const int x_end = (cut.products * (64 / x.width) - 1) * x.leading + x.distance;
    const int d_end = d.offset + (shifted ? 0 : (GRADIENT_WINDOWS - 1) * d.leading) + d.distance;
    const int loaded = cut.norm_offset + (normed ? d.boxes * d.distance : 0);
    cut.stage_bytes = aligned(std::max({x_end, d_end, loaded}));
    cut.stages = std::min(MOST_STAGES, GRADIENT_SHARED / cut.stage_bytes);
    if (cut.stages >= LEAST_STAGES) break;
  }
  cut.parts = cut.products == 1 ? std::min(3, steps(cut)) : 1;
  cut.splits = weight_gradient_splits(G * blocks(cut), cut.tile.count, multiprocessors);
  return cut;
}

}  // namespace fed
