// Blocks that multiply on tensor cores: asynchronous copies to shared memory, ldmatrix, mma.sync (PTX ISA 9.7.14).
//
// TensorBlock executes the instructions; HostTensorBlock emulates what the PTX ISA says they do, lane by lane. Its
// asynchronous copies happen at the last moment that a wait allows, and with `reversed` at the first: the two agree
// bit by bit only where nothing is read before its wait or overwritten before its last use.
#pragma once

#include <functional>
#include <vector>

#include "block.h"

// Keeps a loop's body once.
#ifdef __CUDACC__
#define FED_ROLLED _Pragma("unroll 1")
#else
#define FED_ROLLED
#endif

namespace fed {

// 16 bytes: eight bf16, or four floats.
struct __attribute__((aligned(16), may_alias)) Words {
  uint32_t word[4];
};

FED_HD Words load_words(const void* from) { return *static_cast<const Words*>(from); }
FED_HD void store_words(void* to, Words words) { *static_cast<Words*>(to) = words; }

// Two values to bf16, to nearest, the first in the lower half.
FED_HD uint32_t pack_pair(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
#else
  return narrow<bf16>(first).bits | uint32_t(narrow<bf16>(second).bits) << 16;
#endif
}

FED_HD void unpack(Words words, float (&value)[8]) {
FED_UNROLL
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = bit_cast<float>(words.word[i] << 16);
    value[2 * i + 1] = bit_cast<float>(words.word[i] & 0xffff0000u);
  }
}

FED_HD Words pack(const float (&value)[8]) {
  return {{pack_pair(value[0], value[1]), pack_pair(value[2], value[3]), pack_pair(value[4], value[5]),
           pack_pair(value[6], value[7])}};
}

// Byte offset of a row's 16-byte chunk in a tile of CHUNKS (a power of two) such chunks a row. The chunks are permuted
// within 128 bytes so that the same chunk of eight consecutive rows lies in eight different groups of four banks: an
// ldmatrix reads without conflicts from any first row, so at every shift of a convolution's taps.
// swizzled(row, chunk ^ other) is swizzled(row, chunk) ^ 16 * other.
template <int CHUNKS>
FED_HD int swizzled(int row, int chunk) {
  static_assert((CHUNKS & (CHUNKS - 1)) == 0 && CHUNKS >= 2, "a power of two");
  constexpr int SHIFT = CHUNKS >= 8 ? 0 : CHUNKS == 4 ? 1 : 2, MASK = (CHUNKS >= 8 ? 8 : CHUNKS) - 1;
  return row * (CHUNKS * 16) + ((chunk ^ ((row >> SHIFT) & MASK)) << 4);
}

// Where lane `lane` points for one ldmatrix.x4, and what it then holds. The four 8x8 matrices are a 16x16 block: rows
// 0-7, rows 8-15, then the same of columns 8-15.
FED_HD int matrix_row(int lane) { return lane % 16; }
FED_HD int matrix_chunk(int lane) { return lane / 16; }
// Row of an accumulator's elements 0 and 1 (2 and 3 are eight rows below), and the column of 0 and 2 (1, 3: the next).
FED_HD int accumulator_row(int lane) { return lane / 4; }
FED_HD int accumulator_column(int lane) { return 2 * (lane % 4); }

template <int THREADS>
struct TensorBlock : DeviceBlock<THREADS> {
  char* shared;  // 128-byte aligned

  // f(thread), then a barrier among the threads of each warp.
  template <class F>
  FED_HD void warp_phase(F f) {
#ifdef __CUDA_ARCH__
    f(int(threadIdx.x));
    __syncwarp();
#endif
  }

  // Starts to copy 16 bytes to `offset` of the shared memory; zeros unless `inside`, and then nothing is read.
  FED_HD void copy(int, int offset, const void* from, bool inside) {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(offset)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
#endif
  }

  // Ends a group of copies.
  FED_HD void commit(int) {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  // A barrier after which all have the copies of all groups but the last PENDING.
  template <int PENDING>
  FED_HD void arrive() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
    __syncthreads();
#endif
  }

  // to(thread), four registers, = one ldmatrix.x4 from offset(thread).
  template <bool TRANSPOSED, class Offset, class To>
  FED_HD void load_matrices(Offset offset, To to) {
#ifdef __CUDA_ARCH__
    uint32_t(&r)[4] = to(int(threadIdx.x));
    const uint32_t from = address(offset(int(threadIdx.x)));
    if constexpr (TRANSPOSED) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(from)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(from)
                   : "memory");
    }
#endif
  }

  // c(thread) += a(thread) · b(thread): 16x16 by 16x8 in bf16, accumulated in float32; b is two registers.
  template <class C, class A, class B>
  FED_HD void multiply(C c, A a, B b) {
#ifdef __CUDA_ARCH__
    float(&d)[4] = c(int(threadIdx.x));
    const uint32_t(&x)[4] = a(int(threadIdx.x));
    const uint32_t* y = b(int(threadIdx.x));
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
#endif
  }

  FED_HD uint32_t address(int offset) {
#ifdef __CUDA_ARCH__
    return uint32_t(__cvta_generic_to_shared(shared)) + uint32_t(offset);
#else
    return uint32_t(offset);
#endif
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

  HostTensorBlock(int index, bool reversed, char* memory) : HostBlock<THREADS>{index, reversed}, shared(memory) {
    for (auto& mine : groups) mine.resize(1);
  }

  template <class F>
  void each(F f) {
    for (int n = begin; n < end; ++n) f(this->reversed ? begin + end - 1 - n : n);
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
    if (this->reversed) {
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
