// Weight gradient of a grouped convolution by wgmma, in bf16 with float32 results; equations in
// fastensdistill/kernels/conv_weight_gradient.py, how it is cut in csrc/weight_gradient_cut.h.
//
// A block has some channels of x and some of d, a group and its share of the tiles, and keeps the gradients of all its
// taps in accumulators. The copy engine brings tile after tile into a ring of stages; of a stage every consumer
// multiplies all positions, then frees it. Results are partial ones, [splits · parts, G, taps, Ci, Co]: whoever wants
// the gradient adds them up, in that order.
//
// ON_LOAD: the producer's warpgroup replaces x by relu(scale · x + shift) and d by a · d + b · z + c where they lie, in
// float32, rounded once, before anything is multiplied. Positions outside stay zero: padding comes after both. (A
// warpgroup of its own would leave a thread 96 registers, and 96 accumulators with what they need do not fit.)
#pragma once

#include "halo_epilogue.h"
#include "weight_gradient_cut.h"
#include "wgmma_block.h"
#include "wgmma_transform.h"

namespace fed {

struct WeightGradientArgs {
  const bf16* x;  // [G or 1, N, H, W, Ci]
  const bf16* d;  // [G, N, Ho, Wo, Co]
  const bf16* norm_z;  // like d, or nullptr
  int x_groups;
  WeightGradientSizes sizes;
  int multiprocessors;
  Rows in_scale, in_shift;  // [G or 1, Ci], or nullptr
  bool in_relu;
  Rows norm_a, norm_b, norm_c;  // [G or 1, Co]
  float* partial;  // [splits · parts, G, taps, Ci, Co], 8-byte aligned
};

// What a block works for.
struct WeightGradientShare {
  int split, row, group, in_channel, out_channel;  // row of taps; first channels
};

// WIDTH: channels of a window of d.
template <int WIDTH, bool ON_LOAD>
struct WgmmaWeightGradient {
  static constexpr int N = GRADIENT_WINDOWS * WIDTH, CONSUMERS = 3;
  static constexpr bool PREPARES = ON_LOAD;
  static constexpr int PRODUCER_REGISTERS = ON_LOAD ? 104 : 32, CONSUMER_REGISTERS = ON_LOAD ? 136 : 152;

  WeightGradientArgs args;
  WeightGradientCut cut;
  TensorMap x[4];  // by phase
  TensorMap d, norm_z;

  FED_HD int blocks() const { return args.sizes.G * cut.splits * fed::blocks(cut); }
  FED_HD int shared_bytes() const { return barrier(3, 0); }

  // Offsets in shared memory. Barriers: of stages that are full, empty, ready for multiplication.
  FED_HD int stage_offset(int stage) const { return stage * cut.stage_bytes; }
  FED_HD int barrier(int which, int stage) const {
    return cut.stages * cut.stage_bytes + 8 * (which * cut.stages + stage);
  }
  FED_HD int full(int stage) const { return barrier(0, stage); }
  FED_HD int empty(int stage) const { return barrier(1, stage); }
  FED_HD int ready(int stage) const { return barrier(ON_LOAD ? 2 : 0, stage); }

  FED_HD WeightGradientShare share(int index) const {
    int rest = index / cut.d.blocks;
    const int out = index - rest * cut.d.blocks, in = rest % cut.x.blocks;
    rest /= cut.x.blocks;
    const int row = rest % cut.rows;
    rest /= cut.rows;
    return {rest % cut.splits, row, rest / cut.splits, in * in_step() * cut.x.width, out * out_step() * WIDTH};
  }
  // Chunks of channels of a block.
  FED_HD int in_step() const { return args.sizes.kernel == 3 ? 1 : cut.x.windows; }
  FED_HD int out_step() const { return shifted() ? 1 : cut.d.windows; }
  FED_HD bool shifted() const { return args.sizes.kernel == 3 && cut.rows == 1; }  // d's windows are rows of taps

  template <class Block>
  FED_HD void begin(Block& block) const {
    for (int stage = 0; stage < cut.stages; ++stage) {
      block.init(full(stage), 1);
      block.init(empty(stage), 4 * consumers(cut));
      if (ON_LOAD) block.init(ready(stage), 4);
    }
    block.initialised();
  }

  // Where in the ring one is: tile after tile a stage further, and once around the other parity.
  struct Turn {
    int stage, parity;
    FED_HD void next(int stages) {
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  };

  template <class Block>
  FED_HD void load(Block& block, const WeightGradientShare& mine, int tile, Turn turn) const {
    const TileCorner at = tile_corner(cut.tile, tile);
    const int stage = stage_offset(turn.stage), arrived = full(turn.stage), tensors = args.norm_z != nullptr ? 2 : 1;
    block.wait(empty(turn.stage), turn.parity ^ 1);
    block.expect(arrived, cut.x.boxes * cut.x.bytes + tensors * cut.d.boxes * cut.d.bytes);
    for (int i = 0; i < cut.x.boxes; ++i) {
      const GradientBox& box = cut.box[mine.row][i];
      block.load(x[box.map], stage + i * cut.x.distance, arrived,
                 {{mine.in_channel + box.channel, at.column + box.column, at.image, at.row + box.row,
                   args.x_groups == 1 ? 0 : mine.group}});
    }
    for (int i = 0; i < cut.d.boxes; ++i) {
      const Corner corner{{mine.out_channel + i * WIDTH, at.column, at.image, at.row - cut.border / 2, mine.group}};
      block.load(d, stage + cut.d.offset + i * cut.d.distance, arrived, corner);
      if (tensors == 2) block.load(norm_z, stage + cut.norm_offset + i * cut.d.distance, arrived, corner);
    }
  }

  template <class Block>
  FED_HD void produce(Block& block) const {
    const WeightGradientShare mine = share(block.index);
    Turn turn{0, 0};
    for (int tile = mine.split; tile < cut.tile.count; tile += cut.splits, turn.next(cut.stages))
      load(block, mine, tile, turn);
  }

  // Loads and transforms. A stage is loaded again once the tile after its own is ready: what has just been transformed
  // keeps the consumers busy while the next tile, which has come by then if there are three stages, is transformed.
  template <class Block>
  FED_HD void prepare(Block& block) const {
    const WeightGradientShare mine = share(block.index);
    Turn turn{0, 0}, next{0, 0};
    int loaded = mine.split;
    const auto load_next = [&] {
      if (loaded >= cut.tile.count) return;
      block.each([&](int thread) {
        if (thread == 0) load(block, mine, loaded, next);
      });
      loaded += cut.splits;
      next.next(cut.stages);
    };
    for (int stage = 0; stage < cut.stages - 1; ++stage) load_next();
    for (int tile = mine.split; tile < cut.tile.count; tile += cut.splits, turn.next(cut.stages)) {
      block.wait(full(turn.stage), turn.parity);
      transform(block, mine, tile_corner(cut.tile, tile), stage_offset(turn.stage));  // and publishes
      block.arrive(ready(turn.stage));
      load_next();
    }
  }

  template <class Block>
  FED_HD void consume(Block& block) const {
    multiply(block);
  }

  template <class Block>
  FED_HD void multiply(Block& block) const {
    const WeightGradientShare mine = share(block.index);
    const bool alone = cut.parts == 1;  // at the steps of its product
    const int product = alone ? block.number : 0, first_step = alone ? 0 : block.number;
    if (block.number >= consumers(cut)) return;
    const int first_window = product * (64 / cut.x.width);
    // Bytes from two lines to the next, and to this consumer's next step
    const int in_pair = 2 * cut.x.columns * row_bytes(cut.x), out_pair = 2 * TILE_COLUMNS * 2 * WIDTH;
    const int in_step = 2 * cut.parts * in_pair, out_step = 2 * cut.parts * out_pair, count = steps(cut);
    const uint64_t x_first = operand(block.address(first_window * cut.x.leading + 2 * first_step * in_pair),
                                     cut.x.leading, in_pair / 2, row_bytes(cut.x));
    const uint64_t d_first = operand(block.address(cut.d.offset + 2 * first_step * out_pair), cut.d.leading,
                                     out_pair / 2, 2 * WIDTH);
    typename Block::template PerThread<Accumulator<N>> sum;
    Turn turn{0, 0};
    uint64_t a = 0, b = 0;
    const auto begin_tile = [&] {
      block.wait(ready(turn.stage), turn.parity);
      a = moved(x_first, stage_offset(turn.stage));
      b = moved(d_first, stage_offset(turn.stage));
    };
    const auto multiply_step = [&](bool add) {
      block.fence();
      block.template multiply<true, true>(sum, a, b, add);
      block.template multiply<true, true>(sum, moved(a, in_pair), moved(b, out_pair));
      block.commit();
      a = moved(a, in_step);
      b = moved(b, out_step);
    };
    const auto multiply_rest = [&] {
      FED_ROLLED
      for (int step = first_step + cut.parts; step < count; step += cut.parts) {
        multiply_step(true);
        block.template complete<1>();
      }
    };
    begin_tile();
    multiply_step(false);
    multiply_rest();
    FED_ROLLED
    for (int tile = mine.split + cut.splits; tile < cut.tile.count; tile += cut.splits) {
      const int before = turn.stage;
      turn.next(cut.stages);
      begin_tile();
      multiply_step(true);
      block.template complete<1>();
      block.arrive(empty(before));  // the tile before is multiplied
      multiply_rest();
    }
    block.template complete<0>();
    store(block, mine, sum, first_window, first_step);
  }

  // Of the taps in a row, the columns are windows of x; its rows windows of d, from the last on.
  template <class Block>
  FED_HD void store(Block& block, const WeightGradientShare& mine,
                    typename Block::template PerThread<Accumulator<N>>& sum, int first_window, int part) const {
    struct alignas(8) Pair {
      float first, second;
    };
    const int Ci = args.sizes.Ci, Co = args.sizes.Co, square = args.sizes.kernel == 3;
    const int64_t tap = int64_t(Ci) * Co;
    float* gradient = args.partial + (int64_t(mine.split * cut.parts + part) * args.sizes.G + mine.group) *
                                         (args.sizes.kernel * args.sizes.kernel) * tap;
    gradient += (shifted() ? 2 : mine.row) * args.sizes.kernel * tap;
    block.each([&](int thread) {
FED_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int m = thread / 32 * 16 + accumulator_row(thread % 32) + 8 * half;
        const int window = first_window + m / cut.x.width;
        const int in = mine.in_channel + m % cut.x.width + (square ? 0 : window * cut.x.width);
        if (window >= cut.x.windows || in >= Ci) continue;
        float* row = gradient + (square ? window * tap : 0) + int64_t(in) * Co;
FED_UNROLL
        for (int j = 0; j < N / 8; ++j) {
          const int other = 8 * j / WIDTH, column = 8 * j % WIDTH + accumulator_column(thread % 32);
          const int out = mine.out_channel + column + (shifted() ? 0 : other * WIDTH);
          if (other >= cut.d.windows || out >= Co) continue;
          *reinterpret_cast<Pair*>(row - (shifted() ? 3 * other * tap : 0) + out) = {
              sum[thread].at[4 * j + 2 * half], sum[thread].at[4 * j + 2 * half + 1]};
        }
      }
    });
  }

  template <int ROW, class Block>
  FED_HD void normalise(Block& block, const WeightGradientShare& mine, TileCorner at, int stage) const {
    const WeightGradientSizes& sizes = args.sizes;
    for (int i = 0; i < cut.x.boxes; ++i) {
      const GradientBox& box = cut.box[mine.row][i];
      typename Block::template PerThread<Normalisation> by;
      block.each([&](int thread) {
        Normalisation& n = by[thread];
FED_UNROLL
        for (int j = 0; j < 8; ++j) n.scale[j] = 1.0f, n.shift[j] = 0.0f;
        if (args.in_scale.values == nullptr) return;
        load_channels<ROW>(args.in_scale, mine.group, mine.in_channel + box.channel, sizes.Ci, thread, n.scale);
        load_channels<ROW>(args.in_shift, mine.group, mine.in_channel + box.channel, sizes.Ci, thread, n.shift);
      });
      const TileCorner end{phase_size(sizes.W, sizes.stride, box.map % sizes.stride),
                           phase_size(sizes.H, sizes.stride, box.map / sizes.stride), sizes.N};
      normalise_box<ROW>(block, stage + i * cut.x.distance, positions(cut.x),
                         {at.column + box.column, at.row + box.row, at.image}, end, by, args.in_relu);
    }
  }

  FED_HD BoxPositions positions(const GradientOperand& operand) const {
    return {operand.lines * operand.columns, divisor(operand.columns), divisor(cut.tile.images)};
  }

  template <class Block>
  FED_HD void transform(Block& block, const WeightGradientShare& mine, TileCorner at, int stage) const {
    const WeightGradientSizes& sizes = args.sizes;
    if (args.in_relu || args.in_scale.values != nullptr) {
      if (cut.x.width == 16) {
        normalise<32>(block, mine, at, stage);
      } else if (cut.x.width == 32) {
        normalise<64>(block, mine, at, stage);
      } else {
        normalise<128>(block, mine, at, stage);
      }
    }
    if (args.norm_z == nullptr) return;
    for (int i = 0; i < cut.d.boxes; ++i) {
      typename Block::template PerThread<NormGradient> by;
      block.each([&](int thread) {
        NormGradient& n = by[thread];
        const int first = mine.out_channel + i * WIDTH;
        load_channels<2 * WIDTH>(args.norm_a, mine.group, first, sizes.Co, thread, n.d);
        load_channels<2 * WIDTH>(args.norm_b, mine.group, first, sizes.Co, thread, n.z);
        load_channels<2 * WIDTH>(args.norm_c, mine.group, first, sizes.Co, thread, n.constant);
      });
      const TileCorner end{phase_size(sizes.W, sizes.stride, 0), phase_size(sizes.H, sizes.stride, 0), sizes.N};
      const int offset = i * cut.d.distance;
      norm_gradient_box<2 * WIDTH>(block, stage + cut.d.offset + offset, stage + cut.norm_offset + offset,
                                   positions(cut.d), {at.column, at.row - cut.border / 2, at.image}, end, by);
    }
  }
};

// The boxes of one phase of a tensor [groups, N, H, W, C].
inline Boxes weight_gradient_boxes(const bf16* from, int groups, int N, int H, int W, int C, int stride, int phase,
                                   const GradientOperand& operand, int images) {
  const int row = phase / stride, column = phase % stride;
  const int64_t pixel = 2 * int64_t(C);
  Boxes boxes{};
  boxes.base = from + (int64_t(row) * W + column) * C;
  const int64_t size[5] = {C, phase_size(W, stride, column), N, phase_size(H, stride, row), groups};
  const int64_t step[4] = {stride * pixel, int64_t(H) * W * pixel, stride * W * pixel, int64_t(N) * H * W * pixel};
  const int extent[5] = {operand.width, operand.columns, images, operand.lines / images, 1};
  std::copy(size, size + 5, boxes.size);
  std::copy(step, step + 4, boxes.stride);
  std::copy(extent, extent + 5, boxes.extent);
  boxes.swizzle = row_bytes(operand);
  return boxes;
}

template <int WIDTH, bool ON_LOAD>
int launch_weight_gradient(const WeightGradientArgs& args, const WeightGradientCut& cut, void* stream) {
  const WeightGradientSizes& s = args.sizes;
  const int images = cut.tile.images, height = phase_size(s.H, s.stride, 0), width = phase_size(s.W, s.stride, 0);
  WgmmaWeightGradient<WIDTH, ON_LOAD> kernel{args, cut, {}, {}, {}};
  int status = make_map(weight_gradient_boxes(args.d, s.G, s.N, height, width, s.Co, 1, 0, cut.d, images), kernel.d);
  if (status == 0 && args.norm_z != nullptr)
    status = make_map(weight_gradient_boxes(args.norm_z, s.G, s.N, height, width, s.Co, 1, 0, cut.d, images),
                      kernel.norm_z);
  bool made[4] = {};
  for (int row = 0; row < cut.rows; ++row)
    for (int i = 0; i < cut.x.boxes; ++i) {
      const int phase = cut.box[row][i].map;
      if (status != 0 || made[phase]) continue;
      made[phase] = true;
      status = make_map(
          weight_gradient_boxes(args.x, args.x_groups, s.N, s.H, s.W, s.Ci, s.stride, phase, cut.x, images),
          kernel.x[phase]);
    }
  return status != 0 ? status : launch_wgmma(kernel, stream);
}

// Puts it on a stream; 0 or the CUDA error.
inline int launch_weight_gradient(const WeightGradientArgs& args, void* stream) {
  const WeightGradientCut cut = weight_gradient_cut(args.sizes, args.multiprocessors);
  const bool on_load = args.in_relu || args.in_scale.values != nullptr || args.norm_z != nullptr;
  switch (cut.d.width) {
    case 16:
      return (on_load ? launch_weight_gradient<16, true> : launch_weight_gradient<16, false>)(args, cut, stream);
    case 32:
      return (on_load ? launch_weight_gradient<32, true> : launch_weight_gradient<32, false>)(args, cut, stream);
    default:
      return (on_load ? launch_weight_gradient<64, true> : launch_weight_gradient<64, false>)(args, cut, stream);
  }
}

#define FED_WEIGHT_GRADIENT_KERNELS(f) \
  f(fed::WgmmaWeightGradient<16, false>) \
  f(fed::WgmmaWeightGradient<32, false>) \
  f(fed::WgmmaWeightGradient<64, false>) \
  f(fed::WgmmaWeightGradient<16, true>) \
  f(fed::WgmmaWeightGradient<32, true>) \
  f(fed::WgmmaWeightGradient<64, true>)

}  // namespace fed
