// The driver's command line; wgmma_driver.h says what it is.
#include "wgmma_driver.h"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>

namespace driver {

void say(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
  fsync(STDOUT_FILENO);
}

std::vector<float> factors(size_t count, int seed) {
  std::vector<float> values(count);
  for (size_t n = 0; n < count; ++n) values[n] = std::ldexp(1.0f, int((n + seed) % 3) - 1);
  return values;
}

namespace {

// Seconds of a test.
int limit() {
  const char* given = std::getenv("WGMMA_DRIVER_LIMIT");
  return given != nullptr ? std::atoi(given) : 30;
}

std::vector<Test> all_tests() {
  std::vector<Test> tests;
  add_operands(tests);
  add_convolutions(tests);
  add_weight_gradients(tests);
  add_measurements(tests);
  return tests;
}

bool run(const Test& test) {
  const std::string wrong = test.run();
  if (wrong.rfind(UNCOVERED, 0) == 0) {
    say("uncovered " + test.name + ": " + wrong.substr(std::strlen(UNCOVERED)));
    return true;
  }
  if (!wrong.empty()) {
    say("WRONG " + test.name + ": " + wrong);
  } else if (!test.measures) {
    say("right " + test.name);
  }
  return wrong.empty();
}

// In a process of its own: a kernel that traps or hangs takes nothing else with it.
bool run_apart(const std::string& program, const Test& test) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(limit());
    execl(program.c_str(), program.c_str(), "run", test.name.c_str(), nullptr);
    _exit(127);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) {
    say("WRONG " + test.name + ": no process");
    return false;
  }
  if (WIFSIGNALED(status)) {
    const int signal = WTERMSIG(status);
    say("WRONG " + test.name + ": " + (signal == SIGALRM ? "no end after " + std::to_string(limit()) + " s"
                                                          : "ended by signal " + std::to_string(signal)));
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string command = count > 1 ? arguments[1] : "";
  const std::vector<Test> tests = all_tests();
  if (command == "list") {
    for (const Test& test : tests) say(test.name);
    return 0;
  }
  if (command != "check" && command != "measure" && command != "run") {
    say("WRONG command line: check, measure, list or run NAME");
    return 1;
  }
  if (command != "run") {
    // Asked in another process: one that has used the device cannot share it with its children.
    const pid_t child = fork();
    if (child == 0) _exit(sanitize::devices() > 0 ? 0 : 77);
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      say("no CUDA device: nothing was run");
      return 77;
    }
    bool good = true;
    char self[4096];
    const ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    self[length < 0 ? 0 : length] = 0;
    for (const Test& test : tests)
      if (test.measures == (command == "measure")) good = run_apart(self, test) && good;
    return good ? 0 : 1;
  }
  if (sanitize::devices() < 1) {
    say("no CUDA device: nothing was run");
    return 77;
  }
  bool good = true;
  sanitize::poisoned = true;
  for (int n = 2; n < count; ++n) {
    bool found = false;
    for (const Test& test : tests) {
      if (test.name != arguments[n]) continue;
      found = true;
      good = run(test) && good;
    }
    if (!found) say(std::string("WRONG ") + arguments[n] + ": there is no such test");
    good = good && found;
  }
  return good ? 0 : 1;
}

}  // namespace driver

namespace sanitize {
bool poisoned = true;
}
