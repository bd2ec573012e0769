// Blocks of warpgroups that multiply by wgmma, fed by the copy engine (PTX ISA 9.7.9.27 and 9.7.15): the instructions
// of compute capability 9.0 as kernels call them. WgmmaBlock executes them; the tests have a block of the same form
// that emulates them (tests/kernels/host_wgmma.h), every role in a thread of its own, so a kernel is a template over it.
//
// A kernel has roles. One thread of the first warpgroup is the producer: it asks the copy engine for boxes. Every other
// warpgroup consumes: it multiplies, or prepares what others multiply. They meet at barriers in shared memory. A
// barrier completes a phase when all its arrivals have come and all the bytes that it expects; it is waited for by the
// parity of that phase, 0 for the first (a wait for parity 1 returns at once as long as none has completed).
//
// Addresses in shared memory are byte offsets from its start, which is aligned to 1024 bytes: swizzles permute 16-byte
// pieces by address bits, so that an offset says where a piece is. A row of SWIZZLE bytes (32, 64 or 128) is what one
// position's channels take; the copy engine stores the 16-byte piece p of the row at offset o at o + 16 · (p ^ bits),
// where bits are as many of the address bits from 7 on as p has.
#pragma once

#include <type_traits>

#include "tensor_core.h"
#include "wgmma_instructions.h"

namespace fed {

// A CUtensorMap, passed as a part of a kernel's parameters; of the tests, what they emulate it by.
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};

// The boxes of a bf16 tensor: dimensions innermost first, positions of it that are outside being zero when loaded and
// left out when stored. `swizzle` is the bytes of an innermost row: 32, 64 or 128, the extent of dimension 0 · 2.
struct Boxes {
  const void* base;  // of 16-byte alignment
  int64_t size[5];  // values
  int64_t stride[4];  // bytes from one to the next of dimensions 1 to 4, multiples of 16
  int extent[5];  // of a box
  int swizzle;
};

// Makes a map; 0, or a CUDA error.
int make_map(const Boxes& boxes, TensorMap& map);

// Of the current device, what `blocks` of a kernel is chosen by; 0 where there is none.
int multiprocessors();

// The first coordinate of a box in every dimension; may be negative.
struct Corner {
  int at[5];
};

// Offset of 16-byte piece `piece` of the row of SWIZZLE bytes at `row`, a multiple of SWIZZLE.
template <int SWIZZLE>
FED_HD int swizzled_piece(int row, int piece) {
  static_assert(SWIZZLE == 32 || SWIZZLE == 64 || SWIZZLE == 128, "bytes of a row");
  return row + ((piece ^ ((row >> 7) & (SWIZZLE / 16 - 1))) << 4);
}

// What wgmma is told of an operand in shared memory. Rows of SWIZZLE bytes, eight of them 8 · SWIZZLE bytes; `address`
// is where the first is, taken as if nothing were swizzled. The unit adds up the offsets below and swizzles the address
// that results, so an operand may start at any row: that is an assumption which bench/gpu_run checks first.
//   K innermost (16 values of a row are multiplied at a time; the next 16 start 32 bytes on):
//     `stride` bytes from eight rows of M or N to the next eight; `leading` is not used.
//   M or N innermost (the rows are K):
//     `stride` bytes from eight rows of K to the next eight; `leading` bytes from SWIZZLE / 2 values of M or N to the
//     next as many.
FED_HD uint64_t operand(uint32_t address, int leading, int stride, int swizzle) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | mode << 62;
}
// The operand so many bytes further on, a multiple of 16. Addresses never carry past bit 13, so 32 bits are added.
FED_HD uint64_t moved(uint64_t operand, int bytes) {
  return operand >> 32 << 32 | uint32_t(uint32_t(operand) + uint32_t(bytes >> 4));
}

// A warpgroup's share of a 64 x N result, of one thread: element 4j + 2h + e is row 16 · warp + lane / 4 + 8h, column
// 8j + 2 · (lane % 4) + e, as in accumulator_row and accumulator_column.
template <int N>
struct Accumulator {
  float at[N / 2];
};

#ifndef FED_PATIENCE
#define FED_PATIENCE 0  // cycles of a wait, below 2^32, after which it traps; 0: it never does
#endif

// One role's view of the block. `number` of a consumer: 0 for the first warpgroup after the producer's.
struct WgmmaBlock {
  template <class V>
  struct PerThread {
    V value;
    FED_HD V& operator[](int) { return value; }
  };

  int index, grid;  // of the block, and of how many
  char* shared;
  int number;

  FED_HD uint32_t address(int offset) const {
#ifdef __CUDA_ARCH__
    return uint32_t(__cvta_generic_to_shared(shared)) + uint32_t(offset);
#else
    return uint32_t(offset);
#endif
  }

  // Shared memory by one thread's ordinary accesses, V's size and alignment being the same.
  template <class V>
  FED_HD V read(int thread, int offset) const {
    return *reinterpret_cast<const V*>(shared + offset);
  }
  template <class V>
  FED_HD void write(int thread, int offset, const V& value) const {
    *reinterpret_cast<V*>(shared + offset) = value;
  }

  // One thread, before the roles part: init for every barrier, then initialised.
  FED_HD void init(int barrier, int arrivals) const {
#ifdef FED_WGMMA
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
#endif
  }
  FED_HD void initialised() const {
#ifdef FED_WGMMA
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  // Any role.
  FED_HD void wait(int barrier, int parity) const {
#ifdef FED_WGMMA
    uint32_t done;
    const uint32_t begin = FED_PATIENCE > 0 ? uint32_t(clock()) : 0;
    while (true) {
      asm volatile(
          "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
          : "=r"(done)
          : "r"(address(barrier)), "r"(parity)
          : "memory");
      if (done) return;
      // A try may itself take any time
      if (FED_PATIENCE > 0 && uint32_t(clock()) - begin > FED_PATIENCE) __trap();
    }
#endif
  }

  // The producer: arrives, and makes the phase wait for so many bytes too.
  FED_HD void expect(int barrier, int bytes) const {
#ifdef FED_WGMMA
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
#endif
  }

  // The producer: the copy engine brings a box to `offset`, a multiple of 8 · its swizzle, and tells the barrier its
  // bytes.
  FED_HD void load(const TensorMap& map, int offset, int barrier, Corner c) const {
#ifdef FED_WGMMA
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
        "%7}], [%2];" ::"r"(address(offset)),
        "l"(&map), "r"(address(barrier)), "r"(c.at[0]), "r"(c.at[1]), "r"(c.at[2]), "r"(c.at[3]), "r"(c.at[4])
        : "memory");
#endif
  }

  // From here on a warpgroup, all its threads together: f(thread) is called with 0 to 127.
  template <class F>
  FED_HD void each(F f) const {
#ifdef __CUDA_ARCH__
    f(int(threadIdx.x % 128));
#endif
  }

  // Every warp arrives once, four arrivals in all, after what its threads did before.
  FED_HD void arrive(int barrier) const {
#ifdef FED_WGMMA
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
#endif
  }

  // A barrier among the warpgroup's threads.
  FED_HD void sync() const {
#ifdef FED_WGMMA
    asm volatile("bar.sync %0, 128;" ::"r"(number + 1) : "memory");
#endif
  }

  // What this thread wrote to shared memory by ordinary stores (stmatrix too) becomes visible to wgmma and the copy
  // engine; a barrier has to follow before other threads' work, or the copy engine's for them, relies on it.
  FED_HD void publish() const {
#ifdef FED_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }

  // Before the first multiplication of a group, and where registers of an accumulator were touched by other code.
  FED_HD void fence() const {
#ifdef FED_WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
  }

  // sum(thread) += A · B, or = without `add`, 64 x N by 16, in bf16, later: until `complete` operands must stay as they
  // are and the sum may not be touched. M_INNERMOST, N_INNERMOST: which dimension of A and of B is innermost in shared
  // memory; else K.
  template <bool M_INNERMOST, bool N_INNERMOST, int N>
  FED_HD void multiply(PerThread<Accumulator<N>>& sum, uint64_t a, uint64_t b, bool add = true) const {
#ifdef FED_WGMMA
    wgmma<M_INNERMOST, N_INNERMOST>(sum.value.at, a, b, add);
#endif
  }

  // Ends a group of multiplications.
  FED_HD void commit() const {
#ifdef FED_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
  }

  // Waits for all groups but the last PENDING.
  template <int PENDING>
  FED_HD void complete() const {
#ifdef FED_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
  }

  // Four 8x8 matrices of 16-bit values: lanes 8i to 8i + 7 of a warp point by offset(thread) at the eight rows of 16
  // bytes of matrix i. Of it, register i of words(thread) has row lane / 4, columns 2 · (lane % 4) and the next;
  // TRANSPOSED: columns lane / 4 of rows 2 · (lane % 4) and the next.
  template <bool TRANSPOSED, class Offset, class Registers>
  FED_HD void store_matrices(Offset offset, Registers words) const {
#ifdef FED_WGMMA
    const uint32_t(&r)[4] = words(int(threadIdx.x % 128));
    const uint32_t to = address(offset(int(threadIdx.x % 128)));
    if constexpr (TRANSPOSED) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]),
                   "r"(r[1]), "r"(r[2]), "r"(r[3])
                   : "memory");
    } else {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]), "r"(r[1]),
                   "r"(r[2]), "r"(r[3])
                   : "memory");
    }
#endif
  }
  template <bool TRANSPOSED, class Offset, class Registers>
  FED_HD void load_matrices(Offset offset, Registers words) const {
#ifdef FED_WGMMA
    uint32_t(&r)[4] = words(int(threadIdx.x % 128));
    const uint32_t from = address(offset(int(threadIdx.x % 128)));
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

  // The value of the thread of the same warp whose number differs by `mask` < 32.
  template <class V>
  FED_HD PerThread<V> exchange(PerThread<V>& mine, int mask) const {
#ifdef __CUDA_ARCH__
    return {__shfl_xor_sync(0xffffffffu, mine.value, mask)};
#else
    return mine;
#endif
  }

  // The copy engine stores a box from `offset`, on behalf of the warpgroup's first thread, whose stores form one queue:
  // publish and sync come before. The memory may be written again after stores_have_read and a sync.
  FED_HD void store(const TensorMap& map, int offset, Corner c) const {
#ifdef FED_WGMMA
    if (threadIdx.x % 128 == 0) {
      asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
                       &map),
                   "r"(address(offset)), "r"(c.at[0]), "r"(c.at[1]), "r"(c.at[2]), "r"(c.at[3]), "r"(c.at[4])
                   : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
#endif
  }
  // All but the last PENDING stores have read shared memory.
  template <int PENDING>
  FED_HD void stores_have_read() const {
#ifdef FED_WGMMA
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
#endif
  }
  // Before a role ends: the block's shared memory goes with it.
  FED_HD void finish_stores() const {
#ifdef FED_WGMMA
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
  }
};

// What a kernel is: parameters that are copied to the device as they stand, and
//   static constexpr int CONSUMERS            warpgroups beside the producer's
//   static constexpr int PRODUCER_REGISTERS, CONSUMER_REGISTERS   a thread's, multiples of 8; together at most 65,536
//   int blocks() const, int shared_bytes() const
//   void begin(Block&) const                  one thread: init for every barrier
//   void produce(Block&) const                the producer
//   void consume(Block&) const                a warpgroup, block.number of CONSUMERS
// With PREPARES = true, instead of produce:
//   void prepare(Block&) const                the producer's warpgroup, all of it: its thread 0 asks for boxes, and all
//                                             change on load what others multiply. With a warpgroup more than these, no
//                                             thread could begin with the registers of a wide accumulator.
template <class Kernel, class = void>
struct Prepares {
  static constexpr bool value = false;
};
template <class Kernel>
struct Prepares<Kernel, std::void_t<decltype(Kernel::PREPARES)>> {
  static constexpr bool value = Kernel::PREPARES;
};

// Whether the registers that a block starts with suffice for what its roles ask for: else they wait for them forever.
template <class Kernel>
constexpr bool registers_suffice() {
  constexpr int ROLES = 1 + Kernel::CONSUMERS, PRODUCER = Kernel::PRODUCER_REGISTERS;
  constexpr int CONSUMER = Kernel::CONSUMER_REGISTERS, EACH = 512 / ROLES / 8 * 8;
  return PRODUCER % 8 == 0 && CONSUMER % 8 == 0 && PRODUCER >= 24 && CONSUMER <= 240 && PRODUCER <= EACH &&
         CONSUMER >= EACH && PRODUCER + Kernel::CONSUMERS * CONSUMER <= ROLES * EACH;
}

// Puts it on a stream; 0 or the CUDA error.
template <class Kernel>
int launch_wgmma(const Kernel& kernel, void* stream);

}  // namespace fed
