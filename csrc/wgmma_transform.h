// What is applied to a box in shared memory before it is multiplied: BatchNorm and ReLU, relu(scale · z + shift), or
// the gradient of BatchNorm, a · d + b · z + c, in float32 and rounded once. A warpgroup does it between the copy
// engine and wgmma: it waits for the box, calls one of the functions here, and arrives where the multiplying
// warpgroups wait.
//
// A thread keeps to the same eight channels, whose numbers are in its registers, and takes every (2,048 / ROW)th
// position: 2,048 bytes on, so that the swizzle of its pieces is computed once. Eight neighbouring threads touch eight
// pieces of different banks. Positions outside the images stay zero, as the copy engine brought them: the padding is
// that of what is multiplied.
#pragma once

#include "conv_steps.h"
#include "halo_epilogue.h"
#include "halo_shape.h"
#include "wgmma_block.h"

namespace fed {

// The positions of a box: lines of columns, rows of images outside.
struct BoxPositions {
  int count;
  Divisor columns, images;
};
inline BoxPositions box_positions(const ConvSteps& steps, const ConvTile& tile) {
  return {box_lines(steps, tile) * steps.columns, divisor(steps.columns), divisor(tile.images)};
}

// Of a thread's eight channels.
struct Normalisation {
  float scale[8], shift[8];
};
struct NormGradient {
  float d[8], z[8], constant[8];
};

template <int ROW>
FED_HD int first_of_eight(int thread) {
  return thread % (ROW / 16) * 8;
}

// Zeros past the last of `channels`, as the copy engine leaves z there. `first` is the box's first channel.
template <int ROW>
FED_HD void load_channels(Rows rows, int64_t row, int first, int channels, int thread, float (&value)[8]) {
  const int channel = first + first_of_eight<ROW>(thread);
FED_UNROLL
  for (int i = 0; i < 8; ++i) value[i] = channel + i < channels ? rows.of(row)[channel + i] : 0.0f;
}

// To bf16, to nearest, what is negative as zero; NaN stays NaN.
FED_HD uint32_t pack_open_pair(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
#else
  return pack_pair(open_relu(first), open_relu(second));
#endif
}

// f(thread, piece, inside) for every thread and BATCH of its positions, whose loads then wait together, of the box at
// `box`, which has ROW bytes a position: the i-th position's piece lies at piece + 2048 · i, and counts if inside(i).
// `first` is where the box begins among the positions of its phase, which end at `end`. What f writes is published.
template <int ROW, int BATCH, class Block, class F>
FED_HD void transform_box(
    Block& block, int box, const BoxPositions& positions, TileCorner first, TileCorner end, F f) {
  constexpr int STEP = 2048 / ROW;
  block.each([&](int thread) {
    const int start = thread / (ROW / 16);
    const int piece = swizzled_piece<ROW>(box + start * ROW, thread % (ROW / 16));
    const auto inside = [&](int position) {
      const int line = positions.columns.of(position), row = positions.images.of(line);
      const int column = position - line * positions.columns.by + first.column;
      const int image = line - row * positions.images.by + first.image;
      return position < positions.count && unsigned(column) < unsigned(end.column) &&
             unsigned(row + first.row) < unsigned(end.row) && image < end.image;
    };
FED_ROLLED
    for (int n = 0; start + n * STEP < positions.count; n += BATCH) {
      f(thread, piece + n * 2048, [&](int i) { return inside(start + (n + i) * STEP); });
    }
  });
  block.publish();
}

// u = scale · z + shift, and its ReLU. A larger BATCH waits less and takes more registers: four each.
template <int ROW, int BATCH = 4, class Block>
FED_HD void normalise_box(
    Block& block, int box, const BoxPositions& positions, TileCorner first, TileCorner end,
    typename Block::template PerThread<Normalisation>& by, bool relu) {
  const auto apply = [&](auto pair) {
    transform_box<ROW, BATCH>(block, box, positions, first, end, [&](int thread, int piece, auto inside) {
      const Normalisation& n = by[thread];
      Words words[BATCH];
      bool in[BATCH];
FED_UNROLL
      for (int i = 0; i < BATCH; ++i) {
        in[i] = inside(i);
        if (in[i]) words[i] = block.template read<Words>(thread, piece + i * 2048);
      }
FED_UNROLL
      for (int i = 0; i < BATCH; ++i) {
        if (!in[i]) continue;
        float value[8];
        unpack(words[i], value);
FED_UNROLL
        for (int j = 0; j < 8; ++j) value[j] = value[j] * n.scale[j] + n.shift[j];
FED_UNROLL
        for (int j = 0; j < 4; ++j) words[i].word[j] = pair(value[2 * j], value[2 * j + 1]);
        block.write(thread, piece + i * 2048, words[i]);
      }
    });
  };
  if (relu) {
    apply([](float a, float b) { return pack_open_pair(a, b); });
  } else {
    apply([](float a, float b) { return pack_pair(a, b); });
  }
}

// In the place of d: a · d + b · z + c, z being in a box of the same form at `z_box`, a multiple of 1024 bytes away.
template <int ROW, int BATCH = 2, class Block>
FED_HD void norm_gradient_box(
    Block& block, int box, int z_box, const BoxPositions& positions, TileCorner first, TileCorner end,
    typename Block::template PerThread<NormGradient>& by) {
  transform_box<ROW, BATCH>(block, box, positions, first, end, [&](int thread, int piece, auto inside) {
    const NormGradient& n = by[thread];
    Words d[BATCH], z[BATCH];
    bool in[BATCH];
FED_UNROLL
    for (int i = 0; i < BATCH; ++i) {
      in[i] = inside(i);
      if (!in[i]) continue;
      d[i] = block.template read<Words>(thread, piece + i * 2048);
      z[i] = block.template read<Words>(thread, piece + z_box - box + i * 2048);
    }
FED_UNROLL
    for (int i = 0; i < BATCH; ++i) {
      if (!in[i]) continue;
      float value[8], other[8];
      unpack(d[i], value);
      unpack(z[i], other);
FED_UNROLL
      for (int j = 0; j < 8; ++j) value[j] = value[j] * n.d[j] + (other[j] * n.z[j] + n.constant[j]);
      block.write(thread, piece + i * 2048, pack(value));
    }
  });
}

}  // namespace fed
