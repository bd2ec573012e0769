// What the ops of convolutions share: operands at addresses that 16-byte accesses need, and rows of parameters.
#pragma once

#include "halo_epilogue.h"
#include "operands.h"

namespace fed {

// The tensor at an address that 16-byte accesses need: itself, or a copy if it is a view at an odd offset.
inline Tensor aligned(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0) return tensor;
  Tensor copy = torch::stable::empty_like(tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}
inline Optional aligned(const Optional& tensor) { return tensor ? Optional(aligned(*tensor)) : tensor; }

inline Rows rows(const Optional& tensor) {
  return {pointer<float>(tensor), tensor && tensor->size(0) > 1 ? int(tensor->size(1)) : 0};
}

// Channels of the slots: a row each, or one for all.
inline void check_rows(
    const Operands& operands, const char* name, const Optional& rows, int64_t slots, int64_t channels) {
  const bool shared = rows && rows->dim() == 2 && rows->size(0) == 1;
  operands.check(name, rows, ScalarType::Float, {shared ? 1 : slots, channels}, true);
}

inline void check_together(const Operands& operands, const char* name, const Optional& one, const Optional& other) {
  if (one.has_value() != other.has_value())
    operands.refuse(name, one ? "given alone" : "missing", "both or neither");
}

inline Tensor none(const Tensor& like, ScalarType type) { return new_tensor(like, {0}, type); }

}  // namespace fed
