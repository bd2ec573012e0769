// What csrc/wgmma_transform.h applies to a box, on memory that test_wgmma_transform.py fills and looks at.
#include "wgmma_transform.h"

using namespace fed;

namespace {

// A warpgroup, thread by thread.
struct OneByOne {
  template <class V>
  struct PerThread {
    V value[128];
    V& operator[](int thread) { return value[thread]; }
  };
  char* shared;
  int* published;
  template <class V>
  V read(int, int offset) const {
    return *reinterpret_cast<const V*>(shared + offset);
  }
  template <class V>
  void write(int, int offset, const V& value) const {
    *reinterpret_cast<V*>(shared + offset) = value;
  }
  template <class F>
  void each(F f) const {
    for (int thread = 0; thread < 128; ++thread) f(thread);
  }
  void publish() const { ++*published; }
};

template <int ROW>
void transform(OneByOne& block, const BoxPositions& positions, const int* n, const float* const* rows) {
  const TileCorner first{n[2], n[3], n[4]}, end{n[5], n[6], n[7]};
  const int slot = n[8], channel = n[9], channels = n[10];
  const auto load = [&](int which, int thread, float(&value)[8]) {
    load_channels<ROW>({rows[which], channels}, slot, channel, channels, thread, value);
  };
  if (rows[2] == nullptr) {
    OneByOne::PerThread<Normalisation> by;
    block.each([&](int thread) {
      load(0, thread, by[thread].scale);
      load(1, thread, by[thread].shift);
    });
    normalise_box<ROW>(block, n[0], positions, first, end, by, n[11] != 0);
  } else {
    OneByOne::PerThread<NormGradient> by;
    block.each([&](int thread) {
      load(0, thread, by[thread].d);
      load(1, thread, by[thread].z);
      load(2, thread, by[thread].constant);
    });
    norm_gradient_box<ROW>(block, n[0], n[1], positions, first, end, by);
  }
}

}  // namespace

// lines, columns and images of a box; n: its offset and that of z's, where it begins and where positions end, the row
// of `rows`, the first channel and how many there are, whether a ReLU follows. Returns how often it was published.
extern "C" int transform_box(
    int row, char* shared, int lines, int columns, int images, const int* n, const float* const* rows) {
  int published = 0;
  OneByOne block{shared, &published};
  const BoxPositions positions{lines * columns, divisor(columns), divisor(images)};
  row == 32 ? transform<32>(block, positions, n, rows)
  : row == 64 ? transform<64>(block, positions, n, rows)
              : transform<128>(block, positions, n, rows);
  return published;
}
