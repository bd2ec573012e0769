#include "rows.h"

namespace fed {

#define FED_ROWS(A)                                                                                                 \
  FED_VECTOR A largest_of(const A* z, int64_t count) {                                                              \
    A largest = -A(INFINITY);                                                                                       \
    _Pragma("omp simd reduction(max : largest)") for (int64_t c = 0; c < count; ++c) largest =                      \
        z[c] > largest ? z[c] : largest;                                                                            \
    return largest;                                                                                                 \
  }                                                                                                                 \
  FED_VECTOR A weigh(const Softmax<A>& softmax, const A* z, A* weights, int64_t count) {                            \
    const Softmax<A> local = softmax;                                                                               \
    A sum = 0;                                                                                                      \
    if (weights == nullptr) {                                                                                       \
      _Pragma("omp simd reduction(+ : sum)") for (int64_t c = 0; c < count; ++c) sum += local.weight(z[c]);         \
    } else {                                                                                                        \
      _Pragma("omp simd reduction(+ : sum)") for (int64_t c = 0; c < count; ++c) {                                  \
        const A weight = local.weight(z[c]);                                                                        \
        weights[c] = weight;                                                                                        \
        sum += weight;                                                                                              \
      }                                                                                                             \
    }                                                                                                               \
    return sum;                                                                                                     \
  }                                                                                                                 \
  FED_VECTOR void blend(const A* weights, A factor, bool add, A* target, int64_t count) {                           \
    if (add) {                                                                                                      \
      _Pragma("omp simd") for (int64_t c = 0; c < count; ++c) target[c] += weights[c] * factor;                     \
    } else {                                                                                                        \
      _Pragma("omp simd") for (int64_t c = 0; c < count; ++c) target[c] = weights[c] * factor;                      \
    }                                                                                                               \
  }                                                                                                                 \
  FED_VECTOR A cross(const Softmax<A>& softmax, const A* target, const A* z, int64_t count) {                       \
    const Softmax<A> local = softmax;                                                                               \
    A sum = 0;                                                                                                      \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t c = 0; c < count; ++c) sum +=                               \
        target[c] * local.distance(z[c]);                                                                           \
    return sum;                                                                                                     \
  }                                                                                                                 \
  FED_VECTOR void difference(const A* weights, A scale, const A* target, A factor, A* out, int64_t count) {         \
    _Pragma("omp simd") for (int64_t c = 0; c < count; ++c) out[c] = (weights[c] * scale - target[c]) * factor;     \
  }                                                                                                                 \
  FED_VECTOR void centred(const A* weights, const A* values, A mean, A factor, A* out, int64_t count) {             \
    _Pragma("omp simd") for (int64_t c = 0; c < count; ++c) out[c] = weights[c] * (values[c] - mean) * factor;      \
  }                                                                                                                 \
  FED_VECTOR A dot(const A* a, const A* b, int64_t count) {                                                         \
    A sum = 0;                                                                                                      \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t c = 0; c < count; ++c) sum += a[c] * b[c];                  \
    return sum;                                                                                                     \
  }

FED_ROWS(float)
FED_ROWS(double)

}  // namespace fed
