// pack_rank_one for CUDA tensors: operands, registration.
#include "pack.h"

#include "operands.h"

namespace fed {
namespace {

// Every layer inside the buffers: parameters, R factors and the packings.
void check_layers(
    const Operands& operands, const Sizes& fields, int64_t parameters, int64_t R, int64_t K, int64_t packed,
    int64_t first_slot, int64_t most_taps) {
  if (fields.empty() || fields.size() % FIELDS != 0)
    operands.refuse("fields", std::to_string(fields.size()) + " integers",
                    std::to_string(FIELDS) + " for each layer, and a layer at least");
  const auto inside = [](int64_t from, int64_t count, int64_t size) { return from >= 0 && from <= size - count; };
  for (size_t at = 0; at < fields.size(); at += FIELDS) {
    const int64_t *f = fields.data() + at, Co = f[5], Ci = f[6], taps = f[7], positions = f[8];
    const bool good = Co >= 1 && Ci >= 1 && taps >= 1 && taps <= most_taps && positions == 1 &&
                      Ci <= parameters / taps && Co <= std::min<int64_t>(parameters, INT_MAX) / (Ci * taps) &&
                      inside(f[0], Co * Ci * taps, parameters) && inside(f[2], Ci, R) &&
                      inside(f[3], Co, R) && first_slot >= 0 && first_slot <= packed &&
                      inside(f[4], (first_slot + K) * Co * Ci * taps, packed);
    if (!good)
      operands.refuse("layer " + std::to_string(at / FIELDS) + " of fields",
                      text_of(Sizes(f, f + FIELDS)) + " with " + std::to_string(K) + " branches from slot " +
                          std::to_string(first_slot),
                      "offsets of weight, bias, r, s and packing, and Co, Ci, taps (at most " +
                          std::to_string(most_taps) + ") and 1 position, inside " + std::to_string(parameters) +
                          " parameters, " + std::to_string(R) + " factors and " + std::to_string(packed) +
                          " packed weights");
  }
}

template <class A>
void pack(
    const Operands& operands, const Tensor& parameters, const Tensor& deviations, const Tensor& packed,
    const Tensor& packed_gradient, const Sizes& fields, int64_t first_slot) {
  const int64_t K = deviations.size(0), R = deviations.size(1), count = int64_t(fields.size());
  check_layers(operands, fields, parameters.numel(), R, K, packed.numel(), first_slot, tile_row<A>);
  operands.check_device("parameters");
  const Tensor p = packed_copy(parameters), d = packed_copy(deviations);
  Pack<A> kernel{{}, pointer<A>(p), pointer<A>(d), pointer<bf16>(packed), pointer<bf16>(packed_gradient), R, int(K),
                 int(first_slot)};
  const Launches launch(p);
  for (int64_t at = 0; at < count;) {
    at += fill_table<A>(kernel.table, fields.data() + at, count - at);
    launch(kernel);
  }
}

void pack_rank_one(
    Tensor parameters, Tensor deviations, Tensor packed, Tensor packed_gradient, Sizes fields, int64_t first_slot) {
  const Operands operands{"pack_rank_one", parameters};
  const ScalarType type = parameters.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double)
    operands.refuse("parameters", text_of(parameters), "float32 or float64");
  operands.check("parameters", parameters, type, {ANY});
  operands.check("deviations", deviations, type, {ANY, ANY});
  operands.check_floating("deviations", deviations, "[K, R]");
  operands.check("packed", packed, ScalarType::BFloat16, {ANY}, true);
  operands.check("packed_gradient", packed_gradient, ScalarType::BFloat16, {packed.numel()}, true);
  (type == ScalarType::Double ? pack<double> : pack<float>)(
      operands, parameters, deviations, packed, packed_gradient, fields, first_slot);
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, FED_KEY, library) {
  library.impl("pack_rank_one", TORCH_BOX(&fed::pack_rank_one));
}
