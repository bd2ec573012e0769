// The barriers of an emulated block, and how its roles stop together.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>

#include "host_memory.h"

namespace fed {

// Another role has failed.
struct Stopped {};

struct Barrier {
  int offset = 0, entry = 0, arrivals = 0;
  int pending = 0;  // arrivals
  int64_t bytes = 0;  // to come
  int phases = 0;  // that are complete
  uint32_t boxes = 0;  // loaded for it
  Clock gathered, told;  // of the phase that goes on; of those that are complete
  std::vector<std::function<void()>> late;  // boxes that land when somebody waits
  std::mutex mutex;
  std::condition_variable changed;

  // With the mutex held.
  void arrive(int count) {
    for (int i = 0; i < count; ++i) {
      if (pending == 0) throw Misuse(name() + " gets one arrival more than the " + std::to_string(arrivals) +
                                     " it was initialised with, " + std::to_string(bytes) + " bytes being awaited");
      --pending;
      advance();
    }
  }
  void expect(int64_t count) {
    bytes += count;
    if (bytes >= 1 << 20) throw Misuse(name() + " awaits more than 1,048,575 bytes");
  }
  void came(int64_t count) {
    bytes -= count;
    if (bytes <= -(1 << 20)) throw Misuse(name() + " got 1,048,575 bytes too many");
    advance();
  }
  void land() {
    while (!late.empty()) {
      const auto one = late.front();
      late.erase(late.begin());
      one();
    }
  }
  std::string name() const { return "the barrier at " + std::to_string(offset); }
  std::string state() const {
    return name() + ", in phase " + std::to_string(phases) + ": " + std::to_string(pending) + " arrivals and " +
           std::to_string(bytes) + " bytes to come";
  }

 private:
  void advance() {
    if (pending != 0 || bytes != 0) return;
    told.join(gathered);
    ++phases;
    pending = arrivals;
    changed.notify_all();
  }
};

// What the roles of a block share.
struct Meeting {
  Memory& memory;
  int roles;
  uint32_t epoch;  // before the block began
  std::map<int, Barrier> barriers;  // none comes after the roles part
  std::mutex mutex;
  std::string error;  // the first
  std::atomic<bool> stop{false};
  bool announced = true;  // that barriers were initialised
  struct Waiting {
    int barrier, parity;
  };
  std::vector<std::atomic<Waiting>> waiting;  // of each role; barrier -1: for none, -2: it has ended

  Meeting(Memory& memory, int roles, uint32_t epoch)
      : memory(memory), roles(roles), epoch(epoch), waiting(roles) {
    for (auto& one : waiting) one = {-1, 0};
  }

  // Nothing of this block has happened. The last entry is of what never does.
  Clock clock() const { return {std::vector<uint32_t>(roles * KINDS + barriers.size() + 1, epoch)}; }

  // Once all barriers are initialised.
  void begin() {
    if (!announced) throw Misuse("barriers were initialised after initialised, or without");
    for (auto& [offset, barrier] : barriers) {
      barrier.gathered = barrier.told = clock();
      memory.keep(offset, 8, roles * KINDS + int(barriers.size()));
    }
  }
  // Once all roles have ended.
  void end() {
    for (auto& [offset, barrier] : barriers)
      if (!stop && (barrier.bytes != 0 || !barrier.late.empty()))
        throw Misuse("the block ends while boxes are loaded: " + barrier.state());
  }

  Barrier& at(int offset) {
    const auto found = barriers.find(offset);
    if (found == barriers.end()) throw Misuse("no barrier was initialised at " + std::to_string(offset));
    return found->second;
  }

  void fail(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (error.empty()) error = what;
    stop = true;
  }

  // Throws where every role waits or has ended, and no wait can end.
  void check_progress() {
    std::string told;
    for (int role = 0; role < roles; ++role) {
      const Waiting of = waiting[role].load();
      if (of.barrier == -1) return;
      if (of.barrier == -2) continue;
      Barrier& barrier = at(of.barrier);
      const std::lock_guard<std::mutex> lock(barrier.mutex);
      if ((barrier.phases & 1) != of.parity || !barrier.late.empty()) return;
      told += (told.empty() ? "" : "; ") + Memory::name(role) + " waits for parity " + std::to_string(of.parity) +
              " of " + barrier.state();
    }
    throw Misuse("nobody goes on: " + told);
  }
};

}  // namespace fed
