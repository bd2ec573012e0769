// Grouped 3x3 convolution, stride 1, padding 1, in bf16: forward and data gradient; equations in
// fastensdistill/kernels/grouped_conv.py and conv_data_gradient.py.
//
// A block computes 256 positions (some rows of an image, or some whole images) times COLUMNS channels. The positions'
// input with its border of one is held in shared memory, DEPTH channels at a time, loaded once and put through the
// prologue once; the nine taps are nine shifts of the rows which ldmatrix reads. The weights stream through a ring of
// STAGES, TAPS taps of DEPTH channels each. The data gradient is the same product with flipped weights.
//
// What that should reach on an H200, an estimate: mma.sync issues at about 0.62 of wgmma's rate, 610 TFLOP/s, which is
// 1.6 cycles per mma and multiprocessor; in these, shared memory delivers 205 bytes. A warp's 64 rows x COLUMNS need
//   COLUMNS of a warp     16     32     64
//   bytes per mma        320    192    128      (64·32 for A and 32·COLUMNS for B, per 4·COLUMNS/8 mma)
//   bound, TFLOP/s       390    610    610
// and with 5.5 TB/s of L2 the weights, read once per 256 positions, and the input allow 64 channels about 880, 128
// about 1100. Memory allows 16 channels 200-310 and 32 channels 400-600, by what is fused. With the epilogue on top:
// expected 200, 350, 450 and 500 TFLOP/s at 16, 32, 64 and 128 channels and more; per-tap loading is bound at 100, 200,
// 280-360 and 400-600. None of it is measured.
#pragma once

#include "halo_epilogue.h"
#include "halo_shape.h"

namespace fed {

template <class Epilogue>
struct HaloArgs {
  const bf16* x;  // [groups or 1, N, H, W, Ci]
  const bf16* weight;  // [slots, 9, Ci, Co]
  const int32_t* weight_index;  // [G], slots
  Rows in_scale, in_shift;  // [slots or 1, Ci]
  const bf16* residual;  // [G, N, HR, WR, CR] or nullptr
  float* statistics;  // [G, tiles, 2, Co] or nullptr
  int64_t x_stride;  // from one group of x to the next, 0 where there is only one
  int G, N, H, W, Ci, Co, HR, WR, CR, residual_stride;
  HaloTile tile;
  Epilogue epilogue;
};

// ---- one block

template <class Block, class Shape, class Epilogue>
struct HaloBlock {
  struct Accumulators {
    float at[Shape::ROW_BLOCKS][Shape::COLUMN_BLOCKS][4];
  };
  struct Fragments {
    uint32_t a[Shape::ROW_BLOCKS][4], b[Shape::COLUMN_BLOCKS / 2][4];
  };
  struct Offsets {
    int at[Shape::ROW_BLOCKS];
  };
  struct Sums {
    float first[8], second[8];
  };
  template <class V>
  using PerThread = typename Block::template PerThread<V>;

  Block& block;
  const HaloArgs<Epilogue>& args;
  HaloLayout layout;
  const bf16* x;  // of the group
  const bf16* weight;  // of its slot
  int group, slot, tile, first_channel, first_image, first_row, first_column;

  FED_HD HaloBlock(Block& block, const HaloArgs<Epilogue>& args)
      : block(block), args(args), layout(halo_layout<Shape>(args.tile, args.Ci)) {
    const int column_blocks = pieces(args.Co, Shape::COLUMNS), rest = block.index / column_blocks;
    first_channel = (block.index - rest * column_blocks) * Shape::COLUMNS;
    group = rest / args.tile.count;
    tile = rest - group * args.tile.count;
    slot = args.weight_index[group];
    x = args.x + group * args.x_stride;
    weight = args.weight + slot * (9 * int64_t(args.Ci) * args.Co);
    const int line = tile / args.tile.across, image = line / args.tile.down;
    first_column = (tile - line * args.tile.across) * args.tile.columns;
    first_row = (line - image * args.tile.down) * args.tile.rows;
    first_image = image * args.tile.images;
  }

  template <class V>
  FED_HD V* at(int offset) const {
    return reinterpret_cast<V*>(block.shared + offset);
  }

  FED_HD int depth(int chunk) const {  // channels of a chunk, a multiple of 16
    const int left = args.Ci - chunk * Shape::DEPTH;
    return left < Shape::DEPTH ? left : Shape::DEPTH;
  }
  FED_HD int halo(int chunk) const { return chunk % 2 * layout.halo; }

  // Offset of every bordered position in its group of x and of every position in the result; −1 outside the images.
  FED_HD void fill_tables(int thread) const {
    const HaloTile& t = args.tile;
    for (int r = thread; r < bordered(t); r += Shape::THREADS) {
      const Place at_r = place(r, t.by_bordered_rows, t.by_bordered_columns);
      const int image = first_image + at_r.image, h = first_row + at_r.h - 1, w = first_column + at_r.w - 1;
      const bool inside = image < args.N && h >= 0 && h < args.H && w >= 0 && w < args.W;
      at<int>(layout.in_offset)[r] = inside ? ((image * args.H + h) * args.W + w) * args.Ci : -1;
    }
    for (int m = thread; m < HALO_POSITIONS; m += Shape::THREADS) {
      const Place at_m = place(m, t.by_rows, t.by_columns);
      const int image = first_image + at_m.image, h = first_row + at_m.h, w = first_column + at_m.w;
      const bool inside = m < positions(t) && image < args.N && h < args.H && w < args.W;
      at<int>(layout.out_position)[m] = inside ? (image * args.H + h) * args.W + w : -1;
      at<int>(layout.residual_position)[m] =
          inside && args.residual != nullptr
              ? Epilogue::residual_position(image, h, w, args.HR, args.WR, args.residual_stride)
              : -1;
    }
  }

  // f(bordered position, 16-byte chunk, first of its eight channels) for this thread's share of a chunk of channels
  template <class F>
  FED_HD void for_halo(int thread, int chunk, F f) const {
    for (int item = thread; item < bordered(args.tile) * Shape::IN_CHUNKS; item += Shape::THREADS) {
      const int part = item % Shape::IN_CHUNKS;
      if (8 * part < depth(chunk)) f(item / Shape::IN_CHUNKS, part, chunk * Shape::DEPTH + 8 * part);
    }
  }

  FED_HD void load_halo(int thread, int chunk) const {
    for_halo(thread, chunk, [&](int r, int part, int channel) {
      const int offset = at<int>(layout.in_offset)[r];
      block.copy(thread, halo(chunk) + swizzled<Shape::IN_CHUNKS>(r, part), offset < 0 ? x : x + offset + channel,
                 offset >= 0);
    });
  }

  FED_HD void load_weights(int thread, int step) const {
    const int chunk = step / Shape::STEPS, first_tap = step % Shape::STEPS * Shape::TAPS;
    const int ring = layout.ring + step % Shape::STAGES * Shape::STAGE_BYTES;
    const bf16* from = weight + (first_tap * args.Ci + chunk * Shape::DEPTH) * args.Co;
    constexpr int ITEMS = Shape::TAPS * Shape::DEPTH * Shape::WEIGHT_CHUNKS;
FED_UNROLL
    for (int i = 0; i < pieces(ITEMS, Shape::THREADS); ++i) {
      const int item = i * Shape::THREADS + thread;
      const int row = item / Shape::WEIGHT_CHUNKS, part = item % Shape::WEIGHT_CHUNKS;
      const int tap = row / Shape::DEPTH, k = row % Shape::DEPTH, channel = first_channel + 8 * part;
      if ((ITEMS % Shape::THREADS != 0 && item >= ITEMS) || k >= depth(chunk)) continue;
      const bool inside = channel < args.Co;
      block.copy(thread, ring + swizzled<Shape::WEIGHT_CHUNKS>(row, part),
                 from + ((tap * args.Ci + k) * args.Co + (inside ? channel : 0)), inside);
    }
  }

  // The prologue on what has arrived. The padding stays zero: it comes after the prologue.
  FED_HD void normalise(int thread, int chunk) const {
    for_halo(thread, chunk, [&](int r, int part, int channel) {
      if (at<int>(layout.in_offset)[r] < 0) return;
      char* place = block.shared + halo(chunk) + swizzled<Shape::IN_CHUNKS>(r, part);
      float value[8], scale[8], shift[8];
      unpack(load_words(place), value);
      load_eight(args.in_scale, slot, channel, scale);
      load_eight(args.in_shift, slot, channel, shift);
FED_UNROLL
      for (int i = 0; i < 8; ++i) value[i] = value[i] * scale[i] + shift[i];
      store_words(place, pack(value));
    });
  }

  // Bordered positions of a lane's rows, at the first tap. Rows past the tile's read position 0 and are not stored.
  FED_HD Offsets lane_rows(int thread) const {
    const int row = thread / 32 / Shape::WARPS_N * 64 + matrix_row(thread % 32);
    Offsets result;
FED_UNROLL
    for (int i = 0; i < Shape::ROW_BLOCKS; ++i) {
      const int m = row + 16 * i < positions(args.tile) ? row + 16 * i : 0;
      const Place at_m = place(m, args.tile.by_rows, args.tile.by_columns);
      result.at[i] = (at_m.image * (args.tile.rows + 2) + at_m.h) * (args.tile.columns + 2) + at_m.w;
    }
    return result;
  }

  // One block of 16 channels: `a` where a lane's rows are, `b` the first of 16 rows of weights.
  FED_HD void multiply(
      PerThread<Accumulators>& sum, PerThread<Fragments>& f, PerThread<Offsets>& a, int k, int ring, int b) const {
FED_UNROLL
    for (int i = 0; i < Shape::ROW_BLOCKS; ++i)
      block.template load_matrices<false>(
          [&](int thread) { return a[thread].at[i] ^ (32 * k); },
          [&](int thread) -> uint32_t(&)[4] { return f[thread].a[i]; });
FED_UNROLL
    for (int j = 0; j < Shape::COLUMN_BLOCKS / 2; ++j)
      block.template load_matrices<true>(
          [&](int thread) {
            const int lane = thread % 32, warp = thread / 32 % Shape::WARPS_N;
            const int part = warp * (Shape::WIDTH / 8) + 2 * j + matrix_chunk(lane);
            return ring + b * (2 * Shape::COLUMNS) + swizzled<Shape::WEIGHT_CHUNKS>(matrix_row(lane), part);
          },
          [&](int thread) -> uint32_t(&)[4] { return f[thread].b[j]; });
FED_UNROLL
    for (int i = 0; i < Shape::ROW_BLOCKS; ++i) {
FED_UNROLL
      for (int j = 0; j < Shape::COLUMN_BLOCKS; ++j)
        block.multiply([&](int thread) -> float(&)[4] { return sum[thread].at[i][j]; },
                       [&](int thread) -> uint32_t(&)[4] { return f[thread].a[i]; },
                       [&](int thread) { return &f[thread].b[j / 2][2 * (j % 2)]; });
    }
  }

  FED_HD void multiply_step(PerThread<Accumulators>& sum, PerThread<Offsets>& rows, int step) const {
    const int chunk = step / Shape::STEPS, ring = layout.ring + step % Shape::STAGES * Shape::STAGE_BYTES;
    const int blocks = depth(chunk) / 16;
    PerThread<Fragments> fragments;
    PerThread<Offsets> a;
FED_ROLLED
    for (int t = 0; t < Shape::TAPS; ++t) {
      const int tap = step % Shape::STEPS * Shape::TAPS + t, shift = tap / 3 * (args.tile.columns + 2) + tap % 3;
      block.each([&](int thread) {
FED_UNROLL
        for (int i = 0; i < Shape::ROW_BLOCKS; ++i)
          a[thread].at[i] = halo(chunk) + swizzled<Shape::IN_CHUNKS>(rows[thread].at[i] + shift, thread % 32 / 16);
      });
      if (blocks == Shape::DEPTH / 16) {
FED_UNROLL
        for (int k = 0; k < Shape::DEPTH / 16; ++k) multiply(sum, fragments, a, k, ring, t * Shape::DEPTH + 16 * k);
      } else {
FED_ROLLED
        for (int k = 0; k < blocks; ++k) multiply(sum, fragments, a, k, ring, t * Shape::DEPTH + 16 * k);
      }
    }
  }

  FED_HD void run() {
    const int chunks = pieces(args.Ci, Shape::DEPTH), steps = chunks * Shape::STEPS;
    const bool prologue = args.in_scale.values != nullptr;
    block.phase([&](int thread) { fill_tables(thread); });
    PerThread<Accumulators> sum;
    PerThread<Offsets> rows;
    block.each([&](int thread) {
      rows[thread] = lane_rows(thread);
FED_UNROLL
      for (int i = 0; i < Shape::ROW_BLOCKS; ++i)
FED_UNROLL
        for (int j = 0; j < Shape::COLUMN_BLOCKS; ++j)
FED_UNROLL
          for (int e = 0; e < 4; ++e) sum[thread].at[i][j][e] = 0.0f;
      load_halo(thread, 0);
FED_UNROLL
      for (int step = 0; step < Shape::STAGES - 1; ++step) {
        if (step < steps) load_weights(thread, step);
        block.commit(thread);
      }
    });
    FED_ROLLED
    for (int step = 0; step < steps; ++step) {
      // All have this step's operands, and nobody reads the previous step's any more: their place is free.
      block.template arrive<Shape::STAGES - 2>();
      const int chunk = step / Shape::STEPS;
      const bool first = step % Shape::STEPS == 0;
      block.warp_phase([&](int thread) {  // together again afterwards, as the matrix instructions demand
        if (step + Shape::STAGES - 1 < steps) load_weights(thread, step + Shape::STAGES - 1);
        if (first && chunk + 1 < chunks) load_halo(thread, chunk + 1);
        block.commit(thread);
      });
      if (first && prologue) block.phase([&](int thread) { normalise(thread, chunk); });
      multiply_step(sum, rows, step);
    }
    block.template arrive<0>();
    finish(sum);
  }

  // Every warp stages 16 rows at a time, so that eight channels of a position come to one thread and memory is accessed
  // 16 bytes at a time.
  FED_HD void finish(PerThread<Accumulators>& sum) const {
    constexpr int ACROSS = Shape::WIDTH / 8, DOWN = 32 / ACROSS, PASSES = 16 / DOWN;
    struct Fetches {
      typename Epilogue::Fetched of[PASSES];
    };
    const Epilogue& epilogue = args.epilogue;
    const int64_t base = int64_t(group) * args.N * args.H * args.W * args.Co;
    const bf16* residual = args.residual + int64_t(group) * args.N * args.HR * args.WR * args.CR;
    const auto channel = [&](int thread) {
      return first_channel + thread / 32 % Shape::WARPS_N * Shape::WIDTH + 8 * (thread % ACROSS);
    };
    const auto row = [&](int thread, int i, int pass) {
      return thread / 32 / Shape::WARPS_N * 64 + 16 * i + pass * DOWN + thread % 32 / ACROSS;
    };
    const auto staged = [&](int thread) { return at<float>(thread / 32 * Shape::STAGING_BYTES); };
    PerThread<typename Epilogue::Columns> columns;
    PerThread<Sums> sums;
    PerThread<Fetches> fetched;
    block.each([&](int thread) {
FED_UNROLL
      for (int i = 0; i < 8; ++i) sums[thread].first[i] = sums[thread].second[i] = 0.0f;
      if (channel(thread) < args.Co) columns[thread] = epilogue.columns(slot, channel(thread));
    });
FED_UNROLL
    for (int i = 0; i < Shape::ROW_BLOCKS; ++i) {
      block.warp_phase([&](int thread) {
FED_UNROLL
        for (int pass = 0; pass < PASSES; ++pass) {
          const int m = row(thread, i, pass), position = at<int>(layout.out_position)[m];
          if (position < 0 || channel(thread) >= args.Co) continue;
          const int other = at<int>(layout.residual_position)[m];
          fetched[thread].of[pass] = epilogue.fetch(
              base + position * int64_t(args.Co) + channel(thread),
              other >= 0 && channel(thread) < args.CR ? residual + other * int64_t(args.CR) + channel(thread)
                                                      : nullptr);
        }
        const int lane = thread % 32;
FED_UNROLL
        for (int j = 0; j < Shape::COLUMN_BLOCKS; ++j) {
          float* to = staged(thread) + accumulator_row(lane) * Shape::STAGING + 8 * j + accumulator_column(lane);
FED_UNROLL
          for (int e = 0; e < 4; ++e) to[e / 2 * 8 * Shape::STAGING + e % 2] = sum[thread].at[i][j][e];
        }
      });
      block.warp_phase([&](int thread) {
FED_UNROLL
        for (int pass = 0; pass < PASSES; ++pass) {
          const int position = at<int>(layout.out_position)[row(thread, i, pass)];
          if (position < 0 || channel(thread) >= args.Co) continue;
          float value[8];
          const float* place = staged(thread) + (pass * DOWN + thread % 32 / ACROSS) * Shape::STAGING;
FED_UNROLL
          for (int half = 0; half < 2; ++half) {
            const Words words = load_words(place + 8 * (thread % ACROSS) + 4 * half);
FED_UNROLL
            for (int e = 0; e < 4; ++e) value[4 * half + e] = bit_cast<float>(words.word[e]);
          }
          epilogue.finish(value, columns[thread], fetched[thread].of[pass],
                          base + position * int64_t(args.Co) + channel(thread), args.statistics != nullptr,
                          sums[thread].first, sums[thread].second);
        }
      });
    }
    if (args.statistics != nullptr) reduce_sums<ACROSS>(sums);
  }

  // Over the rows of a warp, then over the warps, in a fixed order.
  template <int ACROSS>
  FED_HD void reduce_sums(PerThread<Sums>& sums) const {
FED_UNROLL
    for (int mask = 16; mask >= ACROSS; mask /= 2) {
FED_UNROLL
      for (int i = 0; i < 16; ++i) {
        PerThread<float> mine;
        const auto element = [&](int thread) -> float& {
          return i < 8 ? sums[thread].first[i % 8] : sums[thread].second[i % 8];
        };
        block.each([&](int thread) { mine[thread] = element(thread); });
        auto other = block.exchange(mine, mask);
        block.each([&](int thread) { element(thread) += other[thread]; });
      }
    }
    block.phase([&](int thread) {
      if (thread % 32 >= ACROSS) return;
      const int warp = thread / 32, column = warp % Shape::WARPS_N * Shape::WIDTH + 8 * (thread % ACROSS);
      float* to = at<float>(layout.sums) + warp / Shape::WARPS_N * (2 * Shape::COLUMNS) + column;
FED_UNROLL
      for (int i = 0; i < 8; ++i) {
        to[i] = sums[thread].first[i];
        to[Shape::COLUMNS + i] = sums[thread].second[i];
      }
    });
    block.each([&](int thread) {
      for (int item = thread; item < 2 * Shape::COLUMNS; item += Shape::THREADS) {
        const int which = item / Shape::COLUMNS, column = item % Shape::COLUMNS;
        if (first_channel + column >= args.Co) continue;
        float total = 0.0f;
        for (int warp = 0; warp < Shape::WARPS_M; ++warp)
          total += at<float>(layout.sums)[warp * (2 * Shape::COLUMNS) + item];
        const int64_t row = (int64_t(group) * args.tile.count + tile) * 2 + which;
        args.statistics[row * args.Co + first_channel + column] = total;
      }
    });
  }
};

template <class Shape, class Epilogue>
FED_HD int halo_grid(const HaloArgs<Epilogue>& args) {
  return args.G * args.tile.count * pieces(args.Co, Shape::COLUMNS);
}

// ---- the CUDA launcher, for 16, 32, 64 or 128 columns in a block: 0 or the CUDA error of the launch

template <class Epilogue>
int launch_halo(const HaloArgs<Epilogue>& args, int columns, void* stream);

}  // namespace fed
