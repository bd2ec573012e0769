// Shared memory of an emulated block of warpgroups, and who may touch what when.
//
// What happens before what is told by barriers alone, not by when it happens to be emulated: every role carries a clock,
// the last event of each kind that happened before what it does next; barriers pass clocks on. So a wait or an arrival
// that is missing is found in every run. Kinds of events, of each role: its own steps (they end where it passes its
// clock on, publishes or synchronises), those of them that are published, groups of its multiplications, its stores by
// the copy engine; and of each barrier the boxes loaded for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fed {

// A kernel does what the hardware forbids, or leaves to chance.
struct Misuse : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string wgmma_misuse;  // of the last launch that failed

enum Kind { STEP, PUBLISHED, MULTIPLIED, STORED, KINDS };
inline int entry(int role, Kind kind) { return role * KINDS + kind; }

struct Clock {
  std::vector<uint32_t> at;
  void join(const Clock& other) {
    for (size_t i = 0; i < at.size(); ++i) at[i] = std::max(at[i], other.at[i]);
  }
};

// Of a role: 0 is the producer, then the consumers.
struct Time {
  int role;
  Clock before;  // what happened before this role's next step, seen from any of its threads
  uint32_t step, published, stored;  // of its own, not yet seen from all its threads

  // What the role has seen and done, for others to know.
  Clock release() {
    Clock all = before;
    all.at[entry(role, STEP)] = step++;
    all.at[entry(role, PUBLISHED)] = std::max(all.at[entry(role, PUBLISHED)], published);
    all.at[entry(role, STORED)] = std::max(all.at[entry(role, STORED)], stored);
    return all;
  }
  void sync() { before = release(); }
  void publish() { published = step++; }
};

// Threads of a warpgroup are 0 to 127; a warp that acts as one, as stmatrix does, is WARP and its number.
constexpr int WARP = 128, SEVERAL = 255;

class Memory {
 public:
  Memory(int bytes, int roles)
      : bytes(bytes), roles(roles), writers(new Cell[bytes / 4]()), readers(new Cell[size_t(roles) * (bytes / 4)]()),
        units(new Cell[size_t(roles) * 2 * (bytes / 16)]()), reads(new std::atomic<bool>[roles]()) {}

  void read(const Time& time, int thread, int offset, int size) {
    inside(offset, size);
    reads[time.role] = true;
    const uint32_t mine = time.step;
    for (int word = offset / 4; word < (offset + size + 3) / 4; ++word) {
      Cell& reader = readers[size_t(time.role) * (bytes / 4) + word];
      const Touch before = reader.load();
      const bool shared = before.event == mine && before.thread != thread;
      reader.store({mine, uint16_t(time.role), uint16_t(shared ? SEVERAL : thread)});
      const Touch writer = writers[word].load();
      if (!ordered(time, thread, writer)) race(time, "reads", word * 4, writer, "writes");
    }
  }

  void write(const Time& time, int thread, int offset, int size) {
    overwrite(time, thread, offset, size, {time.step, uint16_t(entry(time.role, STEP)), uint16_t(thread)}, false);
  }

  // A box that lands at any time from now on until it is event `event` of `barrier`, an entry of the clock.
  void land(const Time& time, int offset, int size, int barrier, uint32_t event) {
    overwrite(time, 0, offset, size, {event, uint16_t(barrier), 0}, true);
  }

  // Of 16 bytes, by a multiplication or a store, until that is event `event` of its kind.
  void unit_reads(const Time& time, Kind kind, int offset, uint32_t event) {
    inside(offset, 16);
    units[unit(time.role, kind, offset / 16)].store({event, 0, 0});
    Touch last{};
    for (int word = offset / 4; word < offset / 4 + 4; ++word) {
      const Touch writer = writers[word].load();
      if (writer.event == last.event && writer.entry == last.entry) continue;
      last = writer;
      if (writer.event > time.before.at[writer.entry])
        race(time, kind == STORED ? "stores" : "multiplies", word * 4, writer, "writes");
      if (!published(time, writer)) unpublished(time, kind == STORED ? "stores" : "multiplies", word * 4, writer);
    }
  }

  // Of a barrier: nobody's to touch, `never` being the clock's entry of what does not happen.
  void keep(int offset, int size, int never) {
    for (int word = offset / 4; word < (offset + size) / 4; ++word) writers[word].store({UINT32_MAX, uint16_t(never), 0});
  }

  void inside(int offset, int size) const {
    if (offset < 0 || offset + size > bytes)
      throw Misuse("bytes " + std::to_string(offset) + " to " + std::to_string(offset + size - 1) +
                   " are outside the block's " + std::to_string(bytes) + " bytes of shared memory");
  }

  static std::string name(int role) {
    return role == 0 ? "the producer" : "consumer " + std::to_string(role - 1);
  }

 private:
  struct Touch {
    uint32_t event;
    uint16_t entry, thread;
  };
  using Cell = std::atomic<Touch>;
  static_assert(sizeof(Cell) == 8, "lock-free");

  size_t unit(int role, Kind kind, int piece) const {
    return size_t(role * 2 + (kind == STORED)) * (bytes / 16) + piece;
  }

  bool ordered(const Time& time, int thread, Touch touch) const {
    if (touch.event <= time.before.at[touch.entry]) return true;
    return touch.entry == entry(time.role, STEP) && touch.thread == thread;
  }
  bool published(const Time& time, Touch writer) const {
    const bool step = writer.entry < roles * KINDS && writer.entry % KINDS == STEP;
    return !step || writer.event <= time.before.at[writer.entry - STEP + PUBLISHED];
  }

  void overwrite(const Time& time, int thread, int offset, int size, Touch now, bool unit_writes) {
    inside(offset, size);
    const char* what = unit_writes ? "loads a box over" : "writes";
    Touch last{};
    for (int word = offset / 4; word < (offset + size + 3) / 4; ++word) {
      const Touch before = writers[word].load();
      writers[word].store(now);
      if (before.event != last.event || before.entry != last.entry || before.thread != last.thread) {
        if (!ordered(time, thread, before)) race(time, what, word * 4, before, "writes");
        if (unit_writes && !published(time, before)) unpublished(time, what, word * 4, before);
        last = before;
      }
      for (int role = 0; role < roles; ++role) {
        if (!reads[role]) continue;
        Touch reader = readers[size_t(role) * (bytes / 4) + word].load();
        reader.entry = uint16_t(entry(role, STEP));
        if (!ordered(time, thread, reader)) race(time, what, word * 4, reader, "reads");
        if (unit_writes && !published(time, reader)) unpublished(time, what, word * 4, reader, "read");
      }
    }
    for (int piece = offset / 16; piece < (offset + size + 15) / 16; ++piece)
      for (int role = 0; role < roles; ++role)
        for (Kind kind : {MULTIPLIED, STORED})
          if (units[unit(role, kind, piece)].load().event > time.before.at[entry(role, kind)])
            throw Misuse(name(time.role) + " " + what + " bytes from " + std::to_string(piece * 16) + " that " +
                         (kind == STORED ? "a store" : "a multiplication") + " of " + name(role) + " may not have read");
  }

  [[noreturn]] void race(const Time& time, const char* what, int at, Touch other, const char* does) const {
    if (other.event == UINT32_MAX)
      throw Misuse(name(time.role) + " " + what + " bytes from " + std::to_string(at) + ", which are a barrier's");
    const bool box = other.entry >= roles * KINDS;
    throw Misuse(name(time.role) + " " + what + " bytes from " + std::to_string(at) + ", which " +
                 (box ? "a box of which it has not been told is loaded to"
                      : (other.entry / KINDS == time.role ? "another thread of it" : name(other.entry / KINDS)) + " " +
                            does + " with no barrier between"));
  }
  [[noreturn]] void unpublished(
      const Time& time, const char* what, int at, Touch other, const char* did = "wrote") const {
    throw Misuse(name(time.role) + " " + what + " bytes from " + std::to_string(at) + ", which " +
                 name(other.entry / KINDS) + " " + did + " and did not publish before the barrier");
  }

  int bytes, roles;
  std::unique_ptr<Cell[]> writers, readers, units;
  std::unique_ptr<std::atomic<bool>[]> reads;  // of a role: whether it ever does
};

}  // namespace fed
