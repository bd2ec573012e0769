// What the wide wgmma convolution does with its sums: a warpgroup has 64 channels of 256 positions, a thread two
// channels (row 16 · warp + lane / 4 and the eighth after it) of 64 positions.
//
// Whatever is added per position (a residual, a gradient's z) comes as a box to the warpgroup's staging buffer, which
// holds a position's 64 channels in 128 swizzled bytes, is read there in the accumulators' order by transposing
// ldmatrix, and replaced in place by what is stored: a warp touches its own 16 channels alone. The box is then stored
// by the copy engine, which leaves out what is outside. Sums stay in registers over all tiles of a block.
#pragma once

#include "wgmma_inside.h"

namespace fed {

constexpr int STAGING_BYTES = 256 * 128, MASK_BYTES = 4 * 256 * 2;  // of a warpgroup

template <class Block, bool GRADIENT>
struct WideEpilogue {
  template <class V>
  using PerThread = typename Block::template PerThread<V>;
  using Sum = PerThread<Accumulator<256>>;
  struct Quad {
    uint32_t word[4];
  };
  // Parameters of a thread's two channels.
  struct Channels {
    float bias[2], scale[2], shift[2], center[2], factor[2];
  };

  Block& block;
  const ConvGeometry& at;
  const ConvSide& side;
  const int group, channel;  // the first of 64
  const int staging, mask_table, barrier;  // in shared memory
  int parity = 0;
  PerThread<Channels> channels;
  PerThread<float> first[2], second[2];
  PerThread<Quad> mask;

  FED_HD WideEpilogue(
      Block& block, const ConvGeometry& at, const ConvSide& side, int group, int slot, int channel, int staging,
      int mask_table, int barrier)
      : block(block), at(at), side(side), group(group), channel(channel), staging(staging), mask_table(mask_table),
        barrier(barrier) {
    block.each([&](int thread) {
FED_UNROLL
      for (int h = 0; h < 2; ++h) {
        first[h][thread] = second[h][thread] = 0.0f;
        const int c = channel + thread / 32 * 16 + thread % 32 / 4 + 8 * h;
        const auto load = [&](const Rows& rows, float none) {
          return rows.values != nullptr && c < at.channels ? rows.of(slot)[c] : none;
        };
        Channels& own = channels[thread];
        if constexpr (GRADIENT) {
          own.scale[h] = load(side.mask_scale, 0.0f);
          own.shift[h] = load(side.mask_shift, 1.0f);
          own.factor[h] = load(side.scale, 1.0f);
          own.center[h] = load(side.mean, 0.0f);
          own.bias[h] = load(side.inv_std, 0.0f);
        } else {
          own.bias[h] = load(side.bias, 0.0f) + load(side.second_bias, 0.0f);
          own.scale[h] = load(side.next_scale, 0.0f);
          own.shift[h] = load(side.next_shift, 0.0f);
          own.center[h] = load(side.center, 0.0f);
          own.factor[h] = 0.0f;
        }
      }
    });
  }

  FED_HD bool has_residual(int phase) const { return (side.residual_phases >> phase & 1) != 0; }

  FED_HD Corner corner(const Inside& here) const {
    return {{channel, here.corner.column, here.corner.image, here.corner.row, group}};
  }

  FED_HD void fetch(const TensorMap& map, const Inside& here) {
    block.each([&](int thread) {
      if (thread != 0) return;
      block.expect(barrier, at.tile.rows * at.tile.images * TILE_COLUMNS * 128);
      block.load(map, staging, barrier, corner(here));
    });
  }
  FED_HD void fetched() {
    block.wait(barrier, parity);
    parity ^= 1;
  }

  // Position `position` of the tile: its number in the result's group, or -1 outside.
  FED_HD int place(const Inside& here, int phase, int position) const {
    const int line = position / TILE_COLUMNS, column = position % TILE_COLUMNS;
    if (!(here.lines >> line & 1) || column >= here.columns) return -1;
    const int row = line / at.tile.images, image = line - row * at.tile.images, s = at.phases_stride;
    return ((here.corner.image + image) * at.H + (here.corner.row + row) * s + phase_row(phase, s)) * at.W +
           (here.corner.column + column) * s + phase_column(phase, s);
  }

  // While the first products are made: asks for what is added to them.
  FED_HD void begin(const Inside& here, int phase) {
    block.template stores_have_read<0>();
    block.sync();
    if (has_residual(phase)) {
      fetch(side.residual[phase], here);
    } else if (GRADIENT && has_z(side)) {
      fetch(side.other[phase], here);
    }
    if constexpr (GRADIENT) {
      if (side.mask_in == nullptr) return;
      block.each([&](int thread) {
        const uint8_t* from = side.mask_in + int64_t(group) * at.N * at.H * at.W * (at.channels / 8);
        uint32_t(&word)[4] = mask[thread].word;  // by warp: the bits of its channels, of two neighbours
FED_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int p = place(here, phase, 2 * thread + half);
FED_UNROLL
          for (int warp = 0; warp < 4; ++warp) {
            uint32_t bits = 0;
            if (p >= 0 && channel + 16 * warp < at.channels)
              bits = *reinterpret_cast<const uint16_t*>(
                  from + int64_t(p) * (at.channels / 8) + (channel + 16 * warp) / 8);
            word[warp] = half == 0 ? bits : word[warp] | bits << 16;
          }
        }
      });
    }
  }

  // Where lane's row of the four matrices of lines j and j + 1 is: channels 0-7 and 8-15 of the warp, of each line.
  FED_HD int matrices(int thread, int j) const {
    const int lane = thread % 32, position = (j + lane / 16) * TILE_COLUMNS + lane % 8;
    return staging + swizzled_piece<128>(position * 128, thread / 32 * 2 + lane / 8 % 2);
  }
  FED_HD void load(PerThread<Quad>& quad, int j) {
    block.template load_matrices<true>([&](int thread) { return matrices(thread, j); },
                                       [&](int thread) -> uint32_t(&)[4] { return quad[thread].word; });
  }
  FED_HD void store(PerThread<Quad>& quad, int j) {
    block.template store_matrices<true>([&](int thread) { return matrices(thread, j); },
                                        [&](int thread) -> uint32_t(&)[4] { return quad[thread].word; });
  }

  // f(word's number, h, value of the even position, of the odd one) for a thread's eight values of lines j and j + 1.
  template <class F>
  FED_HD static void for_pairs(Accumulator<256>& sum, int j, F f) {
FED_UNROLL
    for (int i = 0; i < 4; ++i) {
      float* pair = &sum.at[4 * (j + i / 2) + 2 * (i % 2)];
      f(i, i % 2, pair[0], pair[1]);
    }
  }

  FED_HD void store_box(const TensorMap& map, const Inside& here) {
    block.publish();
    block.sync();
    block.store(map, staging, corner(here));
  }

  // Bits of the values in the staging buffer.
  FED_HD void store_mask(const Inside& here, int phase) {
    block.each([&](int thread) {
      uint8_t* to = side.mask_out + int64_t(group) * at.N * at.H * at.W * (at.channels / 8);
FED_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int position = thread + 128 * half, p = place(here, phase, position);
        uint32_t bits[4];
FED_UNROLL
        for (int i = 0; i < 4; ++i) {
          bits[i] = 0;
FED_UNROLL
          for (int e = 0; e < 2; ++e)
            bits[i] |= positive_bits(block.template read<Words>(
                           thread, staging + swizzled_piece<128>(position * 128, 2 * i + e))) << 8 * e;
        }
        if (p < 0) continue;
        auto* at_p = reinterpret_cast<uint16_t*>(to + int64_t(p) * (at.channels / 8) + channel / 8);
FED_UNROLL
        for (int i = 0; i < 4; ++i)
          if (channel + 16 * i < at.channels) at_p[i] = uint16_t(bits[i]);
      }
    });
    block.publish();  // a box may come where they were read
  }

  FED_HD void forward(Sum& sum, const Inside& here, int phase) {
    const bool residual = has_residual(phase), summed = side.statistics != nullptr, again = has_second_output(side);
    const float least = side.relu ? 0.0f : -INFINITY;
    if (residual) fetched();
FED_UNROLL
    for (int j = 0; j < 32; j += 2) {
      PerThread<Quad> quad;
      if (residual) load(quad, j);
      block.each([&](int thread) {
        const Channels own = channels[thread];
        uint32_t(&word)[4] = quad[thread].word;
        const int column = accumulator_column(thread % 32);
        const float even = column < here.columns ? 1.0f : 0.0f, odd = column + 1 < here.columns ? 1.0f : 0.0f;
        for_pairs(sum[thread], j, [&](int i, int h, float& a, float& b) {
          a += own.bias[h];
          b += own.bias[h];
          if (residual) {
            a += low_half(word[i]);
            b += high_half(word[i]);
          }
          word[i] = pack_pair(at_least(a, least), at_least(b, least));
          if (summed && (here.lines >> (j + i / 2) & 1)) {
            // A product with 1 and the center's negative is the difference, rounded once; outside it is 0.
            const float x = fmaf(low_half(word[i]), even, -own.center[h] * even);
            const float y = fmaf(high_half(word[i]), odd, -own.center[h] * odd);
            first[h][thread] += x;
            second[h][thread] += x * x;
            first[h][thread] += y;
            second[h][thread] += y * y;
          }
          if (again) {
            a = open_relu(low_half(word[i]) * own.scale[h] + own.shift[h]);
            b = open_relu(high_half(word[i]) * own.scale[h] + own.shift[h]);
          }
        });
      });
      store(quad, j);
    }
    store_box(side.out[phase], here);
    if (again) {
      block.template stores_have_read<0>();
      block.sync();
FED_UNROLL
      for (int j = 0; j < 32; j += 2) {
        PerThread<Quad> quad;
        block.each([&](int thread) {
          for_pairs(sum[thread], j, [&](int i, int, float a, float b) { quad[thread].word[i] = pack_pair(a, b); });
        });
        store(quad, j);
      }
      store_box(side.other[phase], here);
    }
    if (side.mask_out != nullptr) store_mask(here, phase);
  }

  FED_HD void gradient(Sum& sum, const Inside& here, int phase) {
    const bool residual = has_residual(phase), z = has_z(side), masked = side.mask_in != nullptr;
    if (masked) {
      block.each([&](int thread) {
FED_UNROLL
        for (int warp = 0; warp < 4; ++warp)
          block.write(thread, mask_table + (warp * 128 + thread) * 4, mask[thread].word[warp]);
      });
      block.sync();
    }
    if (residual) fetched();
    if (residual || masked || side.scale.values != nullptr) {
FED_UNROLL
      for (int j = 0; j < 32; j += 2) {
        PerThread<Quad> quad;
        if (residual) load(quad, j);
        block.each([&](int thread) {
          const Channels own = channels[thread];
          const int lane = thread % 32;
          uint32_t bits[2] = {0xffffffffu, 0xffffffffu};  // of both positions of a line, those of the warp's channels
          if (masked) {
FED_UNROLL
            for (int line = 0; line < 2; ++line)
              bits[line] =
                  block.template read<uint32_t>(
                      thread, mask_table + (thread / 32 * 256 + (j + line) * 8 + accumulator_column(lane)) * 2) >>
                  accumulator_row(lane);
          }
          for_pairs(sum[thread], j, [&](int i, int h, float& a, float& b) {
            const float more_a = residual ? low_half(quad[thread].word[i]) : 0.0f;
            const float more_b = residual ? high_half(quad[thread].word[i]) : 0.0f;
            if (side.residual_first) {
              a += more_a;
              b += more_b;
            }
            a = bits[i / 2] >> 8 * h & 1 ? a * own.factor[h] : 0.0f;
            b = bits[i / 2] >> (8 * h + 16) & 1 ? b * own.factor[h] : 0.0f;
            if (!side.residual_first) {
              a += more_a;
              b += more_b;
            }
          });
        });
      }
    }
    if (residual && z) {
      block.publish();
      block.sync();
      fetch(side.other[phase], here);
    }
    if (z) fetched();
FED_UNROLL
    for (int j = 0; j < 32; j += 2) {
      PerThread<Quad> quad;
      if (z) load(quad, j);
      block.each([&](int thread) {
        const Channels own = channels[thread];
        uint32_t(&word)[4] = quad[thread].word;
        const int column = accumulator_column(thread % 32);
        const uint32_t keep = (column < here.columns ? 0xffffu : 0) | (column + 1 < here.columns ? 0xffff0000u : 0);
        for_pairs(sum[thread], j, [&](int i, int h, float a, float b) {
          if (z) {
            const float x = low_half(word[i]), y = high_half(word[i]);
            a = x * own.scale[h] + own.shift[h] > 0.0f ? a : 0.0f;
            b = y * own.scale[h] + own.shift[h] > 0.0f ? b : 0.0f;
            word[i] = pack_pair(a, b);
            if (here.lines >> (j + i / 2) & 1) {
              const float c = low_half(word[i] & keep), d = high_half(word[i] & keep);
              first[h][thread] += c;
              second[h][thread] += c * ((x - own.center[h]) * own.bias[h]);
              first[h][thread] += d;
              second[h][thread] += d * ((y - own.center[h]) * own.bias[h]);
            }
          } else {
            word[i] = pack_pair(a, b);
          }
        });
      });
      store(quad, j);
    }
    store_box(side.out[phase], here);
  }

  FED_HD void finish(Sum& sum, const Inside& here, int phase) {
    if constexpr (GRADIENT) {
      gradient(sum, here, phase);
    } else {
      forward(sum, here, phase);
    }
  }

  // The row of sums of this warpgroup, of `rows` of its group.
  FED_HD void end(int row, int rows) {
    block.finish_stores();
    if (side.statistics == nullptr) return;
FED_UNROLL
    for (int h = 0; h < 2; ++h) {
FED_UNROLL
      for (int step = 1; step < 4; step *= 2) {
        auto a = block.exchange(first[h], step), b = block.exchange(second[h], step);
        block.each([&](int thread) {
          first[h][thread] += a[thread];
          second[h][thread] += b[thread];
        });
      }
      block.each([&](int thread) {
        const int c = channel + thread / 32 * 16 + thread % 32 / 4 + 8 * h;
        if (thread % 4 != 0 || c >= at.channels) return;
        float* to = side.statistics + (int64_t(group) * rows + row) * 2 * at.channels + c;
        to[0] = first[h][thread];
        to[at.channels] = second[h][thread];
      });
    }
  }
};

}  // namespace fed
