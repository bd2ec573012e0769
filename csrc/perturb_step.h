// The normalised ascent step on the images; equations in fastensdistill/kernels/perturb_step.py. One block per image.
#pragma once

#include "block.h"

namespace fed {

template <class A>
FED_HD A clip(A value, A low, A high) {  // NaN stays NaN
  return value < low ? low : value > high ? high : value;
}

template <class T, class G>
struct Step {
  using A = typename Arithmetic<T>::type;
  static constexpr int THREADS = 512, BLOCKS = sizeof(T) == 8 ? 2 : 3;
  struct Scratch {
    A values[THREADS / 32];
  };
  const T* images;  // [B, D], D values in the memory order of the image
  const G* gradients;  // [groups, B, D], the same order
  const A* confidence;  // [B] or nullptr
  T* out;  // [B, D]
  int64_t groups, B, D;
  int64_t group_stride, image_stride;  // of the gradients
  A step, low, high;

  unsigned grid() const { return unsigned(B); }

  template <class Block>
  FED_HD void run(Block& block, Scratch& scratch) const {
    const int64_t image = block.index, base = image * D;
    const auto summed = [&](int64_t d) {
      const G* p = gradients + image * image_stride + d;
      A sum = widen(p[0]);
      for (int64_t g = 1; g < groups; ++g) sum += widen(p[g * group_stride]);
      return sum;
    };
    const A largest = reduce(block, scratch.values, Max(), [&](int thread) {
      A value = 0;
      for (int64_t d = thread; d < D; d += Block::threads) {
        const A g = summed(d);
        value = Max()(g < 0 ? -g : g, value);
      }
      return value;
    });
    const A peak = largest == A(0) ? A(1) : largest;
    const A square = reduce(block, scratch.values, Sum(), [&](int thread) {
      A value = 0;
      for (int64_t d = thread; d < D; d += Block::threads) {
        const A g = summed(d) / peak;
        value += g * g;
      }
      return value;
    });
    // A NaN among zeros leaves the largest at zero but not the square.
    const bool still = square == A(0);
    // Step along one value of g: its share of g / ‖g‖ is (g/peak) / ‖g/peak‖, peak the largest |g|.
    const A length = step / square_root(square) * (confidence ? confidence[image] : A(1));
    block.each([&](int thread) {
      for (int64_t d = thread; d < D; d += Block::threads) {
        const A moved = widen(images[base + d]) + summed(d) / peak * length;
        out[base + d] = still ? images[base + d] : narrow<T>(clip(moved, low, high));
      }
    });
  }
};

#define FED_STEP_KERNELS(X)                                                                                    \
  X(fed::Step<double, double>) X(fed::Step<float, float>) X(fed::Step<float, fed::bf16>)                       \
  X(fed::Step<float, fed::half>) X(fed::Step<fed::bf16, float>) X(fed::Step<fed::bf16, fed::bf16>)             \
  X(fed::Step<fed::bf16, fed::half>) X(fed::Step<fed::half, float>) X(fed::Step<fed::half, fed::bf16>)         \
  X(fed::Step<fed::half, fed::half>)

}  // namespace fed
