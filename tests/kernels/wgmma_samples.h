// Small kernels of wgmma_block.h's form that use all of it: a convolution of 64 to 64 channels as Dᵀ = Wᵀ · Xᵀ, with
// or without something applied to its input on load, and its weight gradient with overlapping windows. On the CPU they
// test the emulation, each with its planted faults; on a device they test the instructions.
#pragma once

#include "conv_steps.h"
#include "wgmma_block.h"

namespace samples {

using namespace fed;

// What a kernel does wrong.
enum Fault {
  NONE, WRONG_STRIDE, WRONG_TAP, WRONG_PARITY, NO_WAIT, NO_WAIT_FOR_SPACE, NO_ARRIVAL, EARLY_ARRIVAL,
  DOUBLE_ARRIVAL, FEW_ARRIVALS, MANY_ARRIVALS, FEW_BYTES, MANY_BYTES, NO_EXPECTATION, NO_PUBLISH, LATE_PUBLISH,
  NO_COMPLETE, INCOMPLETE, NO_COMMIT, NO_FENCE, NO_SYNC_BEFORE_STORE, NO_SYNC_AFTER_STORE, NO_READ_BEFORE_WRITE,
  NO_FINISH, WRONG_BOX, WRONG_SWIZZLE, WRONG_MAJOR, NO_BARRIER, PAST_THE_END, OVER_A_BARRIER, NOT_INITIALISED,
  TOUCHED_SUM, TRANSFORM_RACES, FAULTS
};

constexpr int STAGES = 2, BARRIERS = 64, MOST_BOX = 40 * 10 * 128;

struct Sample {
  ConvTile tile;
  ConvSteps steps;  // of a 3x3 convolution of stride 1
  int fault;

  FED_HD bool has(Fault one) const {
#ifdef __CUDA_ARCH__
    return false;
#else
    return fault == one;
#endif
  }
  // Room for a box, and for what 256 positions from its last tap reach: an operand may not touch another box.
  FED_HD int box() const {
    return ((TILE_LINES + steps.border * tile.images + 1) * steps.columns * 128 + 1023) / 1024 * 1024;
  }
};

// z[64 channels, 256 positions] of every tile, by one consumer; with `transform` another one doubles x on load.
struct SampleConv : Sample {
  static constexpr int CONSUMERS = 2, PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
  TensorMap x, weight, z;
  int grid;
  bool transform;

  int blocks() const { return grid; }
  FED_HD int full(int stage) const { return 8 * stage; }
  FED_HD int ready(int stage) const { return 16 + 8 * stage; }
  FED_HD int empty(int stage) const { return 32 + 8 * stage; }
  FED_HD int weights() const { return 1024; }
  FED_HD int staged() const { return weights() + 9 * 8192; }
  FED_HD int ring() const { return staged() + 32768; }
  int shared_bytes() const { return ring() + STAGES * box(); }
  FED_HD int bytes() const { return box_lines(steps, tile) * steps.columns * 128; }
  FED_HD int boxes() const { return transform ? 1 : steps.first_step[1]; }

  template <class Block>
  FED_HD void begin(Block& block) const {
    for (int stage = 0; stage < STAGES; ++stage) {
      block.init(full(stage), has(MANY_ARRIVALS) ? 2 : 1);
      block.init(ready(stage), 4);
      block.init(empty(stage), has(FEW_ARRIVALS) ? 1 : 4);
    }
    if (!has(NO_BARRIER)) block.init(48, 1);
    if (!has(NOT_INITIALISED)) block.initialised();
  }

  template <class Block>
  FED_HD void produce(Block& block) const {
    block.expect(48, 9 * 8192);
    for (int tap = 0; tap < 9; ++tap) block.load(weight, weights() + tap * 8192, 48, {{0, 0, tap, 0, 0}});
    int stage = 0, parity = 1;
    for (int t = block.index; t < tile.count; t += grid) {
      const TileCorner corner = tile_corner(tile, t);
      for (int s = 0; s < steps.first_step[1]; ++s) {
        const ConvStep& step = steps.step[s];
        if (!has(NO_WAIT_FOR_SPACE)) block.wait(empty(stage), has(WRONG_PARITY) ? parity ^ 1 : parity);
        if (!has(NO_EXPECTATION))
          block.expect(full(stage), bytes() + (has(FEW_BYTES) ? -16 : has(MANY_BYTES) ? 16 : 0));
        int to = ring() + stage * box();
        if (has(PAST_THE_END) && stage == STAGES - 1) to += 1024;
        if (has(OVER_A_BARRIER)) to = 0;
        block.load(x, to, full(stage),
                   {{0, corner.column + step.column + (has(WRONG_BOX) ? 1 : 0), corner.image, corner.row + step.row, 0}});
        if (++stage == STAGES) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
  }

  template <class Block>
  FED_HD void consume(Block& block) const {
    if (block.number == 0) multiply_tiles(block);
    if (block.number == 1 && transform) transform_tiles(block);
  }

  // Doubles every value where it lies.
  template <class Block>
  FED_HD void transform_tiles(Block& block) const {
    int stage = 0, parity = 0;
    for (int t = block.index; t < tile.count; t += grid)
      for (int s = 0; s < steps.first_step[1]; ++s) {
        block.wait(full(stage), parity);
        block.each([&](int thread) {
          for (int piece = thread; piece < bytes() / 16; piece += has(TRANSFORM_RACES) ? 127 : 128) {
            const int at = ring() + stage * box() + piece * 16;
            float value[8];
            unpack(block.template read<Words>(thread, at), value);
            for (float& one : value) one *= 2;
            block.write(thread, at, pack(value));
          }
        });
        if (!has(NO_PUBLISH) && !has(LATE_PUBLISH)) block.publish();
        block.arrive(ready(stage));
        if (has(LATE_PUBLISH)) block.publish();
        if (++stage == STAGES) {
          stage = 0;
          parity ^= 1;
        }
      }
  }

  template <class Block>
  FED_HD void multiply_tiles(Block& block) const {
    typename Block::template PerThread<Accumulator<256>> sum;
    if (!has(NO_WAIT)) block.wait(48, 0);
    int stage = 0, parity = 0;
    for (int t = block.index; t < tile.count; t += grid) {
      bool add = false;
      for (int s = 0; s < steps.first_step[1]; ++s) {
        const ConvStep& step = steps.step[s];
        block.wait(transform ? ready(stage) : full(stage), parity);
        if (!has(NO_FENCE)) block.fence();
        const int stride = has(WRONG_STRIDE) ? 1024 : steps.columns * 128;
        const uint64_t b = operand(block.address(ring() + stage * box()), 0, stride, has(WRONG_SWIZZLE) ? 64 : 128);
        FED_ROLLED
        for (int i = step.first_tap; i < step.first_tap + step.taps; ++i) {
          const ConvTap& tap = steps.tap[i];
          const int at = tap_position(steps, tile, tap) + (has(WRONG_TAP) && i == step.first_tap + 1 ? 1 : 0);
          const uint64_t a = operand(block.address(weights() + tap.weight * 8192), 0, 1024, 128);
          FED_UNROLL
          for (int k = 0; k < 4; ++k) {
            if (has(WRONG_MAJOR)) {
              block.template multiply<false, false>(sum, moved(a, k * 2048), moved(b, at * 128 + k * 32), add);
            } else {
              block.template multiply<true, false>(sum, moved(a, k * 2048), moved(b, at * 128 + k * 32), add);
            }
            add = true;
          }
        }
        if (has(EARLY_ARRIVAL)) block.arrive(empty(stage));
        if (!has(NO_COMMIT)) block.commit();
        if (has(TOUCHED_SUM)) block.each([&](int thread) { sum[thread].at[0] += 1; });
        if (has(INCOMPLETE)) {
          block.template complete<1>();
        } else if (!has(NO_COMPLETE)) {
          block.template complete<0>();
        }
        if (!has(NO_ARRIVAL) && !has(EARLY_ARRIVAL)) block.arrive(empty(stage));
        if (has(DOUBLE_ARRIVAL)) block.arrive(empty(stage));
        if (++stage == STAGES) {
          stage = 0;
          parity ^= 1;
        }
      }
      store_tile(block, sum, tile_corner(tile, t));
    }
    if (!has(NO_FINISH)) block.finish_stores();
  }

  template <class Block, class Sum>
  FED_HD void store_tile(Block& block, Sum& sum, TileCorner corner) const {
    if (!has(NO_READ_BEFORE_WRITE)) block.template stores_have_read<0>();
    if (!has(NO_SYNC_AFTER_STORE)) block.sync();
    FED_UNROLL
    for (int j = 0; j < 32; j += 2) {
      typename Block::template PerThread<uint32_t[4]> words;
      block.each([&](int thread) {
        const auto& d = sum[thread].at;
        FED_UNROLL
        for (int i = 0; i < 4; ++i) words[thread][i] = pack_pair(d[j * 4 + 2 * i], d[j * 4 + 2 * i + 1]);
      });
      // Matrices: eight positions by channels 0 to 7 and 8 to 15 of the warp, then those of the next eight positions
      block.template store_matrices<true>(
          [&](int thread) {
            const int lane = thread % 32, position = (j + lane / 16) * 8 + lane % 8;
            return swizzled_piece<128>(staged() + position * 128, thread / 32 * 2 + lane / 8 % 2);
          },
          [&](int thread) -> const uint32_t(&)[4] { return words[thread]; });
    }
    block.publish();
    if (!has(NO_SYNC_BEFORE_STORE)) block.sync();
    block.store(z, staged(), {{0, corner.column, corner.image, corner.row, 0}});
  }
};

}  // namespace samples
