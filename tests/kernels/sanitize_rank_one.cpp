// Fold, un-fold, step and packing by their CUDA launchers, against plain loops in float64.
#include "rank_one.h"
#include "sanitize_driver.h"

namespace sanitize {
namespace {

using namespace fed;
using Row = std::vector<double>;

constexpr int K = 2, FIRST_SLOT = 1, SLOTS = K + 2;
constexpr double RATE = 0.125, MOMENTUM = 0.75, DECAY = 0.0625;

struct Plan {
  std::vector<int64_t> fields;
  int64_t ranked = 0, R = 0, packed = 0;

  void add(int64_t Co, int64_t Ci, int64_t taps, int64_t groups, bool bias) {
    const int64_t size = Co * Ci * taps;
    fields.insert(fields.end(), {ranked, bias ? ranked + size : -1, R, R + Ci * groups, packed, Co, Ci, taps, groups});
    ranked += size + (bias ? Co : 0);
    R += Ci * groups + Co;
    packed += (SLOTS * size + 63) / 64 * 64;
  }
};

Plan plan() {
  Plan result;
  result.add(40, 35, 9, 1, true);  // tiles cut short both ways
  result.add(12, 5, 9, 3, true);
  result.add(3, 8, 1, 1, true);
  for (int i = 0; i < MAX_LAYERS; ++i) result.add(4, 3, 1 + i % 2, 1, false);  // a second table
  return result;
}

// f(branch, weight, r, s, flat index of the weight, taps-outermost and gradient-packed offsets), for every weight
template <class F>
void for_weights(const Plan& plan, F f) {
  for (size_t at = 0; at < plan.fields.size(); at += FIELDS) {
    const int64_t *l = plan.fields.data() + at, Co = l[5], Ci = l[6], taps = l[7], groups = l[8], own = Co / groups;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t o = 0; o < Co; ++o)
        for (int64_t i = 0; i < Ci; ++i)
          for (int64_t t = 0; t < taps; ++t) {
            const int64_t slot = l[4] + (FIRST_SLOT + k) * Co * Ci * taps, r = o / own * Ci + i;
            const int64_t forward = slot + (t * Ci + i) * Co + o;
            const int64_t backward = slot + ((taps - 1 - t) * own + o % own) * Ci * groups + r;
            f(k, l[0] + (o * Ci + i) * taps + t, k * plan.R + l[2] + r, k * plan.R + l[3] + o, forward, backward);
          }
  }
}

// f(branch, flat index of the bias, s), for every bias
template <class F>
void for_biases(const Plan& plan, F f) {
  for (size_t at = 0; at < plan.fields.size(); at += FIELDS) {
    const int64_t* l = plan.fields.data() + at;
    for (int64_t k = 0; l[1] >= 0 && k < K; ++k)
      for (int64_t o = 0; o < l[5]; ++o) f(k, l[1] + o, k * plan.R + l[3] + o);
  }
}

void nesterov_step(Row& p, Row& v, const Row& g, double rate, double decay) {
  for (size_t n = 0; n < p.size(); ++n) {
    const double d = g[n] + decay * p[n];
    v[n] = MOMENTUM * v[n] + d;
    p[n] -= rate * (d + MOMENTUM * v[n]);
  }
}

template <class A>
struct Case {
  const Plan layout = plan();
  static constexpr int64_t plain = 300;  // more than a block's threads
  const int64_t size = layout.ranked + plain;
  Numbers numbers{5};
  const std::vector<A> p = numbers.list<A>(size), v = numbers.list<A>(size), d = numbers.list<A>(K * layout.R, 0.25);
  const std::vector<A> dv = numbers.list<A>(K * layout.R), g = numbers.list<A>(K * layout.ranked, 0.25);
  const std::vector<A> pg = numbers.list<A>(plain);
  Buffer<A> parameters{p}, velocity{v}, deviations{d}, deviation_velocity{dv}, branch_gradients{g}, plain_gradients{pg};
  Buffer<A> rate{std::vector<A>{A(RATE)}}, folded{size_t(K * layout.ranked)}, gradient{size_t(layout.ranked)};
  Buffer<A> factors{size_t(K * layout.R)};
  const std::vector<bf16> sevens = std::vector<bf16>(layout.packed, narrow<bf16>(7));
  Buffer<bf16> packed{sevens}, packed_gradient{sevens};
  RankOneArgs<A> args{};

  Case() {
    args.parameters = parameters;
    args.momentum_buffer = velocity;
    args.deviations = deviations;
    args.deviation_buffer = deviation_velocity;
    args.branch_gradients = branch_gradients;
    args.plain_gradients = plain_gradients;
    args.learning_rate = rate;
    args.factor_gradients = factors;
    args.packed = packed;
    args.packed_gradient = packed_gradient;
    args.ranked = layout.ranked;
    args.R = layout.R;
    args.K = K;
    args.first_slot = FIRST_SLOT;
    args.momentum = A(MOMENTUM);
    args.weight_decay = A(DECAY);
  }

  // launch() for every table of layers, with a workspace of its own
  template <class F>
  bool tables(Line& line, bool update, F launch) {
    const int64_t* fields = layout.fields.data();
    const int64_t count = int64_t(layout.fields.size());
    int64_t size = 0, offset = 0;
    for (int64_t at = 0; at < count;) at += fill_table<A>(args.table, fields + at, count - at, K, size);
    const Buffer<A> workspace{size_t(size)};
    args.workspace = workspace;
    for (int64_t at = 0; at < count;) {
      at += fill_table<A>(args.table, fields + at, count - at, K, offset);
      args.plain = update && at == count ? plain : 0;
      if (!line.ran(launch())) return false;
    }
    return true;
  }

  // Of the parameters and deviations as they are on the device by then.
  void compare_packed(Line& line) {
    const auto weights = parameters.read(), deviation = deviations.read();
    Row forward(layout.packed, 7), backward(layout.packed, 7);
    for_weights(layout, [&](int64_t, int64_t w, int64_t r, int64_t s, int64_t one, int64_t other) {
      forward[one] = backward[other] = (1 + double(deviation[s])) * weights[w] * (1 + double(deviation[r]));
    });
    line.compare("packed", packed.read(), forward);
    line.compare("packed_gradient", packed_gradient.read(), backward);
  }
};

template <class A>
void fold_case(Line& line) {
  Case<A> t;
  t.args.out = t.folded;
  if (!t.tables(line, false, [&] { return launch_fold(t.args, nullptr); })) return;
  Row expected(K * t.layout.ranked);
  for_weights(t.layout, [&](int64_t k, int64_t w, int64_t r, int64_t s, int64_t, int64_t) {
    expected[k * t.layout.ranked + w] = (1 + double(t.d[s])) * double(t.p[w]) * (1 + double(t.d[r]));
  });
  for_biases(t.layout, [&](int64_t k, int64_t b, int64_t s) {
    expected[k * t.layout.ranked + b] = (1 + double(t.d[s])) * double(t.p[b]);
  });
  line.compare("folded", t.folded.read(), expected);
}

// Gradients of the parameters (with `plain`) and of the factors.
template <class A>
void unfolded(const Case<A>& t, Row& gradient, Row& factors) {
  gradient.assign(t.size, 0);
  factors.assign(K * t.layout.R, 0);
  for_weights(t.layout, [&](int64_t k, int64_t w, int64_t r, int64_t s, int64_t, int64_t) {
    const double dW = t.g[k * t.layout.ranked + w], W = t.p[w], a = 1 + double(t.d[r]), b = 1 + double(t.d[s]);
    gradient[w] += b * dW * a;
    factors[r] += b * W * dW;
    factors[s] += a * W * dW;
  });
  for_biases(t.layout, [&](int64_t k, int64_t b, int64_t s) {
    const double db = t.g[k * t.layout.ranked + b];
    gradient[b] += (1 + double(t.d[s])) * db;
    factors[s] += double(t.p[b]) * db;
  });
  for (int64_t n = 0; n < t.plain; ++n) gradient[t.layout.ranked + n] = t.pg[n];
}

template <class A>
void unfold_case(Line& line) {
  Case<A> t;
  t.args.out = t.gradient;
  if (!t.tables(line, false, [&] { return launch_unfold(t.args, false, nullptr); })) return;
  Row gradient, factors;
  unfolded(t, gradient, factors);
  gradient.resize(t.layout.ranked);
  line.compare("gradient", t.gradient.read(), gradient);
  line.compare("factors", t.factors.read(), factors);
}

template <class A>
void step_case(Line& line, Line& pack) {
  Case<A> t;
  if (!t.tables(line, true, [&] { return launch_unfold(t.args, true, nullptr); })) return;
  Row gradient, factors, p(t.p.begin(), t.p.end()), v(t.v.begin(), t.v.end()), d(t.d.begin(), t.d.end());
  Row dv(t.dv.begin(), t.dv.end());
  unfolded(t, gradient, factors);
  nesterov_step(p, v, gradient, RATE, DECAY);
  nesterov_step(d, dv, factors, K * RATE, DECAY / K);
  line.compare("parameters", t.parameters.read(), p);
  line.compare("momentum_buffer", t.velocity.read(), v);
  line.compare("deviations", t.deviations.read(), d);
  line.compare("deviation_buffer", t.deviation_velocity.read(), dv);
  if (t.tables(pack, false, [&] { return launch_pack(t.args, nullptr); })) t.compare_packed(pack);
}

template <class A>
bool rank_one_of() {
  const std::string of = std::string("<") + name_of<A>() + ">";
  Line fold("launch_fold" + of), unfold("launch_unfold" + of), step("launch_unfold" + of + ", update");
  Line pack("launch_pack" + of);
  for (bool second : {false, true}) {
    poisoned = second;
    fold_case<A>(fold);
    unfold_case<A>(unfold);
    step_case<A>(step, pack);
  }
  const bool good[] = {fold.end(), unfold.end(), step.end(), pack.end()};
  return good[0] && good[1] && good[2] && good[3];
}

}  // namespace

bool rank_one() {
  const bool good[] = {rank_one_of<float>(), rank_one_of<double>()};
  return good[0] && good[1];
}

}  // namespace sanitize
