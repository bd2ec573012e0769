// bf16 weights of all layers of K branches at once; equations in fastensdistill/kernels/pack.py.
//
// A block works on one tile of a layer: up to 32 output channels by a range of input channels with all their taps,
// which lies in shared memory: it is read along taps and written along output, then along input channels.
#pragma once

#include "block.h"

namespace fed {

constexpr int TILE_O = 32;
constexpr int TILE_I = 32;
constexpr int MAX_LAYERS = 64;  // per launch: the table travels in the kernel's 4 KB of parameters
constexpr int FIELDS = 9;

// Values of a row of the tile: 36 KB of shared memory in float32 and in float64.
template <class A>
constexpr int tile_row = 1152 / int(sizeof(A));

struct Layer {
  int64_t weight, r, s, packed;  // offsets
  int Co, Ci, taps;
  int tile_i, first_tile;

  FED_HD int tiles_o() const { return (Co + TILE_O - 1) / TILE_O; }
  FED_HD int tiles_i() const { return (Ci + tile_i - 1) / tile_i; }
  FED_HD int tiles() const { return tiles_o() * tiles_i(); }
  FED_HD int64_t size() const { return int64_t(Co) * Ci * taps; }
};

struct LayerTable {
  int count, tiles;
  Layer layers[MAX_LAYERS];

  FED_HD const Layer& of_tile(int tile) const {
    int l = 0;
    while (l + 1 < count && layers[l + 1].first_tile <= tile) ++l;
    return layers[l];
  }
};

// Takes layers from the op's integers until the table is full; returns how many integers it took.
template <class A>
inline int64_t fill_table(LayerTable& table, const int64_t* fields, int64_t count) {
  table.count = table.tiles = 0;
  int64_t at = 0;
  for (; at < count && table.count < MAX_LAYERS; at += FIELDS) {
    const int64_t* f = fields + at;  // weight, bias, r, s, packed, Co, Ci, taps, positions
    Layer layer{f[0], f[2], f[3], f[4], int(f[5]), int(f[6]), int(f[7]), 0, table.tiles};
    const int fitting = tile_row<A> / layer.taps;
    layer.tile_i = fitting < 1 ? 1 : fitting < TILE_I ? fitting : TILE_I;
    table.tiles += layer.tiles();
    table.layers[table.count++] = layer;
  }
  return at;
}

struct Tile {
  int o, i;  // first output channel, first input channel
  int count_o, count_i, columns;  // columns = count_i · taps

  // Element e of the tile (row-major, `columns` wide) in the layer's weight.
  FED_HD int64_t offset(const Layer& layer, int e) const {
    return (int64_t(o + e / columns) * layer.Ci + i) * layer.taps + e % columns;
  }
};

FED_HD Tile make_tile(const Layer& layer, int tile) {
  const int n = tile - layer.first_tile;
  Tile t;
  t.o = n / layer.tiles_i() * TILE_O;
  t.i = n % layer.tiles_i() * layer.tile_i;
  t.count_o = layer.Co - t.o < TILE_O ? layer.Co - t.o : TILE_O;
  t.count_i = layer.Ci - t.i < layer.tile_i ? layer.Ci - t.i : layer.tile_i;
  t.columns = t.count_i * layer.taps;
  return t;
}

// One block per tile of the table's layers.
template <class A>
struct Pack {
  static constexpr int THREADS = 256, BLOCKS = 3;
  struct Scratch {
    A values[TILE_O][tile_row<A> + 1];  // the odd pitch keeps a walk along output channels off one bank
  };
  LayerTable table;
  const A* parameters;
  const A* deviations;  // [K, R]
  bf16* packed;
  bf16* packed_gradient;
  int64_t R;
  int K, first_slot;

  unsigned grid() const { return unsigned(table.tiles); }

  template <class Block>
  FED_HD void run(Block& block, Scratch& scratch) const {
    const Layer& layer = table.of_tile(block.index);
    const Tile tile = make_tile(layer, block.index);
    const int count = tile.count_o * tile.columns;
    block.phase([&](int thread) {
      for (int e = thread; e < count; e += Block::threads)
        scratch.values[e / tile.columns][e % tile.columns] = parameters[layer.weight + tile.offset(layer, e)];
    });
    for (int k = 0; k < K; ++k) {
      const A* r = deviations + k * R + layer.r + tile.i;
      const A* s = deviations + k * R + layer.s + tile.o;
      const int64_t slot = layer.packed + (first_slot + k) * layer.size();
      const auto folded = [&](int o, int i, int t) {
        return narrow<bf16>(float((A(1) + s[o]) * scratch.values[o][i * layer.taps + t] * (A(1) + r[i])));
      };
      block.each([&](int thread) {
        for (int e = thread; e < count; e += Block::threads) {
          const int o = e % tile.count_o, i = e / tile.count_o % tile.count_i, t = e / (tile.count_o * tile.count_i);
          const int64_t row = int64_t(t) * layer.Ci + tile.i + i;
          packed[slot + row * layer.Co + tile.o + o] = folded(o, i, t);
        }
        for (int e = thread; e < count; e += Block::threads) {
          const int i = e % tile.count_i, o = e / tile.count_i % tile.count_o, t = e / (tile.count_o * tile.count_i);
          const int64_t row = int64_t(layer.taps - 1 - t) * layer.Co + tile.o + o;
          packed_gradient[slot + row * layer.Ci + tile.i + i] = folded(o, i, t);
        }
      });
    }
  }
};

#define FED_PACK_KERNELS(X) X(fed::Pack<float>) X(fed::Pack<double>)

}  // namespace fed
