// The wide wgmma convolution, forward and data gradient, of more than 32 channels of the result.
//
// A consumer's product is D[64 channels, 256 positions] = Wᵀ · Xᵀ, m64n256k16: A is a piece of weights as they are
// packed, [64 input channels, 64 channels] of a tap, M innermost; B is the tile's box in shared memory from the tap's
// shift on, K innermost. Two consumers take two blocks of channels of one tile, or the same channels of two tiles.
//
// Per result (a tile; of a strided gradient once for every phase) boxes come step by step, in chunks of 64 channels,
// through a ring, and behind each the weights of its taps through another; where all weights fit, they come once. A
// block works for one group and one block of channels, and takes every so many-th tile.
#pragma once

#include "wgmma_epilogue.h"
#include "wgmma_wide_plan.h"

namespace fed {

// ON_LOAD: the producer's warpgroup changes the boxes of source 0 before they are multiplied. A warpgroup more would
// leave 128 registers a thread to begin with, and the compiler wants 154 for this product.
template <bool GRADIENT, bool ON_LOAD>
struct WideConv {
  static constexpr bool PREPARES = ON_LOAD;
  static constexpr int CONSUMERS = 2, PRODUCER_REGISTERS = ON_LOAD ? 88 : 40, CONSUMER_REGISTERS = ON_LOAD ? 208 : 232;

  ConvGeometry at;
  WidePlan plan;
  ConvSide side[2];

  int blocks() const { return (side[0].groups + side[1].groups) * plan.channel_blocks * plan.parts; }
  int shared_bytes() const { return plan.total; }

  template <class Block>
  FED_HD void begin(Block& block) const {
    const int users = 4 * (plan.pair ? 2 : 1);
    for (int i = 0; i < plan.boxes; ++i) {
      block.init(Barriers::full + 8 * i, 1);
      block.init(Barriers::empty + 8 * i, users);
      block.init(Barriers::ready + 8 * i, 4);
    }
    block.init(Barriers::full_z, 1);
    for (int i = 0; i < plan.pieces; ++i) {
      block.init(Barriers::full_weights + 8 * i, 1);
      block.init(Barriers::empty_weights + 8 * i, 8);
    }
    for (int i = 0; i < 2; ++i) block.init(Barriers::fetched + 8 * i, 1);
    block.initialised();
  }

  // f(item, phase) for every result of a block, in order.
  template <class F>
  FED_HD void for_results(const BlockWork& work, F f) const {
    for (int item = work.part; item < plan.items; item += plan.parts)
      for (int phase = 0; phase < at.steps.phases; ++phase)
        if (phase_height(at, phase) > 0 && phase_width(at, phase) > 0) f(item, phase);
  }
  // f(step, chunk) for every box of a result.
  template <class F>
  FED_HD void for_boxes(const ConvSide& own, int phase, F f) const {
    for (int i = at.steps.first_step[phase]; i < at.steps.first_step[phase + 1]; ++i) {
      const ConvStep& step = at.steps.step[i];
      if (step.source == 1 && !own.has_second) continue;
      for (int chunk = 0; chunk * CHUNK < at.in_channels[step.source]; ++chunk) f(step, chunk);
    }
  }

  FED_HD BlockWork work_of(int index) const {
    return block_work(index, side[0].groups, plan.channel_blocks, plan.parts);
  }
  FED_HD int first_channel(const BlockWork& work) const { return work.channels * (plan.pair ? 2 : 1) * CHUNK; }
  FED_HD bool changes(const ConvSide& own) const {
    return ON_LOAD && (GRADIENT ? has_norm(own) : own.in_scale.values != nullptr);
  }
  // The ring of weights, as long as all of them where they stay.
  FED_HD Ring pieces_of(const ConvSide& own) const {
    return {plan.resident ? plan.source_pieces[0] + (own.has_second ? plan.source_pieces[1] : 0) : plan.pieces, 0, 0};
  }
  FED_HD int box_values() const { return box_lines(at.steps, at.tile) * at.steps.columns * 128; }

  FED_HD Corner box_corner(const BlockWork& work, const ConvStep& step, int chunk, int tile_index) const {
    const TileCorner tile = tile_corner(at.tile, tile_index);
    const bool shared = step.source == 0 ? side[work.side].in_shared : side[work.side].second_shared;
    return {{chunk * CHUNK, tile.column + step.column, tile.image, tile.row + step.row, shared ? 0 : work.group}};
  }
  // Asks for what comes to a stage of a ring, when it is free.
  template <class Block>
  FED_HD void bring_box(
      Block& block, const BlockWork& work, const ConvStep& step, int chunk, int tile, Ring& ring) const {
    const ConvSide& own = side[work.side];
    const int full = Barriers::full + 8 * ring.stage;
    block.wait(Barriers::empty + 8 * ring.stage, ring.parity ^ 1);
    block.expect(full, box_values());
    block.load(step.source == 0 ? own.in[step.phase] : own.second, plan.box + ring.stage * plan.box_bytes, full,
               box_corner(work, step, chunk, tile));
    ring.advance();
  }
  template <class Block>
  FED_HD void bring_pieces(
      Block& block, const BlockWork& work, int slot, const ConvStep& step, int chunk, Ring& ring) const {
    const TensorMap& map = side[work.side].weight[step.source];
    for (int tap = step.first_tap; tap < step.first_tap + step.taps; ++tap) {
      const int full = Barriers::full_weights + 8 * ring.stage, to = plan.piece + ring.stage * plan.piece_bytes;
      if (!plan.resident) block.wait(Barriers::empty_weights + 8 * ring.stage, ring.parity ^ 1);
      block.expect(full, plan.piece_bytes);
      for (int i = 0; i * PIECE_BYTES < plan.piece_bytes; ++i)
        block.load(map, to + i * PIECE_BYTES, full,
                   {{first_channel(work) + i * CHUNK, chunk * CHUNK, at.steps.tap[tap].weight, slot, 0}});
      ring.advance();
    }
  }

  template <class Block>
  FED_HD void produce(Block& block) const {
    const BlockWork work = work_of(block.index);
    const ConvSide& own = side[work.side];
    const int slot = own.weight_index[work.group], tiles = plan.pair ? 1 : 2;
    Ring boxes{plan.boxes, 0, 0}, pieces = pieces_of(own);
    int pieces_left = plan.resident ? pieces.stages : INT_MAX;
    for_results(work, [&](int item, int phase) {
      for_boxes(own, phase, [&](const ConvStep& step, int chunk) {
        for (int i = 0; i < tiles; ++i) bring_box(block, work, step, chunk, item * tiles + i, boxes);
        if (pieces_left <= 0) return;
        bring_pieces(block, work, slot, step, chunk, pieces);
        if (plan.resident) pieces_left -= step.taps;
      });
    });
  }

  template <class Block>
  FED_HD void consume(Block& block) const {
    const BlockWork work = work_of(block.index);
    const ConvSide& own = side[work.side];
    const int me = block.number, tiles = plan.pair ? 1 : 2, slot = own.weight_index[work.group];
    WideEpilogue<Block, GRADIENT> epilogue(
        block, at, own, work.group, slot, first_channel(work) + (plan.pair ? me * CHUNK : 0),
        plan.staging + me * STAGING_BYTES, plan.masks + me * MASK_BYTES, Barriers::fetched + 8 * me);
    typename Block::template PerThread<Accumulator<256>> sum;
    Ring boxes{plan.boxes, plan.pair ? 0 : me, 0}, pieces = pieces_of(own);
    const int stride = at.steps.columns * 128;
    for_results(work, [&](int item, int phase) {
      const Inside here = inside(at, item * tiles + (plan.pair ? 0 : me), phase);
      bool begun = false;
      block.each([&](int thread) {
FED_UNROLL
        for (int i = 0; i < 128; ++i) sum[thread].at[i] = 0.0f;
      });
      for_boxes(own, phase, [&](const ConvStep& step, int chunk) {
        block.wait((changes(own) ? Barriers::ready : Barriers::full) + 8 * boxes.stage, boxes.parity);
        const int left = at.in_channels[step.source] / 16 - chunk * 4, depth = left < 4 ? left : 4;
        int open = -1;  // stage of the weights that are being multiplied
        for (int tap = step.first_tap; tap < step.first_tap + step.taps; ++tap) {
          block.wait(Barriers::full_weights + 8 * pieces.stage, plan.resident ? 0 : pieces.parity);
          const int piece = plan.piece + pieces.stage * plan.piece_bytes + (plan.pair ? me * PIECE_BYTES : 0);
          const int first = tap_position(at.steps, at.tile, at.steps.tap[tap]);
          const uint64_t a = operand(block.address(piece), 0, 1024, 128);
          const uint64_t b =
              operand(block.address(plan.box + boxes.stage * plan.box_bytes + first * 128), 0, stride, 128);
          // 32 channels a group of products: the compiler does not know that all threads have as many groups, so that
          // one has to be whole in an iteration. Channels past the last are zeros.
FED_ROLLED
          for (int k = 0; k < depth; k += 2) {
            block.fence();
FED_UNROLL
            for (int i = 0; i < 2; ++i)
              block.template multiply<true, false>(sum, moved(a, 2048 * (k + i)), moved(b, 32 * (k + i)));
            block.commit();
            if (!begun) epilogue.begin(here, phase);
            begun = true;
            block.template complete<1>();
            if (!plan.resident && open >= 0) block.arrive(Barriers::empty_weights + 8 * open);
            open = -1;
          }
          open = pieces.stage;
          pieces.advance();
        }
        block.template complete<0>();
        if (!plan.resident && open >= 0) block.arrive(Barriers::empty_weights + 8 * open);
        block.arrive(Barriers::empty + 8 * boxes.stage);
        boxes.advance(tiles);
      });
      if (!begun) epilogue.begin(here, phase);
      epilogue.finish(sum, here, phase);
    });
    epilogue.end(plan.pair ? work.part : 2 * work.part + me, plan.pair ? plan.parts : 2 * plan.parts);
  }

  // The same by a warpgroup whose first thread asks for boxes, and which changes them when they have come, while the
  // weights of the box before are under way.
  template <class Block>
  FED_HD void prepare(Block& block) const {
    const BlockWork work = work_of(block.index);
    const ConvSide& own = side[work.side];
    const int slot = own.weight_index[work.group], tiles = plan.pair ? 1 : 2;
    const bool changed = changes(own);
    Ring boxes{plan.boxes, 0, 0}, ready = boxes, norm_boxes{1, 0, 0}, pieces = pieces_of(own);
    int pieces_left = plan.resident ? pieces.stages : INT_MAX;
    typename Block::template PerThread<std::conditional_t<GRADIENT, NormGradient, Normalisation>> by;
    int held = -1;  // the chunk that `by` is of
    const ConvStep* before = nullptr;  // the box whose weights are to come
    int chunk_before = 0;
    const auto first_thread = [&](auto f) {
      block.each([&](int thread) {
        if (thread == 0) f();
      });
    };
    const auto bring_before = [&] {
      if (before == nullptr || pieces_left <= 0) return;
      first_thread([&] {
        Ring next = pieces;
        bring_pieces(block, work, slot, *before, chunk_before, next);
      });
      pieces.advance(before->taps);
      if (plan.resident) pieces_left -= before->taps;
    };
    for_results(work, [&](int item, int phase) {
      for_boxes(own, phase, [&](const ConvStep& step, int chunk) {
        const bool change = changed && step.source == 0, early = plan.boxes >= 2 * tiles;
        if (!early) bring_before();
        first_thread([&] {
          Ring next = boxes;
          for (int i = 0; i < tiles; ++i) bring_box(block, work, step, chunk, item * tiles + i, next);
        });
        boxes.advance(tiles);
        if (early) bring_before();
        before = &step;
        chunk_before = chunk;
        if (change && chunk != held) {
          held = chunk;
          load_factors(block, own, work.group, slot, chunk, by);
        }
        if (changed)
          for (int i = 0; i < tiles; ++i) {
            change_box(block, work, step, chunk, item * tiles + i, change, ready, norm_boxes, by);
            block.arrive(Barriers::ready + 8 * ready.stage);
            ready.advance();
          }
      });
    });
    bring_before();
  }

  template <class Block, class By>
  FED_HD void load_factors(Block& block, const ConvSide& own, int group, int slot, int chunk, By& by) const {
    block.each([&](int thread) {
      const auto load = [&](const Rows& rows, int row, float (&value)[8]) {
        load_channels<128>(rows, row, chunk * CHUNK, at.in_channels[0], thread, value);
      };
      if constexpr (GRADIENT) {
        load(own.norm_a, group, by[thread].d);
        load(own.norm_b, group, by[thread].z);
        load(own.norm_c, group, by[thread].constant);
      } else {
        load(own.in_scale, slot, by[thread].scale);
        load(own.in_shift, slot, by[thread].shift);
      }
    });
  }

  template <class Block, class By>
  FED_HD void change_box(
      Block& block, const BlockWork& work, const ConvStep& step, int chunk, int tile_index, bool change,
      const Ring& ready, Ring& norm_boxes, By& by) const {
    const ConvSide& own = side[work.side];
    const int box = plan.box + ready.stage * plan.box_bytes;
    if (GRADIENT && change) {
      block.sync();  // nobody reads the z before
      block.each([&](int thread) {
        if (thread != 0) return;
        block.expect(Barriers::full_z, box_values());
        block.load(own.norm_z, plan.norm_box, Barriers::full_z, box_corner(work, step, chunk, tile_index));
      });
    }
    block.wait(Barriers::full + 8 * ready.stage, ready.parity);
    if (!change) return;
    const TileCorner tile = tile_corner(at.tile, tile_index);
    const TileCorner first{tile.column + step.column, tile.row + step.row, tile.image};
    const TileCorner end{phase_size(at.in_W, at.in_stride, phase_column(step.phase, at.in_stride)),
                         phase_size(at.in_H, at.in_stride, phase_row(step.phase, at.in_stride)), at.N};
    if constexpr (GRADIENT) {
      block.wait(Barriers::full_z, norm_boxes.parity);
      norm_boxes.advance();
      norm_gradient_box<128>(block, box, plan.norm_box, plan.positions, first, end, by);
    } else {
      normalise_box<128>(block, box, plan.positions, first, end, by, own.in_relu);
    }
  }
};

template <bool GRADIENT, bool ON_LOAD>
int launch_wide(const ConvLaunch& launch, void* stream) {
  WideConv<GRADIENT, ON_LOAD> kernel{launch.at, wide_plan(launch), {launch.side[0], launch.side[1]}};
  for (int i = 0; i < 2; ++i) {
    if (launch.side[i].groups == 0) continue;
    const int status = side_maps(launch.at, launch.tensors[i], {CHUNK, CHUNK, CHUNK, CHUNK}, kernel.side[i]);
    if (status != 0) return status;
  }
  return launch_wgmma(kernel, stream);
}

inline int launch_wide(const ConvLaunch& launch, void* stream) {
  const auto& [one, other] = launch.side;
  const bool on_load = launch.gradient ? has_norm(one) : one.in_scale.values || other.in_scale.values;
  return launch.gradient ? (on_load ? launch_wide<true, true> : launch_wide<true, false>)(launch, stream)
                         : (on_load ? launch_wide<false, true> : launch_wide<false, false>)(launch, stream);
}

}  // namespace fed

#define FED_WIDE_KERNELS(LAUNCH)       \
  LAUNCH(fed::WideConv<false, false>) \
  LAUNCH(fed::WideConv<false, true>)  \
  LAUNCH(fed::WideConv<true, false>)  \
  LAUNCH(fed::WideConv<true, true>)
