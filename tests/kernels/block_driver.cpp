// Runs the CUDA kernels' bodies on the CPU, block by block and phase by phase, for tests/kernels/test_cuda_blocks.py.
// Shared memory and workspaces start as NaN in every block; `reversed` walks blocks and threads backwards.
#include <cstring>
#include <limits>
#include <vector>

#include "distillation_loss.h"
#include "perturb_step.h"
#include "rank_one.h"

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

// Every launch of one op over all tables, as rank_one.cpp makes them. update: the whole step, else fold, un-fold, pack.
template <class A>
void rank_one(
    A* parameters, A* momentum_buffer, A* deviations, A* deviation_buffer, const A* branch_gradients,
    const A* plain_gradients, const A* learning_rate, A* folded, A* gradient, A* factor_gradients, bf16* packed,
    bf16* packed_gradient, const int64_t* fields, int64_t count, int64_t ranked, int64_t plain, int64_t R, int K,
    int first_slot, double momentum, double weight_decay, bool update, bool reversed) {
  RankOneArgs<A> args{};
  args.parameters = parameters;
  args.momentum_buffer = momentum_buffer;
  args.deviations = deviations;
  args.deviation_buffer = deviation_buffer;
  args.branch_gradients = branch_gradients;
  args.plain_gradients = plain_gradients;
  args.learning_rate = learning_rate;
  args.factor_gradients = factor_gradients;
  args.packed = packed;
  args.packed_gradient = packed_gradient;
  args.ranked = ranked;
  args.R = R;
  args.K = K;
  args.first_slot = first_slot;
  args.momentum = A(momentum);
  args.weight_decay = A(weight_decay);
  int64_t size = 0;
  for (int64_t at = 0; at < count;) at += fill_table<A>(args.table, fields + at, count - at, K, size);
  std::vector<A> workspace(size, std::numeric_limits<A>::quiet_NaN());
  args.workspace = workspace.data();
  const auto tables = [&](auto f) {
    int64_t offset = 0;
    for (int64_t at = 0; at < count;) {
      at += fill_table<A>(args.table, fields + at, count - at, K, offset);
      args.plain = update && at == count ? plain : 0;
      f();
    }
  };
  const auto unfold = [&](auto flag) {
    constexpr bool UPDATE = decltype(flag)::value;
    launch<TileBlock>(args.table.tiles, reversed, [&](TileBlock& block) {
      Poisoned<TileScratch<A>> scratch;
      unfold_body<TileBlock, A, UPDATE>(block, scratch.value, args);
    });
    launch<TileBlock>(factor_grid(args), reversed, [&](TileBlock& block) {
      factor_body<TileBlock, A, UPDATE>(block, args);
    });
  };
  if (update) {
    tables([&] { unfold(std::true_type()); });
  } else {
    args.out = folded;
    tables([&] {
      launch<TileBlock>(args.table.tiles, reversed, [&](TileBlock& block) { fold_body<TileBlock, A>(block, args); });
    });
    args.out = gradient;
    tables([&] { unfold(std::false_type()); });
  }
  tables([&] {
    launch<TileBlock>(args.table.tiles, reversed, [&](TileBlock& block) {
      Poisoned<TileScratch<A>> scratch;
      pack_body<TileBlock, A>(block, scratch.value, args);
    });
  });
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

#define DRIVE_RANK_ONE(NAME, A)                                                                                        \
  void rank_one_##NAME(A* p, A* v, A* d, A* dv, const A* g, const A* pg, const A* lr, A* folded, A* dW, A* df,         \
                       bf16* packed, bf16* packed_gradient, const int64_t* fields, int64_t count, int64_t ranked,      \
                       int64_t plain, int64_t R, int K, int slot, double mu, double wd, bool update, bool rev) {       \
    rank_one<A>(p, v, d, dv, g, pg, lr, folded, dW, df, packed, packed_gradient, fields, count, ranked, plain, R, K,   \
                slot, mu, wd, update, rev);                                                                            \
  }

extern "C" {
DRIVE_ROWS(float32, float)
DRIVE_ROWS(float64, double)
DRIVE_ROWS(bfloat16, bf16)
DRIVE_ROWS(float16, half)
DRIVE_RANK_ONE(float32, float)
DRIVE_RANK_ONE(float64, double)
}
