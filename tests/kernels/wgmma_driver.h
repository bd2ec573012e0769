// The wgmma kernels and their instructions against results computed here, without PyTorch: on a device, or on the CPU's
// emulation of one to test the checks themselves.
//
//     wgmma_driver check            every check in a process of its own, each with a time limit
//     wgmma_driver measure          every measurement likewise (on a device)
//     wgmma_driver list             the names of all
//     wgmma_driver run NAME...      these, in this process
//
// A line each, written as soon as it is known:
//     right NAME
//     WRONG NAME: where, what it is, what was expected
//     uncovered NAME: why           no kernel takes it, and none was launched
//     layout tile|copies|none       which boxes the device's operands are read from as the kernels take for granted
//     descriptors {...}             the same as JSON: of each form of operand how many were read rightly, by hypothesis
//     measured NAME VALUE UNIT
// The exit status is 0; 1 where something is wrong; 77 without a device.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "sanitize_driver.h"

namespace driver {

struct Test {
  std::string name;
  bool measures;
  std::function<std::string()> run;  // "", or what is wrong; UNCOVERED and why
};
constexpr const char* UNCOVERED = "not covered: ";

// The driver's command line; its exit status.
int main(int count, char** arguments);

// Prints a line and leaves it where a crash cannot take it back.
void say(const std::string& line);

void add_operands(std::vector<Test>& tests);
void add_convolutions(std::vector<Test>& tests);
void add_weight_gradients(std::vector<Test>& tests);
void add_measurements(std::vector<Test>& tests);  // none on the CPU

// Every so many-th shift of an operand is tried: 1 on a device.
int step();

// As an error's text, after a launch; "" where it went well.
std::string after(int status);

// Exact values: multiples of a quarter, and powers of two as factors, so that sums in float32 are what they should be.
std::vector<float> factors(size_t count, int seed);

// The first of `found` that is not as expected, with its coordinates; "" where all are. NaN is not.
// `relative` to each value, and `absolute`.
template <class T>
std::string compare(const std::string& what, const std::vector<T>& found, const std::vector<double>& expected,
                    const std::vector<int>& sizes, double relative = 0, double absolute = 0) {
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = double(fed::widen(found[i]));
    const bool good = std::fabs(value - expected[i]) <= relative * std::fabs(expected[i]) + absolute;
    if (!good && wrong++ == 0) first = i;
  }
  if (wrong == 0) return "";
  std::string at;
  size_t rest = first;
  for (size_t i = sizes.size(); i-- > 0; rest /= sizes[i]) at = (i ? ", " : "") + std::to_string(rest % sizes[i]) + at;
  char text[120];
  std::snprintf(text, sizeof text, "] is %.9g, expected %.9g; %zu of %zu are wrong",
                double(fed::widen(found[first])), expected[first], wrong, expected.size());
  return what + "[" + at + text;
}

}  // namespace driver
