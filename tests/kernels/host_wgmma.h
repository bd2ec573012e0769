// Blocks of warpgroups on the CPU: kernels of wgmma_block.h's form run as they are, each role in a thread of its own.
//
// What is asynchronous happens at the first moment that is allowed or at the last: forwards, boxes land when somebody
// waits for them, and multiplications and stores are done at once; with `reversed` (host_blocks.h), which walks threads
// and blocks backwards too, it is the other way round. Results are the same bit by bit unless a kernel takes something
// for granted. Beyond that every access to shared memory is checked (host_memory.h), every barrier (host_meeting.h),
// and that sums are not touched while they are being made. A Misuse ends the launch: launch_wgmma returns
// WGMMA_MISUSE, and wgmma_misuse says what it was.
#pragma once

#include <thread>

#include "host_wgmma_block.h"

namespace fed {

constexpr int WGMMA_MISUSE = 719;  // as a device says of a kernel that failed

// All blocks of a kernel, one after the other; shared memory starts as NaN in every block.
template <class Kernel>
int run_wgmma(const Kernel& kernel) {
  constexpr int ROLES = 1 + Kernel::CONSUMERS, MOST_SHARED = 227 * 1024;
  static_assert(registers_suffice<Kernel>(), "registers");
  const int bytes = (kernel.shared_bytes() + 15) / 16 * 16, grid = kernel.blocks();
  if (bytes > MOST_SHARED || grid < 1) {
    wgmma_misuse = std::to_string(grid) + " blocks of " + std::to_string(bytes) + " bytes of shared memory";
    return WGMMA_MISUSE;
  }
  const std::unique_ptr<char, void (*)(void*)> shared(
      static_cast<char*>(std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024)), std::free);
  Memory memory(bytes, ROLES);
  uint32_t epoch = 1;
  for (int n = 0; n < grid; ++n) {
    const int index = reversed ? grid - 1 - n : n;
    std::memset(shared.get(), 0xff, bytes);
    Meeting meeting(memory, ROLES, epoch);
    std::vector<std::unique_ptr<HostWgmmaBlock>> blocks;
    const auto attempt = [&](auto part) {
      try {
        part();
      } catch (const Misuse& misuse) {
        meeting.fail(misuse.what());
      } catch (const Stopped&) {
      }
    };
    attempt([&] {
      HostWgmmaBlock block(index, grid, -1, meeting, shared.get());
      kernel.begin(block);
      meeting.begin();
    });
    if (meeting.error.empty()) {
      std::vector<std::thread> threads;
      for (int role = 0; role < ROLES; ++role)
        blocks.push_back(std::make_unique<HostWgmmaBlock>(index, grid, role - 1, meeting, shared.get()));
      for (int role = 0; role < ROLES; ++role)
        threads.emplace_back([&, role] {
          HostWgmmaBlock& block = *blocks[role];
          attempt([&] {
            block.start();
            if (role != 0) {
              kernel.consume(block);
            } else if constexpr (Prepares<Kernel>::value) {
              kernel.prepare(block);
            } else {
              kernel.produce(block);
            }
            block.end();
          });
          meeting.waiting[role] = {-2, 0};
        });
      for (std::thread& thread : threads) thread.join();
      attempt([&] { meeting.end(); });
    }
    if (!meeting.error.empty()) {
      wgmma_misuse = "block " + std::to_string(index) + " of " + std::to_string(grid) + ": " + meeting.error;
      return WGMMA_MISUSE;
    }
    for (const auto& block : blocks) epoch = std::max(epoch, block->latest());
    for (const auto& [offset, barrier] : meeting.barriers) epoch = std::max(epoch, barrier.boxes);
  }
  return 0;
}

}  // namespace fed
