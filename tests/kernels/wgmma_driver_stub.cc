// Tests of every fate, for the driver's command line.
#include <unistd.h>

#include <cstdlib>

#include "wgmma_driver.h"

namespace sanitize {
int devices() { return std::getenv("NO_DEVICE") == nullptr; }
}  // namespace sanitize

namespace driver {

void add_operands(std::vector<Test>& tests) {
  tests.push_back({"good", false, [] { return std::string(); }});
  tests.push_back({"bad", false, [] {
                     return compare<float>("z", {1, 2, 4, 3}, {1, 2, 3, 3}, {2, 2});
                   }});
  tests.push_back({"unwritten", false, [] {
                     return compare<float>("z", {std::nanf("")}, {0}, {1}, 1e9, 1e9);
                   }});
}
void add_convolutions(std::vector<Test>& tests) {
  tests.push_back({"trap", false, []() -> std::string { std::abort(); }});
  tests.push_back({"hang", false, [] { return sleep(60), std::string(); }});
}
void add_weight_gradients(std::vector<Test>& tests) {
  tests.push_back({"late", false, [] { return std::string(UNCOVERED) + "too wide"; }});
}
void add_measurements(std::vector<Test>& tests) {
  tests.push_back({"speed", true, [] { return say("measured speed 1 m/s"), std::string(); }});
}

}  // namespace driver

int main(int count, char** arguments) { return driver::main(count, arguments); }
