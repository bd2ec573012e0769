// Runs the CUDA kernels' bodies on the CPU, block by block and phase by phase, for tests/kernels/test_cuda_blocks.py.
// Shared memory and workspaces start as NaN in every block; `reversed` walks blocks and threads backwards.
#include <cstring>
#include <limits>
#include <vector>

#include "distillation_loss.h"
#include "pack.h"
#include "perturb_step.h"

using namespace fed;

namespace {

template <class Block, class F>
void launch(unsigned grid, bool reversed, F f) {
  for (unsigned n = 0; n < grid; ++n) {
    Block block{int(reversed ? grid - 1 - n : n), reversed};
    f(block);
  }
}

template <class S>
struct Poisoned {
  S value;
  Poisoned() { std::memset(&value, 0xff, sizeof(S)); }  // all bits set: NaN in every floating type
};

using RowBlock = HostBlock<ROW_THREADS>;
using StepBlock = HostBlock<STEP_THREADS>;
using TileBlock = HostBlock<TILE_THREADS>;

template <class T, class A = typename Arithmetic<T>::type>
void loss(
    const T* teacher, const T* branch, const int64_t* labels, const int64_t* pair, T* gradient, T* grad_teacher_a,
    T* grad_branch_a, A* scalars, int64_t M, int64_t K, int64_t B, int C, bool mean_target, double temperature,
    double alpha, bool reversed) {
  std::vector<A> rows(2 * K * B + 2 * B, std::numeric_limits<A>::quiet_NaN());
  A* row_tdiv = rows.data() + 2 * K * B;
  const BothArgs<T> args{
      {teacher, branch, labels, gradient, rows.data(), rows.data() + K * B, M, K, B, C, mean_target, A(temperature),
       A(alpha)},
      pair, grad_teacher_a, grad_branch_a, row_tdiv, row_tdiv + B};
  launch<RowBlock>(both_grid(args), reversed, [&](RowBlock& block) {
    Poisoned<LossScratch<A>> scratch;
    both_body<RowBlock, T>(block, scratch.value, args);
  });
  ScalarArgs<A> finish{rows.data(), rows.data() + K * B, scalars, scalars + 1, scalars + 2, K * B, A(temperature),
                       A(alpha), {}};
  if (pair != nullptr) finish.diversity = {{row_tdiv, row_tdiv + B}, {scalars + 3, scalars + 4}, B};
  launch<RowBlock>(1, reversed, [&](RowBlock& block) {
    Poisoned<RowScratch<A>> scratch;
    scalar_body<RowBlock, A>(block, scratch.value, finish);
  });
}

template <class T, class A = typename Arithmetic<T>::type>
void pairs(
    const T* teacher, const T* branch, T* grad_teacher, T* grad_branch, A* scalars, int64_t B, int C, bool reversed) {
  std::vector<A> rows(2 * B, std::numeric_limits<A>::quiet_NaN());
  PairsArgs<T> args{{teacher, teacher + B * C, grad_teacher, rows.data(), B, C, A(1)}, {}};
  MeanArgs<A> means{{rows.data(), nullptr}, {scalars, nullptr}, B};
  if (branch != nullptr) {
    args.branch = {branch, branch + B * C, grad_branch, rows.data() + B, B, C, A(-1)};
    means.rows[1] = rows.data() + B;
    means.mean[1] = scalars + 1;
  }
  launch<RowBlock>(pairs_grid(args), reversed, [&](RowBlock& block) {
    Poisoned<RowScratch<A>> scratch;
    pairs_body<RowBlock, T>(block, scratch.value, args);
  });
  launch<RowBlock>(1, reversed, [&](RowBlock& block) {
    Poisoned<RowScratch<A>> scratch;
    mean_body<RowBlock, A>(block, scratch.value, means);
  });
}

template <class T, class A = typename Arithmetic<T>::type>
void ods(
    const T* logits, const T* weights, T* gradient, A* confidence, int64_t B, int C, double temperature,
    bool reversed) {
  const OdsArgs<T> args{logits, weights, gradient, confidence, B, C, A(temperature)};
  launch<RowBlock>(unsigned(B), reversed, [&](RowBlock& block) {
    Poisoned<RowScratch<A>> scratch;
    ods_body<RowBlock, T>(block, scratch.value, args);
  });
}

template <class T, class A = typename Arithmetic<T>::type>
void step(
    const T* images, const T* gradients, const A* confidence, T* out, int64_t groups, int64_t B, int64_t D, double size,
    double low, double high, bool reversed) {
  const StepArgs<T, T> args{images, gradients, confidence, out, groups, B, D, B * D, D, A(size), A(low), A(high)};
  launch<StepBlock>(unsigned(B), reversed, [&](StepBlock& block) {
    Poisoned<StepScratch<A>> scratch;
    step_body<StepBlock, T, T>(block, scratch.value, args);
  });
}

// Both packings, over as many tables as the layers need.
template <class A>
void pack(
    const A* parameters, const A* deviations, bf16* packed, bf16* packed_gradient, const int64_t* fields, int64_t count,
    int64_t R, int K, int first_slot, bool reversed) {
  PackArgs<A> args{{}, parameters, deviations, packed, packed_gradient, R, K, first_slot};
  for (int64_t at = 0; at < count;) {
    at += fill_table<A>(args.table, fields + at, count - at);
    launch<TileBlock>(args.table.tiles, reversed, [&](TileBlock& block) {
      Poisoned<TileScratch<A>> scratch;
      pack_body<TileBlock, A>(block, scratch.value, args);
    });
  }
}

}  // namespace

#define DRIVE_ROWS(NAME, T)                                                                                            \
  void loss_##NAME(const T* t, const T* s, const int64_t* y, const int64_t* p, T* g, T* ga, T* gb,                     \
                   Arithmetic<T>::type* out, int64_t M, int64_t K, int64_t B, int C, bool mean, double tau, double a,  \
                   bool rev) {                                                                                         \
    loss<T>(t, s, y, p, g, ga, gb, out, M, K, B, C, mean, tau, a, rev);                                                \
  }                                                                                                                    \
  void pairs_##NAME(const T* t, const T* s, T* gt, T* gs, Arithmetic<T>::type* out, int64_t B, int C, bool rev) {      \
    pairs<T>(t, s, gt, gs, out, B, C, rev);                                                                            \
  }                                                                                                                    \
  void ods_##NAME(const T* z, const T* w, T* g, Arithmetic<T>::type* c, int64_t B, int C, double tau, bool rev) {      \
    ods<T>(z, w, g, c, B, C, tau, rev);                                                                                \
  }                                                                                                                    \
  void step_##NAME(const T* x, const T* g, const Arithmetic<T>::type* c, T* out, int64_t G, int64_t B, int64_t D,      \
                   double size, double low, double high, bool rev) {                                                   \
    step<T>(x, g, c, out, G, B, D, size, low, high, rev);                                                              \
  }

#define DRIVE_PACK(NAME, A)                                                                                            \
  void pack_##NAME(const A* p, const A* d, bf16* packed, bf16* packed_gradient, const int64_t* fields, int64_t count,  \
                   int64_t R, int K, int slot, bool rev) {                                                             \
    pack<A>(p, d, packed, packed_gradient, fields, count, R, K, slot, rev);                                            \
  }

extern "C" {
DRIVE_ROWS(float32, float)
DRIVE_ROWS(float64, double)
DRIVE_ROWS(bfloat16, bf16)
DRIVE_ROWS(float16, half)
DRIVE_PACK(float32, float)
DRIVE_PACK(float64, double)
}
