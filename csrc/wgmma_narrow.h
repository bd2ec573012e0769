// The narrow wgmma convolution, forward and data gradient, of 16 or 32 channels of the result.
//
// A product is D[64 positions, N channels] = X · W, m64n16k16 or m64n32k16, four of them a tile of 256: A is the tile's
// box in shared memory from the tap's shift on, K innermost; B is 16 input channels of a tap's weights as they are
// packed, N innermost. All weights stay in shared memory. A consumer takes a whole tile, of a strided gradient with all
// its phases, and does everything to it: it applies what is applied on load, multiplies, adds and stores. So while one
// multiplies others load, transform and store, and there are more of them than wide kernels have: 4 of 16 channels and
// 3 of 32, a gradient's one less. Boxes come through one ring, in tiles' order; each consumer has barriers of its own
// for those that are its.
//
// A prediction of what bounds it, in cycles a tile. An instruction of N = 16 (32) needs 8 (16) cycles of arithmetic and
// reads 2.5 (3) KB, 20 (24) cycles of shared memory; 3x3 taps from as many channels are 36 (72) of them. An H200's
// memory gives 17.6 bytes a cycle at 85% of its bandwidth and 132 multiprocessors, an H100's 12.3, L2 23.7. A "tensor"
// is one more that an epilogue reads or writes: a residual, z, a second output.
//   ResNet-32, M = K = 4, batch 512      moved   shared    L2   H200   H100   TFLOP/s, H200 / H100
//   16 to 16 at 32², no tensor more      16 KB      930    800    930  1,330  295 / 205
//     one; two                        24; 32 KB   1,190  1,490  1,860  2,670  195; 145 / 135; 105
//   32 to 32 at 16², no tensor more      32 KB    2,160  1,660  1,860  2,670  505 / 410
//     one; two                        48; 64 KB   2,680  3,040  3,720  5,330  390; 295 / 275; 205
//   32 to 16, gradient, stride 2, z      20 KB      770  1,520  1,160  1,670  90 / 80    a phase; all fetch d
//   64 to 32, gradient, stride 2, z      40 KB    1,700  3,130  2,330  3,330  175 / 165  likewise
//   64 to 16, gradient at 32², z         48 KB    3,480  2,520  2,790  4,000  315 / 275  WRN-28-4's
// A warp issues 750 to 1,480 instructions a tile of 16 channels forward, by what is asked for, 1,150 to 2,300 of 32,
// backward up to 1,400 and 2,500: slots of a scheduler, which has a warp of every consumer, so the last bound.
#pragma once

#include "narrow_plan.h"
#include "wgmma_narrow_epilogue.h"

namespace fed {

template <bool GRADIENT_, int N_>
struct NarrowConv {
  static constexpr bool GRADIENT = GRADIENT_;
  static constexpr int N = N_, BLOCKS = 4;
  using Staging = NarrowEpilogue<WgmmaBlock, GRADIENT, N>;
  static constexpr int BUFFER_BYTES = Staging::BUFFER_BYTES, TABLE_BYTES = Staging::TABLE_BYTES;
  // More consumers hide more of each other's waits, as many as have registers for what is applied on load.
  static constexpr int CONSUMERS = 4 - int(GRADIENT) - int(N == 32), PRODUCER_REGISTERS = 32;
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 4 ? 112 : CONSUMERS == 3 ? 160 : 232;
  static constexpr int MOST_STAGES = 12;
  static constexpr int NUMBERS_OF = GRADIENT ? 3 : 2;  // a channel, where something is applied on load

  // Barriers in shared memory.
  static constexpr int EMPTY = 0, FULL = EMPTY + 8 * MOST_STAGES;  // full: of every consumer and stage
  static constexpr int FETCHED = FULL + 8 * MOST_STAGES * CONSUMERS, WEIGHTS = FETCHED + 8 * CONSUMERS;
  static constexpr int NUMBERS = WEIGHTS + 8;
  static constexpr int BARRIER_BYTES = 1024;
  static_assert(NUMBERS + 8 <= BARRIER_BYTES, "barriers");

  ConvGeometry at;
  NarrowPlan plan;
  ConvSide side[2];

  int blocks() const { return (side[0].groups + side[1].groups) * plan.parts; }
  int shared_bytes() const { return plan.total; }

  template <class Block>
  FED_HD void begin(Block& block) const {
    for (int i = 0; i < plan.stages; ++i) block.init(EMPTY + 8 * i, 4);
    for (int i = 0; i < plan.stages * CONSUMERS; ++i) block.init(FULL + 8 * i, 1);
    for (int i = 0; i < CONSUMERS; ++i) block.init(FETCHED + 8 * i, 1);
    block.init(WEIGHTS, 1);
    block.init(NUMBERS, 4);
    block.initialised();
  }

  // A place in the ring, or among a consumer's barriers, and the parity of this lap.
  struct Turn {
    int stage, parity;
  };
  FED_HD void advance(Turn& turn, int by = 1) const {
    for (turn.stage += by; turn.stage >= plan.stages; turn.stage -= plan.stages) turn.parity ^= 1;
  }
  FED_HD int full(int consumer, const Turn& turn) const { return FULL + 8 * (consumer * plan.stages + turn.stage); }
  FED_HD int stage(const Turn& turn) const { return plan.ring + turn.stage * plan.stage_bytes; }
  FED_HD int box_bytes() const { return plan.positions.count * plan.chunk * 2; }

  // From a tile of a block's to its next: it takes CONSUMERS neighbours, and again so many blocks further on.
  FED_HD int next(int tile) const {
    return tile % CONSUMERS == CONSUMERS - 1 ? 1 + (plan.parts - 1) * CONSUMERS : 1;
  }

  // f(phase) for the phases that have positions; f(step, chunk) for every box of a phase.
  template <class F>
  FED_HD void for_phases(F f) const {
    for (int phase = 0; phase < at.steps.phases; ++phase)
      if (phase_height(at, phase) > 0 && phase_width(at, phase) > 0) f(phase);
  }
  template <class F>
  FED_HD void for_boxes(int phase, F f) const {
    for (int i = at.steps.first_step[phase]; i < at.steps.first_step[phase + 1]; ++i) {
      const ConvStep& step = at.steps.step[i];
      for (int chunk = 0; chunk < plan.chunks[step.source]; ++chunk) f(step, chunk);
    }
  }

  template <class Block>
  FED_HD void produce(Block& block) const {
    const BlockWork work = block_work(block.index, side[0].groups, 1, plan.parts);
    const ConvSide& own = side[work.side];
    const int slot = own.weight_index[work.group];
    block.expect(WEIGHTS, plan.weight_bytes);
    int to = plan.weights;
    for (int source = 0; source < at.sources; ++source)
      for (int tap = 0; tap < (source == 0 ? plan.taps : 1); ++tap)
        for (int chunk = 0; chunk < plan.chunks[source]; ++chunk, to += plan.chunk * N * 2)
          block.load(own.weight[source], to, WEIGHTS, {{0, chunk * plan.chunk, tap, slot, 0}});
    Turn ring{0, 0}, round{0, 0};
    for (int n = work.part * CONSUMERS; n < at.tile.count; n += next(n)) {
      const int consumer = n % CONSUMERS;
      const TileCorner tile = tile_corner(at.tile, n);
      Turn turn = round;
      const auto bring = [&](const TensorMap& map, const Corner& corner) {
        block.wait(EMPTY + 8 * ring.stage, ring.parity ^ 1);
        block.expect(full(consumer, turn), box_bytes());
        block.load(map, stage(ring), full(consumer, turn), corner);
        advance(ring);
        advance(turn);
      };
      for_phases([&](int phase) {
        for_boxes(phase, [&](const ConvStep& step, int chunk) {
          const bool shared = step.source == 0 ? own.in_shared : own.second_shared;
          const Corner corner{{chunk * plan.chunk, tile.column + step.column, tile.image, tile.row + step.row,
                               shared ? 0 : work.group}};
          bring(step.source == 0 ? own.in[step.phase] : own.second, corner);
          if (GRADIENT && step.source == 0 && has_norm(own)) bring(own.norm_z, corner);
        });
      });
      if (consumer == CONSUMERS - 1) round = turn;
    }
  }

  FED_HD static Rows numbers(const ConvSide& own, int which) {
    if (GRADIENT) return which == 0 ? own.norm_a : which == 1 ? own.norm_b : own.norm_c;
    return which == 0 ? own.in_scale : own.in_shift;
  }
  // The first consumer's: what is applied on load, of all channels, where every consumer can read it.
  template <class Block>
  FED_HD void share_numbers(Block& block, const ConvSide& own, int row) const {
    const int padded = plan.chunks[0] * plan.chunk;
    block.each([&](int thread) {
      for (int which = 0; which < NUMBERS_OF; ++which)
        for (int channel = thread; channel < padded; channel += 128)
          block.write(thread, plan.numbers + (which * padded + channel) * 4,
                      channel < at.in_channels[0] ? numbers(own, which).of(row)[channel] : 0.0f);
    });
    block.arrive(NUMBERS);
  }
  template <int ROW, class Block>
  FED_HD void load_numbers(Block& block, int thread, int which, int channel, float (&value)[8]) const {
    const int from = which * plan.chunks[0] * plan.chunk + channel + first_of_eight<ROW>(thread);
FED_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Words words = block.template read<Words>(thread, plan.numbers + (from + 4 * half) * 4);
FED_UNROLL
      for (int i = 0; i < 4; ++i) value[4 * half + i] = bit_cast<float>(words.word[i]);
    }
  }

  // What is applied on load to the box at `box`, of the norm's z at `z`.
  template <int ROW, class Block>
  FED_HD void transform(
      Block& block, const ConvSide& own, int box, int z, TileCorner first, TileCorner end, int channel) const {
    if constexpr (GRADIENT) {
      typename Block::template PerThread<NormGradient> by;
      block.each([&](int thread) {
        load_numbers<ROW>(block, thread, 0, channel, by[thread].d);
        load_numbers<ROW>(block, thread, 1, channel, by[thread].z);
        load_numbers<ROW>(block, thread, 2, channel, by[thread].constant);
      });
      norm_gradient_box<ROW, 1>(block, box, z, plan.positions, first, end, by);
    } else {
      typename Block::template PerThread<Normalisation> by;
      block.each([&](int thread) {
        load_numbers<ROW>(block, thread, 0, channel, by[thread].scale);
        load_numbers<ROW>(block, thread, 1, channel, by[thread].shift);
      });
      normalise_box<ROW, 2>(block, box, plan.positions, first, end, by, own.in_relu);
    }
    block.sync();
  }

  template <class Block>
  FED_HD void consume(Block& block) const {
    using Epilogue = NarrowEpilogue<Block, GRADIENT, N>;
    const BlockWork work = block_work(block.index, side[0].groups, 1, plan.parts);
    const ConvSide& own = side[work.side];
    const int me = block.number, slot = own.weight_index[work.group];
    const bool on_load = GRADIENT ? has_norm(own) : own.in_scale.values != nullptr;
    Epilogue epilogue(block, at, own, plan.images, work.group, slot, plan.buffers + me * BUFFER_BYTES,
                      plan.other_buffers + me * BUFFER_BYTES, plan.tables + me * TABLE_BYTES,
                      FETCHED + 8 * me);
    typename Epilogue::Sums sums;
    Turn ring{0, 0}, turn{0, 0};
    advance(ring, me * plan.boxes);
    if (on_load) {
      if (me == 0) share_numbers(block, own, GRADIENT ? work.group : slot);
      block.wait(NUMBERS, 0);
    }
    block.wait(WEIGHTS, 0);
    for (int n = work.part * CONSUMERS + me; n < at.tile.count; n += CONSUMERS * plan.parts) {
      for_phases([&](int phase) {
        const Inside here = inside(at, n, phase);
        bool begun = false;
        block.each([&](int thread) {
FED_UNROLL
          for (int b = 0; b < BLOCKS; ++b)
FED_UNROLL
            for (int i = 0; i < N / 2; ++i) sums[b][thread].at[i] = 0.0f;
        });
        for_boxes(phase, [&](const ConvStep& step, int chunk) {
          const int box = stage(ring), empty = EMPTY + 8 * ring.stage;
          block.wait(full(me, turn), turn.parity);
          advance(ring);
          advance(turn);
          if (on_load && step.source == 0) {
            int z = 0, empty_z = 0;
            if (GRADIENT) {
              z = stage(ring);
              empty_z = EMPTY + 8 * ring.stage;
              block.wait(full(me, turn), turn.parity);
              advance(ring);
              advance(turn);
            }
            const int s = at.in_stride;
            const TileCorner first{here.corner.column + step.column, here.corner.row + step.row, here.corner.image};
            const TileCorner end{phase_size(at.in_W, s, phase_column(step.phase, s)),
                                 phase_size(at.in_H, s, phase_row(step.phase, s)), at.N};
            const int channel = chunk * plan.chunk;
            plan.chunk == 16   ? transform<32>(block, own, box, z, first, end, channel)
            : plan.chunk == 32 ? transform<64>(block, own, box, z, first, end, channel)
                               : transform<128>(block, own, box, z, first, end, channel);
            if (GRADIENT) block.arrive(empty_z);
          }
          multiply(block, sums, step, chunk, box);
          if (!begun) epilogue.begin(here, phase);
          begun = true;
          block.template complete<0>();
          block.arrive(empty);
        });
        if (!begun) epilogue.begin(here, phase);
        epilogue.finish(sums, here, phase);
      });
      advance(ring, (CONSUMERS - 1) * plan.boxes);
    }
    epilogue.end(work.part * CONSUMERS + me, plan.parts * CONSUMERS);
  }

  // Adds all taps of a step, of a chunk of channels.
  template <class Block>
  FED_HD void multiply(
      Block& block, typename NarrowEpilogue<Block, GRADIENT, N>::Sums& sums, const ConvStep& step, int chunk,
      int box) const {
    const int swizzle = plan.chunk * 2, line = at.steps.columns * swizzle;  // bytes of eight positions and the border's
    const int left = at.in_channels[step.source] - chunk * plan.chunk, depth = left < plan.chunk ? left : plan.chunk;
    const uint64_t a = operand(block.address(box), 0, line, swizzle);
    const uint64_t b = operand(block.address(plan.weights + chunk * plan.chunk * N * 2), 0, 8 * N * 2, N * 2);
FED_ROLLED
    for (int tap = step.first_tap; tap < step.first_tap + step.taps; ++tap) {
      const uint64_t at_tap = moved(a, plan.tap_at[tap]), weight = moved(b, plan.tap_weight[tap]);
FED_ROLLED
      for (int k = 0; k < depth; k += 16) {
        block.fence();
FED_UNROLL
        for (int i = 0; i < BLOCKS; ++i)
          block.template multiply<false, true>(sums[i], moved(at_tap, 2 * k + i * 8 * line), moved(weight, k * N * 2));
        block.commit();  // where the compiler sees what it ends
      }
    }
  }
};

template <class Kernel_>
struct OfKernel {
  using Kernel = Kernel_;
};
// f(OfKernel<the kernel of a launch>())
template <class F>
auto with_narrow(const ConvLaunch& launch, F f) {
  if (launch.gradient)
    return launch.at.channels == 16 ? f(OfKernel<NarrowConv<true, 16>>()) : f(OfKernel<NarrowConv<true, 32>>());
  return launch.at.channels == 16 ? f(OfKernel<NarrowConv<false, 16>>()) : f(OfKernel<NarrowConv<false, 32>>());
}

inline int narrow_statistics_rows(const ConvLaunch& launch) {
  return with_narrow(launch, [&](auto of) {
    using Kernel = typename decltype(of)::Kernel;
    return narrow_plan<Kernel>(launch).parts * Kernel::CONSUMERS;
  });
}

inline const char* narrow_uncovered(const ConvLaunch& launch) {
  const int total = with_narrow(launch, [&](auto of) {
    using Kernel = typename decltype(of)::Kernel;
    return narrow_plan<Kernel>(launch).total;
  });
  return total == 0 ? "more shared memory than there is" : nullptr;
}

inline int launch_narrow(const ConvLaunch& launch, void* stream) {
  return with_narrow(launch, [&](auto of) {
    using Kernel = typename decltype(of)::Kernel;
    Kernel kernel{};
    kernel.at = launch.at;
    kernel.plan = narrow_plan<Kernel>(launch);
    const Chunks chunks{kernel.plan.chunk, Kernel::N, kernel.plan.chunk, Kernel::N};
    for (int i = 0; i < 2; ++i) {
      kernel.side[i] = launch.side[i];
      if (launch.side[i].groups == 0) continue;
      const int status = side_maps(launch.at, launch.tensors[i], chunks, kernel.side[i]);
      if (status != 0) return status;
    }
    return launch_wgmma(kernel, stream);
  });
}

}  // namespace fed

#define FED_NARROW_KERNELS(LAUNCH)    \
  LAUNCH(fed::NarrowConv<false, 16>) \
  LAUNCH(fed::NarrowConv<false, 32>) \
  LAUNCH(fed::NarrowConv<true, 16>)  \
  LAUNCH(fed::NarrowConv<true, 32>)
