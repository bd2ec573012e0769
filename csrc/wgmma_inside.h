// Which positions of a tile are inside the images, and what the epilogues of the wgmma convolutions do with values.
#pragma once

#include "wgmma_operands.h"

namespace fed {

// A tile of the result: where it begins, its lines whose positions are inside (bit j: line j) and the columns inside.
struct Inside {
  TileCorner corner;
  uint32_t lines;
  int columns;
};

FED_HD uint32_t low_bits(int count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }

FED_HD Inside inside(const ConvGeometry& at, int tile, int phase) {
  const TileCorner corner = tile_corner(at.tile, tile);
  int rows = phase_height(at, phase) - corner.row, images = at.N - corner.image;
  rows = rows < at.tile.rows ? rows : at.tile.rows;
  uint32_t lines = 0;
  if (images >= at.tile.images) {
    lines = low_bits(rows < 0 ? 0 : rows * at.tile.images);
  } else if (images > 0) {
    for (int row = 0; row < rows; ++row) lines |= low_bits(images) << (row * at.tile.images);
  }
  return {corner, lines, phase_width(at, phase) - corner.column};
}

// Bit i of the byte: whether value i of 16 bytes is above zero.
FED_HD uint32_t positive_bits(Words words) {
  uint32_t bits = 0;
FED_UNROLL
  for (int i = 0; i < 4; ++i) {
#ifdef __CUDA_ARCH__
    uint32_t above;
    asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(above) : "r"(words.word[i]), "r"(0));
    bits |= above & (0x00020001u << 2 * i);
#else
    const uint32_t w = words.word[i];
    bits |= uint32_t(bit_cast<float>(w << 16) > 0.0f) << 2 * i;
    bits |= uint32_t(bit_cast<float>(w & 0xffff0000u) > 0.0f) << (2 * i + 17);
#endif
  }
  return (bits | bits >> 16) & 0xff;
}

FED_HD float low_half(uint32_t word) { return bit_cast<float>(word << 16); }
FED_HD float high_half(uint32_t word) { return bit_cast<float>(word & 0xffff0000u); }

FED_HD float at_least(float value, float least) {  // NaN stays NaN
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(least));
  return result;
#else
  return value < least ? least : value;
#endif
}

}  // namespace fed
