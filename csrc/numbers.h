// Number types of the kernels, for host and device, without PyTorch's headers: bf16 and half as bits, widened to
// float32 for every computation; functions by one name for both.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FED_HD __host__ __device__ __forceinline__
#define FED_UNROLL _Pragma("unroll")
#else
#define FED_HD inline __attribute__((always_inline))
#define FED_UNROLL
#endif

namespace fed {

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

template <class To, class From>
FED_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The type an op computes in: double for double, float for everything narrower.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

FED_HD float widen(float value) { return value; }
FED_HD double widen(double value) { return value; }
FED_HD float widen(bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

FED_HD float widen(half value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  // The exponent moves by 112; a multiplication by 2^112 does that for subnormal numbers too.
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = uint32_t(value.bits & 0x7fff) << 13;
  const bool special = rest >= 0x0f800000;
  const float scaled = bit_cast<float>(rest) * 5.192296858534828e33f;
  return bit_cast<float>((special ? rest | 0x7f800000 : bit_cast<uint32_t>(scaled)) | sign);
#endif
}

template <class T>
FED_HD T narrow(typename Arithmetic<T>::type value);
template <>
FED_HD float narrow<float>(float value) {
  return value;
}
template <>
FED_HD double narrow<double>(double value) {
  return value;
}
template <>
FED_HD bf16 narrow<bf16>(float value) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(value != value ? 0x7fc0 : rounded)};
}
template <>
FED_HD half narrow<half>(float value) {  // to nearest, ties to even
#ifdef __CUDA_ARCH__
  half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest >= 0x47800000) return {uint16_t(sign | (rest > 0x7f800000 ? 0x7e00 : 0x7c00))};
  if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits
    const float shifted = bit_cast<float>(rest) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
#endif
}

FED_HD float exponential(float x) { return expf(x); }
FED_HD double exponential(double x) { return exp(x); }
FED_HD float logarithm(float x) { return logf(x); }
FED_HD double logarithm(double x) { return log(x); }
FED_HD float square_root(float x) { return sqrtf(x); }
FED_HD double square_root(double x) { return sqrt(x); }

}  // namespace fed
