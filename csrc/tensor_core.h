// Blocks that multiply on tensor cores: asynchronous copies to shared memory, ldmatrix, mma.sync (PTX ISA 9.7.14).
//
// TensorBlock executes the instructions; the tests have a block that emulates them lane by lane.
#pragma once

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

}  // namespace fed
