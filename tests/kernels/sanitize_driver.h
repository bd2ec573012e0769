// Memory of the device and comparisons, for the driver that runs every CUDA kernel without PyTorch (sanitize.py).
// sanitize_cuda.cpp allocates with cudaMalloc, each buffer by itself, so that compute-sanitizer sees where it ends;
// sanitize_host.cpp is memory of the host and blocks run one thread after the other, to test the driver without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "numbers.h"

namespace sanitize {

int devices();
void* allocate(size_t bytes);
void release(void* memory);
void fill(void* memory, int byte, size_t bytes);
void upload(void* to, const void* from, size_t bytes);
void download(void* to, const void* from, size_t bytes);
std::string synchronise();  // "" or the error

// Whether results and workspaces start as NaN: what is left out shows in the comparison. Otherwise as the allocator
// left them, so that initcheck sees it.
extern bool poisoned;

template <class T>
constexpr double HALF_UNIT = 0;
template <>
constexpr double HALF_UNIT<double> = 1.0 / (1ll << 53);
template <>
constexpr double HALF_UNIT<float> = 1.0 / (1 << 24);
template <>
constexpr double HALF_UNIT<fed::bf16> = 1.0 / (1 << 8);
template <>
constexpr double HALF_UNIT<fed::half> = 1.0 / (1 << 11);

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count(count), memory(static_cast<T*>(allocate(count * sizeof(T)))) {
    if (poisoned) fill(memory, 0xff, count * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& values)
      : count(values.size()), memory(static_cast<T*>(allocate(count * sizeof(T)))) {
    upload(memory, values.data(), count * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { release(memory); }
  operator T*() const { return memory; }
  std::vector<T> read() const {
    std::vector<T> values(count);
    download(values.data(), memory, count * sizeof(T));
    return values;
  }

 private:
  size_t count;
  T* memory;
};

// One line of the report: a kernel in one dtype.
class Line {
 public:
  explicit Line(std::string name) : name(std::move(name)) {}

  // After a launch, with what it returned.
  bool ran(int status) {
    if (status != 0) return told("not launched, error " + std::to_string(status));
    const std::string error = synchronise();
    return error.empty() || told(error);
  }

  // |actual − expected| against `relative` of each value and `absolute` of the largest.
  template <class T>
  void compare(const char* what, const std::vector<T>& actual, const std::vector<double>& expected, double relative,
               double absolute) {
    double largest = 0;
    for (double value : expected) largest = std::fmax(largest, std::fabs(value));
    if (actual.size() != expected.size()) return void(told(std::string(what) + ": another number of values"));
    for (size_t i = 0; i < actual.size(); ++i) {
      const double value = double(fed::widen(actual[i]));
      const double allowed = relative * std::fabs(expected[i]) + absolute * largest + 1e-30;
      const double share = std::fabs(value - expected[i]) / allowed;
      worst = std::fmax(worst, share);
      if (!(share <= 1)) {
        char text[200];
        std::snprintf(text, sizeof text, "%s[%zu] is %.9g, expected %.9g", what, i, value, expected[i]);
        return void(told(text));
      }
    }
    ++compared;
  }
  // With half a unit of T's last place, and the rounding of the arithmetic behind it.
  template <class T>
  void compare(const char* what, const std::vector<T>& actual, const std::vector<double>& expected) {
    compare(what, actual, expected, HALF_UNIT<T>, sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 1e-5 : 1e-4);
  }

  // Prints itself; whether all was right.
  bool end() const {
    const bool good = wrong.empty() && compared > 0;
    if (good)
      std::printf("ok     %-34s %3d results, at most %.2f of what is allowed\n", name.c_str(), compared, worst);
    else
      std::printf("WRONG  %-34s %s\n", name.c_str(), wrong.empty() ? "nothing compared" : wrong.c_str());
    std::fflush(stdout);
    return good;
  }

 private:
  bool told(const std::string& what) {
    if (wrong.empty()) wrong = what;
    return false;
  }

  std::string name, wrong;
  int compared = 0;
  double worst = 0;
};

// The same numbers on every machine.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state(seed) {}
  // In [-1, 1), with 12 bits.
  double next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return double(int(state >> 52) - 2048) / 2048;
  }
  template <class T>
  std::vector<T> list(size_t count, double scale = 1, double shift = 0) {
    std::vector<T> values(count);
    for (T& value : values) value = fed::narrow<T>(typename fed::Arithmetic<T>::type(scale * next() + shift));
    return values;
  }
  // Multiples of 1/4 in [-1, 1]: sums of their products are exact.
  template <class T>
  std::vector<T> quarters(size_t count) {
    std::vector<T> values(count);
    for (T& value : values) value = fed::narrow<T>(typename fed::Arithmetic<T>::type(std::round(4 * next()) / 4));
    return values;
  }

 private:
  uint64_t state;
};

template <class T>
const char* name_of();
template <>
inline const char* name_of<float>() { return "float"; }
template <>
inline const char* name_of<double>() { return "double"; }
template <>
inline const char* name_of<fed::bf16>() { return "bf16"; }
template <>
inline const char* name_of<fed::half>() { return "half"; }

// Every kernel of one file of csrc; whether all were right.
bool rows();
bool steps();
bool packing();
bool halo();

}  // namespace sanitize
