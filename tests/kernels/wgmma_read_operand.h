// A kernel that shows where in shared memory each element of an operand was read: the other operand is a unit matrix.
#pragma once

#include "wgmma_block.h"

namespace driver {

using namespace fed;

// Of A (64 x 16, N is 16) or of B (16 x N), K innermost or the other dimension.
template <bool OF_A, bool K_INNERMOST, int N>
struct ReadOperand {
  static constexpr int CONSUMERS = 2, PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
  static constexpr int BYTES = 96 * 1024, UNIT = BYTES, SIZE = OF_A ? 64 : N;
  static_assert(!OF_A || N == 16, "as deep as the product");

  const bf16* memory;  // what BYTES bytes of shared memory hold
  float* result;  // [SIZE, 16]
  int start, leading, stride, swizzle;

  int blocks() const { return 1; }
  int shared_bytes() const { return UNIT + 64 * 128; }

  template <class Block>
  FED_HD void begin(Block& block) const {
    block.initialised();
  }
  template <class Block>
  FED_HD void produce(Block&) const {}

  template <class Block>
  FED_HD void consume(Block& block) const {
    if (block.number != 0) return;
    block.each([&](int thread) {
      for (int at = thread * 16; at < BYTES; at += 128 * 16)
        block.write(thread, at, load_words(memory + at / 2));
      for (int piece = thread; piece < 64 * 8; piece += 128) {  // rows of M or N, 16 of K from the first on
        const int row = piece / 8, eight = piece % 8;
        float values[8];
        FED_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = row == eight * 8 + i && row < 16 ? 1.0f : 0.0f;
        block.write(thread, UNIT + swizzled_piece<128>(row * 128, eight), pack(values));
      }
    });
    block.publish();
    block.sync();
    typename Block::template PerThread<Accumulator<N>> sum;
    const uint64_t read = operand(block.address(start), leading, stride, swizzle);
    const uint64_t unit = operand(block.address(UNIT), 0, 1024, 128);
    block.each([&](int thread) {
      FED_UNROLL
      for (int i = 0; i < N / 2; ++i) sum[thread].at[i] = 0.0f;
    });
    block.fence();
    if constexpr (OF_A) {
      block.template multiply<!K_INNERMOST, false>(sum, read, unit);
    } else {
      block.template multiply<false, !K_INNERMOST>(sum, unit, read);
    }
    block.commit();
    block.template complete<0>();
    block.each([&](int thread) {
      FED_UNROLL
      for (int i = 0; i < N / 2; ++i) {
        const int row = thread / 32 * 16 + accumulator_row(thread % 32) + i / 2 % 2 * 8;
        const int column = i / 4 * 8 + accumulator_column(thread % 32) + i % 2;
        if (OF_A || row < 16) result[OF_A ? row * 16 + column : column * 16 + row] = sum[thread].at[i];
      }
    });
  }
};

}  // namespace driver

// X(kernel), for what instantiates their launchers.
#define FED_READ_OPERAND_KERNELS(X) \
  X(driver::ReadOperand<true, true, 16>) \
  X(driver::ReadOperand<true, false, 16>) \
  X(driver::ReadOperand<false, true, 64>) \
  X(driver::ReadOperand<false, true, 256>) \
  X(driver::ReadOperand<false, false, 64>) \
  X(driver::ReadOperand<false, false, 192>)
