// Blocks of threads that run on one CPU thread.
//
// `reversed` walks blocks and threads backwards: a result that changes has
// a race. HostTensorBlock emulates what the PTX ISA says the instructions do, lane by lane. Its asynchronous copies
// happen at the last moment that a wait allows, and with `reversed` at the first: the two agree bit by bit only where
// nothing is read before its wait or overwritten before its last use.
#pragma once

#include <cstring>
#include <functional>
#include <vector>

#include "tensor_core.h"

namespace fed {

inline bool reversed = false;
inline const char* skip = nullptr;  // part of the name of a kernel that does nothing, as one without a body would
inline bool skipped(const char* launcher) { return skip != nullptr && std::strstr(launcher, skip) != nullptr; }

template <int THREADS>
struct HostBlock {
  static constexpr int threads = THREADS;

  template <class V>
  struct PerThread {
    V value[THREADS];
    V& operator[](int thread) { return value[thread]; }
  };

  int index;

  template <class F>
  void each(F f) {
    for (int thread = 0; thread < THREADS; ++thread) f(reversed ? THREADS - 1 - thread : thread);
  }

  template <class F>
  void phase(F f) {
    each(f);
  }

  template <class V>
  PerThread<V> exchange(PerThread<V>& mine, int mask) {
    PerThread<V> other;
    for (int thread = 0; thread < THREADS; ++thread) other[thread] = mine[thread ^ mask];
    return other;
  }
};

template <int THREADS>
struct HostTensorBlock : HostBlock<THREADS> {
  struct Copy {
    int offset;
    const void* from;
    bool inside;
  };

  template <class V>
  using PerThread = typename HostBlock<THREADS>::template PerThread<V>;

  char* shared;
  std::vector<std::vector<Copy>> groups[THREADS];  // of each thread, the last one still open
  int begin = 0, end = THREADS;  // the threads that run here: all, or one warp's, the others running elsewhere
  std::function<void()> barrier = [] {};  // then waits for those

  HostTensorBlock(int index, char* memory) : HostBlock<THREADS>{index}, shared(memory) {
    for (auto& mine : groups) mine.resize(1);
  }

  template <class F>
  void each(F f) {
    for (int n = begin; n < end; ++n) f(reversed ? begin + end - 1 - n : n);
  }

  template <class F>
  void phase(F f) {
    each(f);
    barrier();
  }

  template <class F>
  void warp_phase(F f) {
    each(f);
  }

  template <class V>
  PerThread<V> exchange(PerThread<V>& mine, int mask) {
    PerThread<V> other;
    for (int thread = begin; thread < end; ++thread) other[thread] = mine[thread ^ mask];
    return other;
  }

  void copy(int thread, int offset, const void* from, bool inside) {
    const Copy one{offset, from, inside};
    if (reversed) {
      perform(one);
    } else {
      groups[thread].back().push_back(one);
    }
  }

  void commit(int thread) { groups[thread].emplace_back(); }

  template <int PENDING>
  void arrive() {
    each([&](int thread) {
      auto& mine = groups[thread];
      while (mine.size() > PENDING + 1) {
        for (const Copy& one : mine.front()) perform(one);
        mine.erase(mine.begin());
      }
    });
    barrier();
  }

  template <bool TRANSPOSED, class Offset, class To>
  void load_matrices(Offset offset, To to) {
    for (int first = begin; first < end; first += 32) {
      uint16_t matrix[4][8][8];
      for (int lane = 0; lane < 32; ++lane) std::memcpy(matrix[lane / 8][lane % 8], shared + offset(first + lane), 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, column = 2 * (lane % 4);
        uint32_t(&r)[4] = to(first + lane);
        for (int i = 0; i < 4; ++i)
          r[i] = TRANSPOSED ? matrix[i][column][row] | uint32_t(matrix[i][column + 1][row]) << 16
                            : matrix[i][row][column] | uint32_t(matrix[i][row][column + 1]) << 16;
      }
    }
  }

  template <class C, class A, class B>
  void multiply(C c, A a, B b) {
    for (int first = begin; first < end; first += 32) {
      float x[16][16], y[16][8];
      for (int lane = 0; lane < 32; ++lane) {
        const uint32_t* from_a = a(first + lane);
        const uint32_t* from_b = b(first + lane);
        const int group = lane / 4, pair = 2 * (lane % 4);
        for (int half = 0; half < 2; ++half) {
          const auto part = [&](uint32_t word) { return widen(bf16{uint16_t(word >> (16 * half))}); };
          for (int i = 0; i < 4; ++i) x[group + 8 * (i % 2)][pair + half + 8 * (i / 2)] = part(from_a[i]);
          for (int i = 0; i < 2; ++i) y[pair + half + 8 * i][group] = part(from_b[i]);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        float(&d)[4] = c(first + lane);
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
          for (int k = 0; k < 16; ++k) d[i] += x[row][k] * y[k][column];
        }
      }
    }
  }

 private:
  void perform(const Copy& one) {
    if (one.inside) {
      std::memcpy(shared + one.offset, one.from, 16);
    } else {
      std::memset(shared + one.offset, 0, 16);
    }
  }
};

}  // namespace fed
