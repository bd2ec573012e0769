// One role's view of a block of warpgroups on the CPU, of WgmmaBlock's form: what its instructions do, and which of them
// a kernel may not ask for then.
#pragma once

#include <cstdlib>
#include <exception>

#include "host_blocks.h"
#include "host_boxes.h"
#include "host_meeting.h"
#include "host_operands.h"

namespace fed {

struct HostWgmmaBlock {
  static constexpr int LANES = 128;
  static inline thread_local HostWgmmaBlock* here = nullptr;  // of the role that this thread runs

  template <class V>
  struct PerThread {
    V value[LANES];
    PerThread() { std::memset(static_cast<void*>(value), 0xff, sizeof value); }
    V& operator[](int thread) { return value[thread]; }
  };

  // As the unit holds it, or as its threads do. Touched by these it needs a fence before it is multiplied into.
  template <int N>
  struct PerThread<Accumulator<N>> {
    Accumulator<N> value[LANES];
    float matrix[64 * N];
    bool of_unit = false;
    HostWgmmaBlock* owner = here;
    int touched = owner->fences, busy = 0;  // how many fences had been passed; the last group that makes it

    PerThread() { std::memset(static_cast<void*>(value), 0xff, sizeof value); }
    PerThread(const PerThread&) = delete;
    ~PerThread() {
      if (busy > owner->completed) owner->leave_sum();
    }
    Accumulator<N>& operator[](int thread) {
      if (busy > owner->completed) throw Misuse(owner->name() + " touches a sum before its group is complete");
      touched = owner->fences;
      if (of_unit) convert(false);
      return value[thread];
    }
    void convert(bool to_unit) {
      for (int thread = 0; thread < LANES; ++thread)
        for (int i = 0; i < N / 2; ++i) {
          const int row = thread / 32 * 16 + accumulator_row(thread % 32) + i / 2 % 2 * 8;
          float& element = matrix[row * N + i / 4 * 8 + accumulator_column(thread % 32) + i % 2];
          if (to_unit) {
            element = value[thread].at[i];
          } else {
            value[thread].at[i] = element;
          }
        }
      of_unit = to_unit;
    }
  };

  int index, grid, number;

  HostWgmmaBlock(int index, int grid, int number, Meeting& meeting, char* shared)
      : index(index), grid(grid), number(number), meeting(&meeting), shared(shared) {}

  // Once all barriers are.
  void start() {
    here = this;
    time = {number + 1, meeting->clock(), meeting->epoch + 1, meeting->epoch, meeting->epoch};
    multiplied = stored = read_stores = meeting->epoch;
  }

  uint32_t address(int offset) const { return uint32_t(offset); }

  template <class V>
  V read(int thread, int offset) {
    aligned<V>(offset);
    meeting->memory.read(time, thread, offset, sizeof(V));
    V value;
    std::memcpy(&value, shared + offset, sizeof value);
    return value;
  }
  template <class V>
  void write(int thread, int offset, const V& value) {
    aligned<V>(offset);
    meeting->memory.write(time, thread, offset, sizeof(V));
    std::memcpy(shared + offset, &value, sizeof value);
  }

  void init(int barrier, int arrivals) {
    meeting->memory.inside(barrier, 8);
    if (barrier % 8 != 0) throw Misuse("a barrier at " + std::to_string(barrier) + ", no multiple of 8");
    if (arrivals < 1 || arrivals >= 1 << 20) throw Misuse("a barrier of " + std::to_string(arrivals) + " arrivals");
    const int number = int(meeting->barriers.size());
    Barrier& made = meeting->barriers[barrier];
    if (made.arrivals != 0) throw Misuse(made.name() + " is initialised twice");
    made.offset = barrier;
    made.arrivals = made.pending = arrivals;
    made.entry = meeting->roles * KINDS + number;
    made.boxes = meeting->epoch;
    meeting->announced = false;
  }
  void initialised() { meeting->announced = true; }

  void wait(int offset, int parity) {
    Barrier& barrier = meeting->at(offset);
    std::unique_lock<std::mutex> lock(barrier.mutex);
    const int last = waited.count(offset) ? waited[offset] : parity == 0 ? 0 : -1;
    int phase = (last & 1) == parity ? last : last + 1;
    if ((last & 1) == parity && barrier.phases - 1 > phase) phase += (barrier.phases - 1 - phase) / 2 * 2;
    if (barrier.phases > phase + 1)
      throw Misuse(name() + " waits for phase " + std::to_string(phase) + " of " + barrier.state() +
                   ": parity cannot tell");
    waited[offset] = phase;
    if (!reversed) barrier.land();
    auto& waiting = meeting->waiting[number + 1];
    while ((barrier.phases & 1) == parity) {
      waiting = {offset, parity};
      if (barrier.changed.wait_for(lock, std::chrono::milliseconds(20)) == std::cv_status::timeout) {
        if (meeting->stop) throw Stopped();
        lock.unlock();
        meeting->check_progress();
        lock.lock();
      }
      if (!reversed) barrier.land();
    }
    waiting = {-1, 0};
    time.before.join(barrier.told);
  }

  void expect(int offset, int bytes) {
    Barrier& barrier = meeting->at(offset);
    const std::lock_guard<std::mutex> lock(barrier.mutex);
    barrier.gathered.join(time.release());
    barrier.expect(bytes);
    barrier.arrive(1);
  }

  void load(const TensorMap& map, int offset, int at, Corner corner) {
    Barrier& barrier = meeting->at(at);
    const Boxes boxes = boxes_of(map);
    box_offset(boxes, offset);
    const std::lock_guard<std::mutex> lock(barrier.mutex);
    const uint32_t event = ++barrier.boxes;
    meeting->memory.land(time, offset, box_bytes(boxes), barrier.entry, event);
    const auto land = [=, this_shared = shared, to = &barrier] {
      load_box(boxes, this_shared, offset, corner);
      to->gathered.at[to->entry] = std::max(to->gathered.at[to->entry], event);
      to->came(box_bytes(boxes));
    };
    if (reversed) {
      land();
    } else {
      barrier.late.push_back(land);
      barrier.changed.notify_all();
    }
  }

  template <class F>
  void each(F f) {
    for (int n = 0; n < LANES; ++n) f(reversed ? LANES - 1 - n : n);
  }

  void arrive(int offset) {
    Barrier& barrier = meeting->at(offset);
    const std::lock_guard<std::mutex> lock(barrier.mutex);
    barrier.gathered.join(time.release());
    barrier.arrive(4);
  }

  void sync() { time.sync(); }
  void publish() { time.publish(); }
  void fence() { ++fences; }

  template <bool M_INNERMOST, bool N_INNERMOST, int N>
  void multiply(PerThread<Accumulator<N>>& sum, uint64_t a, uint64_t b, bool add = true) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "columns");
    if (sum.touched == fences) throw Misuse(name() + " multiplies into a sum that it touched after its last fence");
    const Operand of_a(a), of_b(b);
    const uint32_t group = multiplied + 1;
    for (const auto& [operand, innermost, size] : {std::tuple(of_a, M_INNERMOST, 64), std::tuple(of_b, N_INNERMOST, N)})
      for_pieces(operand, !innermost, size,
                 [&](int, int, int offset) { meeting->memory.unit_reads(time, MULTIPLIED, offset, group); });
    sum.busy = int(groups) + 1;
    const auto work = [this, of_a, of_b, add, &sum] {
      float x[16 * 64], y[16 * N];
      read_operand(shared, of_a, !M_INNERMOST, 64, x);
      read_operand(shared, of_b, !N_INNERMOST, N, y);
      if (!add) {
        std::memset(sum.matrix, 0, sizeof sum.matrix);
        sum.of_unit = true;
      } else if (!sum.of_unit) {
        sum.convert(true);
      }
      add_product<N>(sum.matrix, x, y);
    };
    open = true;
    if (reversed) {
      later.push_back({int(groups) + 1, work});
    } else {
      work();
    }
  }

  void commit() {
    ++groups;
    ++multiplied;
    open = false;
  }

  template <int PENDING>
  void complete() {
    completed = std::max(completed, groups - PENDING);
    while (!later.empty() && later.front().first <= completed) {
      later.front().second();
      later.erase(later.begin());
    }
    uint32_t& seen = time.before.at[entry(number + 1, MULTIPLIED)];
    seen = std::max(seen, multiplied - std::min(multiplied - meeting->epoch, uint32_t(PENDING)));
  }

  template <bool TRANSPOSED, class Offset, class Registers>
  void store_matrices(Offset offset, Registers words) {
    for (int first = 0; first < LANES; first += 32) {
      uint16_t matrix[4][8][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, column = 2 * (lane % 4);
        const uint32_t(&r)[4] = words(first + lane);
        for (int i = 0; i < 4; ++i)
          for (int half = 0; half < 2; ++half)
            (TRANSPOSED ? matrix[i][column + half][row] : matrix[i][row][column + half]) = uint16_t(r[i] >> 16 * half);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int to = matrix_row_at(offset(first + lane));
        meeting->memory.write(time, WARP + first / 32, to, 16);
        std::memcpy(shared + to, matrix[lane / 8][lane % 8], 16);
      }
    }
  }
  template <bool TRANSPOSED, class Offset, class Registers>
  void load_matrices(Offset offset, Registers words) {
    for (int first = 0; first < LANES; first += 32) {
      uint16_t matrix[4][8][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int from = matrix_row_at(offset(first + lane));
        meeting->memory.read(time, WARP + first / 32, from, 16);
        std::memcpy(matrix[lane / 8][lane % 8], shared + from, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, column = 2 * (lane % 4);
        uint32_t(&r)[4] = words(first + lane);
        for (int i = 0; i < 4; ++i)
          r[i] = TRANSPOSED ? matrix[i][column][row] | uint32_t(matrix[i][column + 1][row]) << 16
                            : matrix[i][row][column] | uint32_t(matrix[i][row][column + 1]) << 16;
      }
    }
  }

  template <class V>
  PerThread<V> exchange(PerThread<V>& mine, int mask) {
    PerThread<V> other;
    for (int thread = 0; thread < LANES; ++thread) other[thread] = mine[thread ^ mask];
    return other;
  }

  void store(const TensorMap& map, int offset, Corner corner) {
    const Boxes boxes = boxes_of(map);
    box_offset(boxes, offset);
    ++stored;
    for (int piece = 0; piece < box_bytes(boxes); piece += 16)
      meeting->memory.unit_reads(time, STORED, offset + piece, stored);
    const auto work = [=, from = shared] { store_box(boxes, from, offset, corner); };
    if (reversed) {
      stores.push_back({stored, work});
    } else {
      work();
    }
  }
  template <int PENDING>
  void stores_have_read() {
    read_stores = std::max(read_stores, stored - std::min(stored - meeting->epoch, uint32_t(PENDING)));
    time.stored = read_stores;
    while (!stores.empty() && stores.front().first <= read_stores) {
      stores.front().second();
      stores.erase(stores.begin());
    }
  }
  void finish_stores() {
    stores_have_read<0>();
    finished = stored;
  }

  std::string name() const { return Memory::name(number + 1); }

  void leave_sum() {
    later.clear();
    if (!meeting->stop && std::uncaught_exceptions() == 0)  // else what was thrown says more
      meeting->fail(name() + " leaves a sum before its group is complete");
  }
  // What a role may not leave behind.
  void end() {
    if (open || completed < groups) throw Misuse(name() + " ends before its multiplications are complete");
    if (stored != meeting->epoch && finished != stored) throw Misuse(name() + " ends before its stores are finished");
  }
  uint32_t latest() const { return std::max({time.step, multiplied, stored}); }

  int fences = 0, groups = 0, completed = 0;

 private:
  template <class V>
  void aligned(int offset) const {
    if (offset % int(alignof(V)) != 0 || offset % int(sizeof(V)) != 0)
      throw Misuse(std::to_string(sizeof(V)) + " bytes at " + std::to_string(offset) + ", which is not aligned");
  }
  static int matrix_row_at(int offset) {
    if (offset % 16 != 0) throw Misuse("a row of a matrix at " + std::to_string(offset) + ", no multiple of 16");
    return offset;
  }
  static void box_offset(const Boxes& boxes, int offset) {
    if (offset % (8 * boxes.swizzle) != 0)
      throw Misuse("a box of rows of " + std::to_string(boxes.swizzle) + " bytes at " + std::to_string(offset));
  }

  Meeting* meeting;
  char* shared;
  Time time;
  std::map<int, int> waited;  // barrier: the phase that was waited for last
  uint32_t multiplied = 0, stored = 0, read_stores = 0, finished = 0;  // events: groups, stores
  bool open = false;  // a group has begun
  std::vector<std::pair<int, std::function<void()>>> later;
  std::vector<std::pair<uint32_t, std::function<void()>>> stores;
};

}  // namespace fed
