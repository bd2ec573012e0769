// What the narrow wgmma convolution does with its sums: a warpgroup has N = 16 or 32 channels of 256 positions, in four
// blocks of 64. Of every block a thread has two neighbouring channels of every eight, at the positions in column
// lane / 4 of the lines 2 · warp and the next.
//
// What is added per position (a residual, a gradient's z) comes as a box to a buffer of the warpgroup's, which holds a
// position's channels in 2 · N swizzled bytes, and is read there in the accumulators' order by ldmatrix. What is stored
// takes the residual's place, a second output the place of z: a warp touches its own 16 positions of a block alone.
// Channels' parameters are in a table in shared memory, sums in registers over all tiles of a block.
#pragma once

#include "wgmma_inside.h"
#include "wgmma_transform.h"

namespace fed {

template <class Block, bool GRADIENT, int N>
struct NarrowEpilogue {
  static constexpr int BLOCKS = 4, ROW = 2 * N, PARAMETERS = 5;
  static constexpr int BUFFER_BYTES = BLOCKS * 64 * ROW, PARAMETER_BYTES = 1024, MASK_BYTES = BLOCKS * 64 * 4;
  static constexpr int TABLE_BYTES = PARAMETER_BYTES + (GRADIENT ? MASK_BYTES : 0);
  static_assert(PARAMETERS * N * 4 <= PARAMETER_BYTES, "the table");

  template <class V>
  using PerThread = typename Block::template PerThread<V>;
  using Sums = PerThread<Accumulator<N>>[BLOCKS];
  struct Quad {  // what ldmatrix and stmatrix take: eight channels of both lines of a block, then of the next block
    uint32_t word[4];
  };
  struct alignas(8) Pair {
    float at[2];
  };
  struct Parameters {  // of a thread's two channels of eight
    Pair of[PARAMETERS];
  };
  struct Bits {  // of both lines of every block: which of a position's channels are open
    uint32_t line[2 * BLOCKS];
  };
  struct Open {  // the bits of positions `thread` and 128 on
    uint32_t half[2];
  };
  struct Totals {
    float first[N / 4], second[N / 4];
  };
  enum Forward { BIAS, NEXT_SCALE, NEXT_SHIFT, CENTER };
  enum Gradient { FACTOR, MASK_SCALE, MASK_SHIFT, MEAN, INV_STD };

  Block& block;
  const ConvGeometry& at;
  const ConvSide& side;
  const Divisor images;
  const int group, buffer, other_buffer, table, mask, barrier;  // in shared memory, from the buffers on
  int parity = 0;
  PerThread<int> row;  // where the thread's row of four matrices lies in a buffer, of the first channels and blocks
  PerThread<Totals> totals;
  PerThread<Open> open;

  FED_HD NarrowEpilogue(
      Block& block, const ConvGeometry& at, const ConvSide& side, Divisor images, int group, int slot, int buffer,
      int other_buffer, int table, int barrier)
      : block(block), at(at), side(side), images(images), group(group), buffer(buffer), other_buffer(other_buffer),
        table(table), mask(table + PARAMETER_BYTES), barrier(barrier) {
    block.each([&](int thread) {
      const int lane = thread % 32, position = 64 * (lane / 16) + 16 * (thread / 32) + lane % 16;
      row[thread] = swizzled_piece<ROW>(position * ROW, 0);
FED_UNROLL
      for (int i = 0; i < N / 4; ++i) totals[thread].first[i] = totals[thread].second[i] = 0.0f;
      if (thread >= at.channels) return;
      const auto enter = [&](int parameter, float value) {
        block.write(thread, table + (parameter * N + thread) * 4, value);
      };
      const auto load = [&](const Rows& rows, float none) {
        return rows.values != nullptr ? rows.of(slot)[thread] : none;
      };
      if constexpr (GRADIENT) {
        enter(FACTOR, load(side.scale, 1.0f));
        enter(MASK_SCALE, load(side.mask_scale, 0.0f));
        enter(MASK_SHIFT, load(side.mask_shift, 1.0f));
        enter(MEAN, load(side.mean, 0.0f));
        enter(INV_STD, load(side.inv_std, 0.0f));
      } else {
        enter(BIAS, load(side.bias, 0.0f) + load(side.second_bias, 0.0f));
        enter(NEXT_SCALE, load(side.next_scale, 0.0f));
        enter(NEXT_SHIFT, load(side.next_shift, 0.0f));
        enter(CENTER, load(side.center, 0.0f));
      }
    });
  }

  FED_HD bool has_residual(int phase) const { return (side.residual_phases >> phase & 1) != 0; }
  FED_HD Corner corner(const Inside& here) const {
    return {{0, here.corner.column, here.corner.image, here.corner.row, group}};
  }

  FED_HD static int line_of(int thread, int i) { return 8 * (i / 2) + 2 * (thread / 32) + i % 2; }
  FED_HD static int column_of(int thread) { return thread % 32 / 4; }
  FED_HD static bool counts(const Inside& here, int line, int column) {
    return (here.lines >> line & 1) != 0 && column < here.columns;
  }

  // Offset of a position's bits in those of all results.
  FED_HD int64_t bits_at(const Inside& here, int phase, int line, int column) const {
    const int s = at.phases_stride, r = images.of(line), image = here.corner.image + line - r * images.by;
    const int y = (here.corner.row + r) * s + phase_row(phase, s);
    const int x = (here.corner.column + column) * s + phase_column(phase, s);
    return (((int64_t(group) * at.N + image) * at.H + y) * at.W + x) * (N / 8);
  }

  // While the first products are made: asks for what is added to them. After it all threads see the table.
  FED_HD void begin(const Inside& here, int phase) {
    block.template stores_have_read<0>();
    block.sync();
    const bool residual = has_residual(phase), z = GRADIENT && has_z(side);
    block.each([&](int thread) {
      if (thread != 0 || !(residual || z)) return;
      const int bytes = at.tile.rows * at.tile.images * TILE_COLUMNS * ROW;
      block.expect(barrier, residual && z ? 2 * bytes : bytes);
      if (residual) block.load(side.residual[phase], buffer, barrier, corner(here));
      if (z) block.load(side.other[phase], other_buffer, barrier, corner(here));
    });
    if constexpr (GRADIENT) {
      if (side.mask_in == nullptr) return;
      block.each([&](int thread) {
FED_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int position = thread + 128 * half, line = position / TILE_COLUMNS, column = position % TILE_COLUMNS;
          uint32_t found = 0;
          if (counts(here, line, column)) {
            const auto* from = reinterpret_cast<const uint16_t*>(side.mask_in + bits_at(here, phase, line, column));
            found = from[0];
            if constexpr (N == 32) found |= uint32_t(from[1]) << 16;
          }
          open[thread].half[half] = found;
        }
      });
    }
  }

  // Eight channels, from 8 · j on, of two blocks from `b` on.
  template <class Registers>
  FED_HD void load(int from, int b, int j, Registers words) {
    block.template load_matrices<false>(
        [&](int thread) { return from + b * (64 * ROW) + (row[thread] ^ 16 * j); }, words);
  }
  template <class Registers>
  FED_HD void store(int to, int b, int j, Registers words) {
    block.template store_matrices<false>(
        [&](int thread) { return to + b * (64 * ROW) + (row[thread] ^ 16 * j); }, words);
  }
  FED_HD void load_parameters(PerThread<Parameters>& parameters, int count, int j) {
    block.each([&](int thread) {
FED_UNROLL
      for (int p = 0; p < PARAMETERS; ++p)
        if (p < count)
          parameters[thread].of[p] = block.template read<Pair>(
              thread, table + (p * N + 8 * j + accumulator_column(thread % 32)) * 4);
    });
  }

  // f(i, line, first value) for the four pairs of a thread's values there: i numbers them as ldmatrix does.
  template <class F>
  FED_HD static void for_pairs(Sums& sums, int thread, int b, int j, F f) {
FED_UNROLL
    for (int i = 0; i < 4; ++i)
      f(i, 2 * (b + i / 2) + i % 2, &sums[b + i / 2][thread].at[4 * j + 2 * (i % 2)]);
  }

  FED_HD void forward(Sums& sums, const Inside& here, int phase) {
    const bool residual = has_residual(phase), summed = side.statistics != nullptr, again = has_second_output(side);
    const bool masked = side.mask_out != nullptr;
    const float least = side.relu ? 0.0f : -INFINITY;
    PerThread<Bits> bits;
    block.each([&](int thread) {
FED_UNROLL
      for (int i = 0; i < 2 * BLOCKS; ++i) bits[thread].line[i] = 0;
    });
FED_UNROLL
    for (int j = 0; j < N / 8; ++j) {
      PerThread<Parameters> parameters;
      load_parameters(parameters, 4, j);
FED_UNROLL
      for (int b = 0; b < BLOCKS; b += 2) {
        PerThread<Quad> quad, second;
        const auto words = [&](int thread) -> uint32_t(&)[4] { return quad[thread].word; };
        if (residual) load(buffer, b, j, words);
        block.each([&](int thread) {
          const Pair(&of)[PARAMETERS] = parameters[thread].of;
          uint32_t(&word)[4] = quad[thread].word;
          for_pairs(sums, thread, b, j, [&](int i, int line, const float* sum) {
            float x = sum[0] + of[BIAS].at[0], y = sum[1] + of[BIAS].at[1];
            if (residual) {
              x += low_half(word[i]);
              y += high_half(word[i]);
            }
            word[i] = pack_pair(at_least(x, least), at_least(y, least));
            x = low_half(word[i]);
            y = high_half(word[i]);
            if (summed && counts(here, line_of(thread, line), column_of(thread))) {
              const float p = x - of[CENTER].at[0], q = y - of[CENTER].at[1];
              Totals& total = totals[thread];
              total.first[2 * j] += p;
              total.second[2 * j] += p * p;
              total.first[2 * j + 1] += q;
              total.second[2 * j + 1] += q * q;
            }
            uint32_t seen = word[i];
            if (again) {
              seen = second[thread].word[i] = pack_open_pair(x * of[NEXT_SCALE].at[0] + of[NEXT_SHIFT].at[0],
                                                             y * of[NEXT_SCALE].at[1] + of[NEXT_SHIFT].at[1]);
            }
            if (masked) {
              const uint32_t open = uint32_t(low_half(seen) > 0.0f) | uint32_t(high_half(seen) > 0.0f) << 1;
              bits[thread].line[line] |= open << 8 * j;
            }
          });
        });
        store(buffer, b, j, words);
        if (again) store(other_buffer, b, j, [&](int thread) -> uint32_t(&)[4] { return second[thread].word; });
      }
    }
    publish_boxes(here, phase, again);
    if (masked) store_bits(bits, here, phase);
  }

  FED_HD void gradient(Sums& sums, const Inside& here, int phase) {
    const bool residual = has_residual(phase), z = has_z(side), masked = side.mask_in != nullptr;
    const bool first = residual && side.residual_first, last = residual && !side.residual_first;
    PerThread<Bits> bits;
    if (masked) {
      block.each([&](int thread) {
FED_UNROLL
        for (int half = 0; half < 2; ++half)
          block.write(thread, mask + (thread + 128 * half) * 4, open[thread].half[half]);
      });
      block.sync();
      block.each([&](int thread) {
FED_UNROLL
        for (int i = 0; i < 2 * BLOCKS; ++i) {
          const int position = line_of(thread, i) * TILE_COLUMNS + column_of(thread);
          bits[thread].line[i] = block.template read<uint32_t>(thread, mask + position * 4) >>
                                 accumulator_column(thread % 32);
        }
      });
    }
FED_UNROLL
    for (int j = 0; j < N / 8; ++j) {
      PerThread<Parameters> parameters;
      load_parameters(parameters, 5, j);
FED_UNROLL
      for (int b = 0; b < BLOCKS; b += 2) {
        PerThread<Quad> quad, other;
        const auto words = [&](int thread) -> uint32_t(&)[4] { return quad[thread].word; };
        if (residual) load(buffer, b, j, words);
        if (z) load(other_buffer, b, j, [&](int thread) -> uint32_t(&)[4] { return other[thread].word; });
        block.each([&](int thread) {
          const Pair(&of)[PARAMETERS] = parameters[thread].of;
          uint32_t(&word)[4] = quad[thread].word;
          for_pairs(sums, thread, b, j, [&](int i, int line, const float* sum) {
            float x = sum[0], y = sum[1], p = 0.0f, q = 0.0f;
            if (first) {
              x += low_half(word[i]);
              y += high_half(word[i]);
            }
            if (masked) {
              x = (bits[thread].line[line] >> 8 * j & 1) != 0 ? x : 0.0f;
              y = (bits[thread].line[line] >> (8 * j + 1) & 1) != 0 ? y : 0.0f;
            }
            if (z) {
              p = low_half(other[thread].word[i]);
              q = high_half(other[thread].word[i]);
              x = p * of[MASK_SCALE].at[0] + of[MASK_SHIFT].at[0] > 0.0f ? x : 0.0f;
              y = q * of[MASK_SCALE].at[1] + of[MASK_SHIFT].at[1] > 0.0f ? y : 0.0f;
            }
            x *= of[FACTOR].at[0];
            y *= of[FACTOR].at[1];
            if (last) {
              x += low_half(word[i]);
              y += high_half(word[i]);
            }
            word[i] = pack_pair(x, y);
            if (z && counts(here, line_of(thread, line), column_of(thread))) {
              x = low_half(word[i]);
              y = high_half(word[i]);
              Totals& total = totals[thread];
              total.first[2 * j] += x;
              total.second[2 * j] += x * ((p - of[MEAN].at[0]) * of[INV_STD].at[0]);
              total.first[2 * j + 1] += y;
              total.second[2 * j + 1] += y * ((q - of[MEAN].at[1]) * of[INV_STD].at[1]);
            }
          });
        });
        store(buffer, b, j, words);
      }
    }
    publish_boxes(here, phase, false);
  }

  FED_HD void publish_boxes(const Inside& here, int phase, bool again) {
    block.publish();
    block.sync();
    block.store(side.out[phase], buffer, corner(here));
    if (again) block.store(side.other[phase], other_buffer, corner(here));
  }

  // Four neighbouring threads have two bits of every eight; each gets the whole bits of both lines of one block.
  FED_HD void store_bits(PerThread<Bits>& bits, const Inside& here, int phase) {
    block.each([&](int thread) {
FED_UNROLL
      for (int i = 0; i < 2 * BLOCKS; ++i) bits[thread].line[i] <<= accumulator_column(thread % 32);
    });
FED_UNROLL
    for (int half = BLOCKS, mask = 1; mask < 4; half /= 2, mask *= 2) {
FED_UNROLL
      for (int i = 0; i < half; ++i) {
        PerThread<uint32_t> given;
        block.each([&](int thread) {
          uint32_t(&line)[2 * BLOCKS] = bits[thread].line;
          const bool upper = (thread & mask) != 0;
          given[thread] = upper ? line[i] : line[i + half];
          line[i] = upper ? line[i + half] : line[i];
        });
        auto got = block.exchange(given, mask);
        block.each([&](int thread) { bits[thread].line[i] |= got[thread]; });
      }
    }
    block.each([&](int thread) {
      const int b = thread % 2 * 2 + thread / 2 % 2;
FED_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int line = line_of(thread, 2 * b + h);
        if (!counts(here, line, column_of(thread))) continue;
        auto* to = reinterpret_cast<uint16_t*>(side.mask_out + bits_at(here, phase, line, column_of(thread)));
        to[0] = uint16_t(bits[thread].line[h]);
        if constexpr (N == 32) to[1] = uint16_t(bits[thread].line[h] >> 16);
      }
    });
  }

  FED_HD void finish(Sums& sums, const Inside& here, int phase) {
    if (has_residual(phase) || (GRADIENT && has_z(side))) {
      block.wait(barrier, parity);
      parity ^= 1;
    }
    if constexpr (GRADIENT) {
      gradient(sums, here, phase);
    } else {
      forward(sums, here, phase);
    }
  }

  // The row of sums of this warpgroup, of `rows` of its group: over the lanes of a warp, then over the warps.
  FED_HD void end(int index, int rows) {
    block.finish_stores();
    if (side.statistics == nullptr) return;
    block.sync();  // the buffer's stores are done
FED_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      const auto element = [&](int thread) -> float& {
        return i < N / 4 ? totals[thread].first[i % (N / 4)] : totals[thread].second[i % (N / 4)];
      };
FED_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        PerThread<float> mine;
        block.each([&](int thread) { mine[thread] = element(thread); });
        auto got = block.exchange(mine, mask);
        block.each([&](int thread) { element(thread) += got[thread]; });
      }
      block.each([&](int thread) {
        if (thread % 32 >= 4) return;
        const int k = i % (N / 4), channel = k / 2 * 8 + 2 * (thread % 4) + k % 2;
        block.write(thread, buffer + ((thread / 32 * 2 + i / (N / 4)) * N + channel) * 4, element(thread));
      });
    }
    block.sync();
    block.each([&](int thread) {
      if (thread >= 2 * N) return;
      float total = 0.0f;
FED_UNROLL
      for (int warp = 0; warp < 4; ++warp)
        total += block.template read<float>(thread, buffer + (warp * 2 * N + thread) * 4);
      side.statistics[(int64_t(group) * rows + index) * 2 * N + thread] = total;
    });
  }
};

}  // namespace fed
