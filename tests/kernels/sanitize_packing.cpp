// The packing by its CUDA kernel, against plain loops in float64.
#include "pack.h"
#include "sanitize_driver.h"

namespace sanitize {
namespace {

using namespace fed;
using Row = std::vector<double>;

constexpr int K = 2, FIRST_SLOT = 1, SLOTS = K + 2;

struct Plan {
  std::vector<int64_t> fields;
  int64_t parameters = 0, R = 0, packed = 0;

  void add(int64_t Co, int64_t Ci, int64_t taps, bool bias) {
    const int64_t size = Co * Ci * taps;
    fields.insert(fields.end(), {parameters, bias ? parameters + size : -1, R, R + Ci, packed, Co, Ci, taps, 1});
    parameters += size + (bias ? Co : 0);
    R += Ci + Co;
    packed += (SLOTS * size + 63) / 64 * 64;
  }
};

Plan plan() {
  Plan result;
  result.add(40, 35, 9, true);  // tiles cut short both ways
  result.add(3, 8, 1, true);
  for (int i = 0; i < MAX_LAYERS; ++i) result.add(4, 3, 1 + i % 2, false);  // a second table
  return result;
}

template <class A>
void pack_case(Line& line) {
  const Plan plan = sanitize::plan();
  Numbers numbers{5};
  const std::vector<A> p = numbers.list<A>(plan.parameters), d = numbers.list<A>(K * plan.R, 0.25);
  const std::vector<bf16> sevens(plan.packed, narrow<bf16>(7));
  const Buffer<A> parameters{p}, deviations{d};
  const Buffer<bf16> packed{sevens}, packed_gradient{sevens};
  Pack<A> kernel{{}, parameters, deviations, packed, packed_gradient, plan.R, K, FIRST_SLOT};
  const int64_t count = int64_t(plan.fields.size());
  for (int64_t at = 0; at < count;) {
    at += fill_table<A>(kernel.table, plan.fields.data() + at, count - at);
    if (!line.ran(launch(kernel, nullptr))) return;
  }
  Row forward(plan.packed, 7), backward(plan.packed, 7);
  for (int64_t at = 0; at < count; at += FIELDS) {
    const int64_t *l = plan.fields.data() + at, Co = l[5], Ci = l[6], taps = l[7];
    for (int64_t n = 0; n < K * Co * Ci * taps; ++n) {
      const int64_t t = n % taps, i = n / taps % Ci, o = n / taps / Ci % Co, k = n / taps / Ci / Co;
      const int64_t slot = l[4] + (FIRST_SLOT + k) * Co * Ci * taps;
      const double value = (1 + double(d[k * plan.R + l[3] + o])) * p[l[0] + (o * Ci + i) * taps + t] *
                           (1 + double(d[k * plan.R + l[2] + i]));
      forward[slot + (t * Ci + i) * Co + o] = value;
      backward[slot + ((taps - 1 - t) * Co + o) * Ci + i] = value;
    }
  }
  line.compare("packed", packed.read(), forward);
  line.compare("packed_gradient", packed_gradient.read(), backward);
}

template <class A>
bool pack_of() {
  Line line(std::string("Pack<") + name_of<A>() + ">");
  for (bool second : {false, true}) {
    poisoned = second;
    pack_case<A>(line);
  }
  return line.end();
}

}  // namespace

bool packing() {
  const bool good[] = {pack_of<float>(), pack_of<double>()};
  return good[0] && good[1];
}

}  // namespace sanitize
