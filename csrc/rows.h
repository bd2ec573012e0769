// Loops over the classes of a row on the CPU, written so that the compiler vectorises them. Rows arrive widened.
#pragma once

#include <vector>

#include "diversity_seed.h"

// One copy of a loop for each vector width, chosen at load time: a binary built for any x86-64 runs at full width.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FED_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FED_VECTOR
#endif

namespace fed {

// A row as its arithmetic type: itself where it is that already, else a widened copy in `buffer`.
template <class A>
inline const A* widened(const A* row, int64_t, std::vector<A>&) {
  return row;
}
template <class T, class A = typename Arithmetic<T>::type>
inline const A* widened(const T* row, int64_t count, std::vector<A>& buffer) {
  buffer.resize(count);
  for (int64_t c = 0; c < count; ++c) buffer[c] = widen(row[c]);
  return buffer.data();
}

// The same for a row to write: a place for arithmetic values, and what stores them.
template <class A>
inline A* writable(A* row, int64_t, std::vector<A>&) {
  return row;
}
template <class T, class A = typename Arithmetic<T>::type>
inline A* writable(T*, int64_t count, std::vector<A>& buffer) {
  buffer.resize(count);
  return buffer.data();
}
template <class A>
inline void store(const A*, A*, int64_t) {}
template <class T, class A = typename Arithmetic<T>::type>
inline void store(const A* values, T* row, int64_t count) {
  for (int64_t c = 0; c < count; ++c) row[c] = narrow<T>(values[c]);
}

float largest_of(const float* z, int64_t count);
double largest_of(const double* z, int64_t count);

// Writes softmax weights exp((z − largest)·scale) into `weights` (unless null) and returns their sum.
float weigh(const Softmax<float>& softmax, const float* z, float* weights, int64_t count);
double weigh(const Softmax<double>& softmax, const double* z, double* weights, int64_t count);

// target += weights · factor, or target = weights · factor.
void blend(const float* weights, float factor, bool add, float* target, int64_t count);
void blend(const double* weights, double factor, bool add, double* target, int64_t count);

// Σ target · softmax.distance(z).
float cross(const Softmax<float>& softmax, const float* target, const float* z, int64_t count);
double cross(const Softmax<double>& softmax, const double* target, const double* z, int64_t count);

// out = (weights · scale − target) · factor.
void difference(const float* weights, float scale, const float* target, float factor, float* out, int64_t count);
void difference(const double* weights, double scale, const double* target, double factor, double* out, int64_t count);

// out = weights · (values − mean) · factor.
void centred(const float* weights, const float* values, float mean, float factor, float* out, int64_t count);
void centred(const double* weights, const double* values, double mean, double factor, double* out, int64_t count);

// Σ a · b.
float dot(const float* a, const float* b, int64_t count);
double dot(const double* a, const double* b, int64_t count);

template <class A>
inline Softmax<A> softmax_of(const A* z, A scale, A* weights, int64_t count) {
  Softmax<A> softmax{largest_of(z, count), A(1), scale};
  softmax.sum = weigh(softmax, z, weights, count);
  return softmax;
}

}  // namespace fed
