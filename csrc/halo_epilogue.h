// What the halo convolution does with its sums, eight channels of one position at a time: forward and data gradient.
#pragma once

#include "tensor_core.h"

namespace fed {

// Per-channel parameters of the slots: row `slot`, or one row for all where the stride is 0.
struct Rows {
  const float* values;  // or nullptr
  int stride;
  FED_HD const float* of(int64_t slot) const { return values + slot * stride; }
};

FED_HD float open_relu(float value) {  // NaN stays NaN
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(value));
  return result;
#else
  return value < 0.0f ? 0.0f : value;
#endif
}

// Value by value: parameters may be views at any offset of a larger buffer.
FED_HD void load_eight(Rows rows, int64_t slot, int channel, float (&value)[8]) {
  if (rows.values == nullptr) return;
FED_UNROLL
  for (int i = 0; i < 8; ++i) value[i] = rows.of(slot)[channel + i];
}

struct HaloForward {
  Rows bias, next_scale, next_shift, center;  // [slots or 1, Co]
  bf16* z;  // [G, N, H, W, Co]
  bf16* activated;  // like z, or nullptr
  uint8_t* mask;  // [G, N, H, W, Co / 8] or nullptr
  bool relu;

  struct Columns {
    float bias[8], scale[8], shift[8], center[8];
  };
  struct Fetched {
    Words residual;
  };

  FED_HD Columns columns(int64_t slot, int channel) const {
    Columns result;
    load_eight(bias, slot, channel, result.bias);
    load_eight(next_scale, slot, channel, result.scale);
    load_eight(next_shift, slot, channel, result.shift);
    load_eight(center, slot, channel, result.center);
    return result;
  }

  // Position of the residual for position (h, w), or −1.
  FED_HD static int residual_position(int image, int h, int w, int HR, int WR, int stride) {
    return (image * HR + h * stride) * WR + w * stride;
  }

  FED_HD Fetched fetch(int64_t, const bf16* residual) const {
    return {residual != nullptr ? load_words(residual) : Words{}};
  }

  // `at` is the element's offset in z.
  FED_HD void finish(
      float (&value)[8], const Columns& columns, const Fetched& fetched, int64_t at, bool summed, float (&first)[8],
      float (&second)[8]) const {
    float other[8];
    unpack(fetched.residual, other);
FED_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (bias.values != nullptr) value[i] += columns.bias[i];
      value[i] += other[i];
      if (relu) value[i] = open_relu(value[i]);
    }
    Words stored = pack(value);
    store_words(z + at, stored);
    unpack(stored, value);
    if (summed) {
FED_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float rest = value[i] - columns.center[i];
        first[i] += rest;
        second[i] += rest * rest;
      }
    }
    if (activated != nullptr) {
FED_UNROLL
      for (int i = 0; i < 8; ++i) value[i] = open_relu(value[i] * columns.scale[i] + columns.shift[i]);
      stored = pack(value);
      store_words(activated + at, stored);
      unpack(stored, value);
    }
    if (mask != nullptr) {
      int bits = 0;
FED_UNROLL
      for (int i = 0; i < 8; ++i) bits |= int(value[i] > 0.0f) << i;
      mask[at / 8] = uint8_t(bits);
    }
  }
};

struct HaloGradient {
  const uint8_t* mask;  // [G, N, H, W, Co / 8] or nullptr; Co are the channels of the convolution's input
  Rows scale, mean, inv_std;  // [slots or 1, Co]
  const bf16* z;  // like d, or nullptr
  bf16* d;  // [G, N, H, W, Co]
  bool residual_first;

  struct Columns {
    float scale[8], mean[8], inv_std[8];
  };
  struct Fetched {
    Words residual, z;
    int bits;
  };

  FED_HD Columns columns(int64_t slot, int channel) const {
    Columns result;
    load_eight(scale, slot, channel, result.scale);
    load_eight(mean, slot, channel, result.mean);
    load_eight(inv_std, slot, channel, result.inv_std);
    return result;
  }

  FED_HD static int residual_position(int image, int h, int w, int HR, int WR, int stride) {
    return h % stride == 0 && w % stride == 0 ? (image * HR + h / stride) * WR + w / stride : -1;
  }

  FED_HD Fetched fetch(int64_t at, const bf16* residual) const {
    return {residual != nullptr ? load_words(residual) : Words{}, z != nullptr ? load_words(z + at) : Words{},
            mask != nullptr ? mask[at / 8] : 255};
  }

  FED_HD void finish(
      float (&value)[8], const Columns& columns, const Fetched& fetched, int64_t at, bool summed, float (&first)[8],
      float (&second)[8]) const {
    float other[8];
    unpack(fetched.residual, other);
FED_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (residual_first) value[i] += other[i];
      value[i] = (fetched.bits >> i) & 1 ? value[i] : 0.0f;
      if (scale.values != nullptr) value[i] *= columns.scale[i];
      if (!residual_first) value[i] += other[i];
    }
    const Words stored = pack(value);
    store_words(d + at, stored);
    if (summed) {
      unpack(stored, value);
      unpack(fetched.z, other);
FED_UNROLL
      for (int i = 0; i < 8; ++i) {
        first[i] += value[i];
        second[i] += value[i] * ((other[i] - columns.mean[i]) * columns.inv_std[i]);
      }
    }
  }
};

}  // namespace fed
