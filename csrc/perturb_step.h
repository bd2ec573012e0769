// The normalised ascent step on the images; equations in fastensdistill/kernels/perturb_step.py. One block per image.
#pragma once

#include "block.h"

namespace fed {

constexpr int STEP_THREADS = 512;

template <class T, class G>
struct StepArgs {
  using A = typename Arithmetic<T>::type;
  const T* images;  // [B, D], D values in the memory order of the image
  const G* gradients;  // [groups, B, D], the same order
  const A* confidence;  // [B] or nullptr
  T* out;  // [B, D]
  int64_t groups, B, D;
  int64_t group_stride, image_stride;  // of the gradients
  A step, low, high;
};

// ---- mathematics

template <class A>
FED_HD A clip(A value, A low, A high) {  // NaN stays NaN
  return value < low ? low : value > high ? high : value;
}

template <class T, class G, class A = typename Arithmetic<T>::type>
FED_HD A summed_gradient(const StepArgs<T, G>& args, int64_t image, int64_t d) {
  const G* p = args.gradients + image * args.image_stride + d;
  A sum = widen(p[0]);
  for (int64_t g = 1; g < args.groups; ++g) sum += widen(p[g * args.group_stride]);
  return sum;
}

// Step along one value of g: its share of g / ‖g‖ is (g/peak) / ‖g/peak‖, peak the largest |g|.
template <class A>
FED_HD A step_length(A step, A confidence, A scaled_square) {
  return step / square_root(scaled_square) * confidence;
}

// ---- one image

template <class A>
struct StepScratch {
  A values[STEP_THREADS / 32];
};

template <class Block, class T, class G, class A = typename Arithmetic<T>::type>
FED_HD void step_body(Block& block, StepScratch<A>& scratch, const StepArgs<T, G>& args) {
  const int64_t image = block.index, base = image * args.D;
  typename Block::template PerThread<A> value;
  block.each([&](int thread) {
    A largest = 0;
    for (int64_t d = thread; d < args.D; d += Block::threads) {
      const A g = summed_gradient(args, image, d);
      largest = Max()(g < 0 ? -g : g, largest);
    }
    value[thread] = largest;
  });
  const A largest = reduce<Block, A>(block, value, scratch.values, Max());
  const A peak = largest == A(0) ? A(1) : largest;
  block.each([&](int thread) {
    A sum = 0;
    for (int64_t d = thread; d < args.D; d += Block::threads) {
      const A g = summed_gradient(args, image, d) / peak;
      sum += g * g;
    }
    value[thread] = sum;
  });
  const A square = reduce<Block, A>(block, value, scratch.values, Sum());
  // A NaN among zeros leaves the largest at zero but not the square.
  const bool still = square == A(0);
  const A length = step_length(args.step, args.confidence ? args.confidence[image] : A(1), square);
  block.each([&](int thread) {
    for (int64_t d = thread; d < args.D; d += Block::threads) {
      const A moved = widen(args.images[base + d]) + summed_gradient(args, image, d) / peak * length;
      args.out[base + d] = still ? args.images[base + d] : narrow<T>(clip(moved, args.low, args.high));
    }
  });
}

// ---- the CUDA launcher, a grid of B blocks: 0 or the CUDA error of the launch

template <class T, class G>
int launch_step(const StepArgs<T, G>& args, void* stream);

}  // namespace fed
