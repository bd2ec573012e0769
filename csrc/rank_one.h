// Fold, un-fold, optimiser step and packing of all layers at once; equations in fastensdistill/kernels/rank_one.py.
//
// A block works on one tile of a layer: up to 32 output channels by a range of input channels with all their taps,
// which lies in shared memory. dr sums over output channels and ds over input channels, so tiles leave partial sums, which
// the next launch adds up in a fixed order; the packed weights need every factor updated, so they are a third launch.
// Three launches for all layers together: a grid-wide barrier inside one would cost as much, and no CPU could test it.
#pragma once

#include "block.h"

namespace fed {

constexpr int TILE_THREADS = 256;
constexpr int TILE_O = 32;
constexpr int TILE_I = 32;
constexpr int MAX_LAYERS = 36;  // per launch: the table travels in the kernel's 4 KB of parameters
constexpr int FIELDS = 9;

// Values of a row of the tile: 36 KB of shared memory in float32 and in float64.
template <class A>
constexpr int tile_row = 1152 / int(sizeof(A));

struct Layer {
  int64_t weight, bias, r, s, packed;  // offsets as in LayerOffsets
  int64_t partial_r, partial_s;  // offsets in the workspace
  int Co, Ci, taps, groups;  // Ci: input channels of one group
  int tile_i, first_tile, first_factor;

  FED_HD int group_Co() const { return Co / groups; }
  FED_HD int all_Ci() const { return Ci * groups; }
  FED_HD int tiles_o() const { return (group_Co() + TILE_O - 1) / TILE_O; }
  FED_HD int tiles_i() const { return (Ci + tile_i - 1) / tile_i; }
  FED_HD int tiles() const { return groups * tiles_o() * tiles_i(); }
  FED_HD int factors() const { return all_Ci() + Co; }
  FED_HD int64_t size() const { return int64_t(Co) * Ci * taps; }
};

struct LayerTable {
  int count, tiles, factors;
  bool fits;  // no layer has more taps than a tile's row
  Layer layers[MAX_LAYERS];

  FED_HD const Layer& of_tile(int tile) const {
    int l = 0;
    while (l + 1 < count && layers[l + 1].first_tile <= tile) ++l;
    return layers[l];
  }
  FED_HD const Layer& of_factor(int factor) const {
    int l = 0;
    while (l + 1 < count && layers[l + 1].first_factor <= factor) ++l;
    return layers[l];
  }
};

// Takes layers from the op's integers until the table is full; returns how many integers it took.
template <class A>
inline int64_t fill_table(LayerTable& table, const int64_t* fields, int64_t count, int64_t K, int64_t& workspace) {
  table.count = table.tiles = table.factors = 0;
  table.fits = true;
  int64_t at = 0;
  for (; at < count && table.count < MAX_LAYERS; at += FIELDS) {
    const int64_t* f = fields + at;
    Layer layer{f[0], f[1], f[2], f[3], f[4], 0, 0, int(f[5]), int(f[6]), int(f[7]), int(f[8]), 0, 0, 0};
    const int fitting = tile_row<A> / layer.taps;
    layer.tile_i = fitting < 1 ? 1 : fitting < TILE_I ? fitting : TILE_I;
    table.fits = table.fits && layer.taps <= tile_row<A>;
    layer.first_tile = table.tiles;
    layer.first_factor = table.factors;
    layer.partial_r = workspace;
    workspace += K * layer.tiles_o() * layer.all_Ci();
    layer.partial_s = workspace;
    workspace += K * layer.tiles_i() * layer.Co;
    table.tiles += layer.tiles();
    table.factors += layer.factors();
    table.layers[table.count++] = layer;
  }
  return at;
}

// ---- mathematics

template <class A>
FED_HD A folded_weight(A s_deviation, A weight, A r_deviation) {
  return (A(1) + s_deviation) * weight * (A(1) + r_deviation);
}

// PyTorch's SGD with Nesterov momentum, decay as part of the gradient.
template <class A>
FED_HD void nesterov(A& p, A& v, A g, A learning_rate, A momentum, A weight_decay) {
  g = g + weight_decay * p;
  v = momentum * v + g;
  p = p - learning_rate * (g + momentum * v);
}

// ---- a tile

struct Tile {
  int o, i;  // first output channel of the layer, first input channel of the group
  int count_o, count_i, columns;  // columns = count_i · taps
  int tile_o, tile_i;  // numbers of the tile in its group
  int r;  // first input channel of the layer (group included)

  // Element e of the tile (row-major, `columns` wide) in the layer's weight.
  FED_HD int64_t offset(const Layer& layer, int e) const {
    return (int64_t(o + e / columns) * layer.Ci + i) * layer.taps + e % columns;
  }
};

FED_HD Tile make_tile(const Layer& layer, int tile) {
  const int n = tile - layer.first_tile, per_group = layer.tiles_o() * layer.tiles_i();
  const int group = n / per_group, rest = n % per_group;
  Tile t;
  t.tile_o = rest / layer.tiles_i();
  t.tile_i = rest % layer.tiles_i();
  const int o = t.tile_o * TILE_O;
  t.o = group * layer.group_Co() + o;
  t.i = t.tile_i * layer.tile_i;
  t.r = group * layer.Ci + t.i;
  t.count_o = layer.group_Co() - o < TILE_O ? layer.group_Co() - o : TILE_O;
  t.count_i = layer.Ci - t.i < layer.tile_i ? layer.Ci - t.i : layer.tile_i;
  t.columns = t.count_i * layer.taps;
  return t;
}

template <class A>
struct TileScratch {
  A values[TILE_O][tile_row<A> + 1];  // the odd pitch keeps a walk along output channels off one bank
};

template <class A>
struct RankOneArgs {
  LayerTable table;
  A* parameters;
  A* momentum_buffer;
  A* deviations;  // [K, R]
  A* deviation_buffer;
  const A* branch_gradients;  // [K, ranked]
  const A* plain_gradients;  // [plain]
  const A* learning_rate;  // scalar on the device
  A* out;  // folded [K, ranked], or the un-folded gradient [ranked]
  A* factor_gradients;  // [K, R], un-fold only
  bf16* packed;
  bf16* packed_gradient;
  A* workspace;
  int64_t ranked, plain, R;
  int K, first_slot;
  A momentum, weight_decay;
};

// ---- fold: one block per tile

template <class Block, class A>
FED_HD void fold_body(Block& block, const RankOneArgs<A>& args) {
  const Layer& layer = args.table.of_tile(block.index);
  const Tile tile = make_tile(layer, block.index);
  block.each([&](int thread) {
    for (int e = thread; e < tile.count_o * tile.columns; e += Block::threads) {
      const int64_t at = layer.weight + tile.offset(layer, e);
      const int o = tile.o + e / tile.columns, i = tile.r + e % tile.columns / layer.taps;
      for (int k = 0; k < args.K; ++k) {
        const A* deviations = args.deviations + k * args.R;
        args.out[k * args.ranked + at] =
            folded_weight(deviations[layer.s + o], args.parameters[at], deviations[layer.r + i]);
      }
    }
    if (layer.bias < 0 || tile.i != 0) return;
    for (int e = thread; e < tile.count_o * args.K; e += Block::threads) {
      const int k = e / tile.count_o, o = tile.o + e % tile.count_o;
      args.out[k * args.ranked + layer.bias + o] =
          (A(1) + args.deviations[k * args.R + layer.s + o]) * args.parameters[layer.bias + o];
    }
  });
}

// ---- un-fold, first launch: dW of a tile (written out, or the update of W), partial sums of dr and ds

template <class Block, class A, bool UPDATE>
FED_HD void unfold_body(Block& block, TileScratch<A>& scratch, const RankOneArgs<A>& args) {
  constexpr int STEPS = TILE_O * tile_row<A> / Block::threads;
  constexpr int LANES = Block::threads / TILE_O;  // threads that share a row, or an input channel
  static_assert(TILE_I <= TILE_O && LANES <= 32, "a group of threads for every input channel, inside one warp");
  struct Sums {
    A value[STEPS];
  };
  const Layer& layer = args.table.of_tile(block.index);
  const Tile tile = make_tile(layer, block.index);
  const int count = tile.count_o * tile.columns;
  typename Block::template PerThread<Sums> gradient;
  typename Block::template PerThread<A> row, channel;
  block.each([&](int thread) {
FED_UNROLL
    for (int step = 0; step < STEPS; ++step) gradient[thread].value[step] = 0;
  });
  for (int k = 0; k < args.K; ++k) {
    const A* r = args.deviations + k * args.R + layer.r + tile.r;
    const A* s = args.deviations + k * args.R + layer.s + tile.o;
    const A* dW = args.branch_gradients + k * args.ranked + layer.weight;
    block.phase([&](int thread) {
FED_UNROLL
      for (int step = 0; step < STEPS; ++step) {
        const int e = thread + step * Block::threads;
        if (e >= count) continue;
        const int o = e / tile.columns, j = e % tile.columns;
        const int64_t at = tile.offset(layer, e);
        const A d = dW[at];
        gradient[thread].value[step] += folded_weight(s[o], d, r[j / layer.taps]);
        scratch.values[o][j] = args.parameters[layer.weight + at] * d;
      }
    });
    block.each([&](int thread) {
      const int o = thread / LANES, lane = thread % LANES, i = o;
      A sum = 0;
      if (o < tile.count_o)
        for (int j = lane; j < tile.columns; j += LANES) sum += (A(1) + r[j / layer.taps]) * scratch.values[o][j];
      row[thread] = sum;
      sum = 0;
      if (i < tile.count_i)
        for (int from = lane; from < tile.count_o; from += LANES)
          for (int t = 0; t < layer.taps; ++t) sum += (A(1) + s[from]) * scratch.values[from][i * layer.taps + t];
      channel[thread] = sum;
    });
    reduce_neighbours<LANES, Block, A>(block, row, Sum());
    reduce_neighbours<LANES, Block, A>(block, channel, Sum());
    block.phase([&](int thread) {
      const int n = thread / LANES;
      if (thread % LANES != 0) return;
      A* partial_s = args.workspace + layer.partial_s + (int64_t(tile.tile_i) * args.K + k) * layer.Co;
      A* partial_r = args.workspace + layer.partial_r + (int64_t(tile.tile_o) * args.K + k) * layer.all_Ci();
      if (n < tile.count_o) partial_s[tile.o + n] = row[thread];
      if (n < tile.count_i) partial_r[tile.r + n] = channel[thread];
    });
  }
  block.each([&](int thread) {
FED_UNROLL
    for (int step = 0; step < STEPS; ++step) {
      const int e = thread + step * Block::threads;
      if (e >= count) continue;
      const int64_t at = layer.weight + tile.offset(layer, e);
      const A g = gradient[thread].value[step];
      if constexpr (UPDATE)
        nesterov(args.parameters[at], args.momentum_buffer[at], g, *args.learning_rate, args.momentum,
                 args.weight_decay);
      else
        args.out[at] = g;
    }
  });
}

// ---- un-fold, second launch: one thread per factor (all branches) and per plain parameter

template <class Block, class A, bool UPDATE>
FED_HD void factor_body(Block& block, const RankOneArgs<A>& args) {
  block.each([&](int thread) {
    const int64_t n = int64_t(block.index) * Block::threads + thread;
    if (n >= args.table.factors) {
      const int64_t plain = n - args.table.factors;
      if constexpr (UPDATE) {
        if (plain < args.plain)
          nesterov(args.parameters[args.ranked + plain], args.momentum_buffer[args.ranked + plain],
                   args.plain_gradients[plain], *args.learning_rate, args.momentum, args.weight_decay);
      }
      return;
    }
    const Layer& layer = args.table.of_factor(int(n));
    const int local = int(n) - layer.first_factor;
    const bool is_r = local < layer.all_Ci();
    const int channel = is_r ? local : local - layer.all_Ci(), width = is_r ? layer.all_Ci() : layer.Co;
    const int tiles = is_r ? layer.tiles_o() : layer.tiles_i();
    const A* partial = args.workspace + (is_r ? layer.partial_r : layer.partial_s) + channel;
    const bool has_bias = !is_r && layer.bias >= 0;
    const A b = has_bias ? args.parameters[layer.bias + channel] : A(0);
    A db = 0;
    for (int k = 0; k < args.K; ++k) {
      const int64_t at = k * args.R + (is_r ? layer.r : layer.s) + channel;
      A g = 0;
      for (int tile = 0; tile < tiles; ++tile) g += partial[(int64_t(tile) * args.K + k) * width];
      if (has_bias) {
        const A db_k = args.branch_gradients[k * args.ranked + layer.bias + channel];
        db += (A(1) + args.deviations[at]) * db_k;
        g += b * db_k;
      }
      if constexpr (UPDATE)
        nesterov(args.deviations[at], args.deviation_buffer[at], g, A(args.K) * *args.learning_rate, args.momentum,
                 args.weight_decay / A(args.K));
      else
        args.factor_gradients[at] = g;
    }
    if (!has_bias) return;
    if constexpr (UPDATE)
      nesterov(args.parameters[layer.bias + channel], args.momentum_buffer[layer.bias + channel], db,
               *args.learning_rate, args.momentum, args.weight_decay);
    else
      args.out[layer.bias + channel] = db;
  });
}

// ---- pack: one block per tile; the tile is read along taps and written along output, then along input channels

template <class Block, class A>
FED_HD void pack_body(Block& block, TileScratch<A>& scratch, const RankOneArgs<A>& args) {
  const Layer& layer = args.table.of_tile(block.index);
  const Tile tile = make_tile(layer, block.index);
  const int count = tile.count_o * tile.columns;
  block.phase([&](int thread) {
    for (int e = thread; e < count; e += Block::threads)
      scratch.values[e / tile.columns][e % tile.columns] = args.parameters[layer.weight + tile.offset(layer, e)];
  });
  const int first_o = tile.tile_o * TILE_O;  // inside the group
  for (int k = 0; k < args.K; ++k) {
    const A* r = args.deviations + k * args.R + layer.r + tile.r;
    const A* s = args.deviations + k * args.R + layer.s + tile.o;
    const int64_t slot = layer.packed + (args.first_slot + k) * layer.size();
    block.each([&](int thread) {
      for (int e = thread; e < count; e += Block::threads) {
        const int o = e % tile.count_o, i = e / tile.count_o % tile.count_i, t = e / (tile.count_o * tile.count_i);
        const A value = folded_weight(s[o], scratch.values[o][i * layer.taps + t], r[i]);
        const int64_t at = (int64_t(t) * layer.Ci + tile.i + i) * layer.Co + tile.o + o;
        args.packed[slot + at] = narrow<bf16>(float(value));
      }
      for (int e = thread; e < count; e += Block::threads) {
        const int i = e % tile.count_i, o = e / tile.count_i % tile.count_o, t = e / (tile.count_o * tile.count_i);
        const A value = folded_weight(s[o], scratch.values[o][i * layer.taps + t], r[i]);
        const int64_t row = int64_t(layer.taps - 1 - t) * layer.group_Co() + first_o + o;
        args.packed_gradient[slot + row * layer.all_Ci() + tile.r + i] = narrow<bf16>(float(value));
      }
    });
  }
}

// ---- grid of the factor kernel, and the CUDA launchers: 0 or the CUDA error of the launch

template <class A>
inline unsigned factor_grid(const RankOneArgs<A>& args) {
  return unsigned((args.table.factors + args.plain + TILE_THREADS - 1) / TILE_THREADS);
}

template <class A>
int launch_fold(const RankOneArgs<A>& args, void* stream);
template <class A>
int launch_unfold(const RankOneArgs<A>& args, bool update, void* stream);
template <class A>
int launch_pack(const RankOneArgs<A>& args, void* stream);

}  // namespace fed
