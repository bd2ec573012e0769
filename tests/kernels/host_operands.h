// What a multiplication reads of shared memory, and its product, on the CPU.
#pragma once

#include "host_memory.h"
#include "wgmma_block.h"

namespace fed {

// What the unit swizzles: the address, once all offsets are added (as wgmma_block.h assumes); or the offset from the
// operand's first row, before they are, so that only operands that start at a multiple of eight rows and whose eights
// of rows lie at such multiples are read as they were stored.
enum class SwizzleOf { ADDRESS, OFFSET };
inline SwizzleOf swizzle_of = SwizzleOf::ADDRESS;

// An operand as its descriptor gives it.
struct Operand {
  int start, leading, stride, swizzle;

  explicit Operand(uint64_t descriptor)
      : start(int(descriptor & 0x3fff) << 4), leading(int(descriptor >> 16 & 0x3fff) << 4),
        stride(int(descriptor >> 32 & 0x3fff) << 4) {
    const int mode = int(descriptor >> 62);
    swizzle = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
    if (swizzle == 0) throw Misuse("an operand without a swizzle");
    if ((descriptor >> 49 & 7) != 0) throw Misuse("an operand with a base offset");
  }

  // Of 16 bytes: `row` is M or N with K innermost, then `piece` of two is eight values of K; else K, and `piece` eight
  // values of M or N.
  int piece(bool k_innermost, int row, int piece) const {
    const int across = swizzle / 16;  // pieces of a row
    const int chunk = k_innermost ? 0 : piece / across, within = k_innermost ? piece : piece % across;
    const int far = (row / 8) * stride + chunk * leading, near = (row % 8) * swizzle + within * 16;
    const int mask = swizzle / 16 - 1;
    const auto permuted = [mask](int address) { return address ^ (((address >> 7) & mask) << 4); };
    if (swizzle_of == SwizzleOf::ADDRESS) return permuted(start + far + near);
    return (start & ~(swizzle - 1)) + far + permuted((start & (swizzle - 1)) + near);
  }
};

// f(row, piece, offset)
template <class F>
void for_pieces(const Operand& operand, bool k_innermost, int size, F f) {
  const int rows = k_innermost ? size : 16, pieces = k_innermost ? 2 : size / 8;
  for (int row = 0; row < rows; ++row)
    for (int piece = 0; piece < pieces; ++piece) f(row, piece, operand.piece(k_innermost, row, piece));
}

// values[k][i] of the `size` rows (or columns) of an operand
inline void read_operand(const char* shared, const Operand& operand, bool k_innermost, int size, float* values) {
  for_pieces(operand, k_innermost, size, [&](int row, int piece, int offset) {
    uint16_t bits[8];
    std::memcpy(bits, shared + offset, 16);
    for (int i = 0; i < 8; ++i) {
      const int k = k_innermost ? piece * 8 + i : row, at = k_innermost ? row : piece * 8 + i;
      values[k * size + at] = widen(bf16{bits[i]});
    }
  });
}

// sum[64][N] += a[16][64]ᵀ · b[16][N]
template <int N>
__attribute__((optimize("O3"), no_sanitize("thread"))) void add_product(float* sum, const float* a, const float* b) {
  for (int m = 0; m < 64; ++m) {
    float* row = sum + m * N;
    for (int k = 0; k < 16; k += 4) {
      const float x0 = a[k * 64 + m], x1 = a[(k + 1) * 64 + m], x2 = a[(k + 2) * 64 + m], x3 = a[(k + 3) * 64 + m];
      const float *b0 = b + k * N, *b1 = b0 + N, *b2 = b1 + N, *b3 = b2 + N;
      for (int n = 0; n < N; ++n) row[n] += x0 * b0[n] + x1 * b1[n] + x2 * b2[n] + x3 * b3[n];
    }
  }
}

}  // namespace fed
