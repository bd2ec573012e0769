// Runs the halo convolution's warps at the same time, for the sanitizers: a barrier that is missing is a data race, a
// channel past the last an access outside its buffer. Exits with 1 where the result is not that of warps in turn.
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

#include "halo_conv.h"
#include "host_blocks.h"

using namespace fed;

namespace {

class Meeting {
 public:
  explicit Meeting(int count) : count(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const int mine = round;
    if (++waiting == count) {
      waiting = 0;
      ++round;
      all.notify_all();
    } else {
      all.wait(lock, [&] { return round != mine; });
    }
  }

 private:
  std::mutex mutex;
  std::condition_variable all;
  int count, waiting = 0, round = 0;
};

template <class Shape, class Epilogue>
void run(const HaloArgs<Epilogue>& args, bool together) {
  using Block = HostTensorBlock<Shape::THREADS>;
  const int bytes = (halo_layout<Shape>(args.tile, args.Ci).total + 127) / 128 * 128;
  char* shared = static_cast<char*>(std::aligned_alloc(128, bytes));
  for (int index = 0; index < halo_grid<Shape>(args); ++index) {
    std::memset(shared, 0xff, bytes);
    Meeting meeting(Shape::THREADS / 32);
    const auto warp = [&](int first, int last) {
      Block block(index, shared);
      block.begin = first;
      block.end = last;
      if (together) block.barrier = [&] { meeting.wait(); };
      HaloBlock<Block, Shape, Epilogue>(block, args).run();
    };
    if (!together) {
      warp(0, Shape::THREADS);
      continue;
    }
    std::vector<std::thread> warps;
    for (int first = 0; first < Shape::THREADS; first += 32) warps.emplace_back(warp, first, first + 32);
    for (std::thread& one : warps) one.join();
  }
  std::free(shared);
}

template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> result(count);
  for (T& value : result) value = narrow<T>(float(std::rand() % 2001 - 1000) / 1000.0f);
  return result;
}

// Both epilogues of one shape on two images of 3x4, in tiles of one, with everything that crosses threads.
template <class Shape>
bool check(int Ci, int Co) {
  const int N = 2, H = 3, W = 4, positions = N * H * W;
  const auto x = numbers<bf16>(positions * Ci), weight = numbers<bf16>(9 * Ci * Co);
  const auto other = numbers<bf16>(positions * Co);
  const auto in_scale = numbers<float>(Ci), in_shift = numbers<float>(Ci), row = numbers<float>(Co);
  const int32_t weight_index[] = {0};
  const auto fill = [&](auto& args, float* statistics) {
    args.x = x.data();
    args.weight = weight.data();
    args.weight_index = weight_index;
    args.residual = other.data();
    args.statistics = statistics;
    args.G = args.residual_stride = 1;
    args.N = N;
    args.H = args.HR = H;
    args.W = args.WR = W;
    args.Ci = Ci;
    args.Co = args.CR = Co;
    args.tile = halo_tile(1, H, W, N, H, W);
  };
  bool same = true;
  for (bool backwards : {false, true}) {
    reversed = backwards;
    std::vector<bf16> z[2], activated[2], d[2];
    std::vector<float> sums[2], gradient_sums[2];
    std::vector<uint8_t> bits[2];
    for (bool together : {false, true}) {
      const Rows rows{row.data(), 0};
      z[together].resize(positions * Co);
      activated[together].resize(positions * Co);
      d[together].resize(positions * Co);
      bits[together].resize(positions * Co / 8);
      sums[together].resize(N * 2 * Co);
      gradient_sums[together].resize(N * 2 * Co);
      HaloArgs<HaloForward> forward{};
      fill(forward, sums[together].data());
      forward.in_scale = {in_scale.data(), 0};
      forward.in_shift = {in_shift.data(), 0};
      forward.epilogue = {rows, rows, rows, rows, z[together].data(), activated[together].data(),
                          bits[together].data(), true};
      run<Shape>(forward, together);
      HaloArgs<HaloGradient> gradient{};
      fill(gradient, gradient_sums[together].data());
      gradient.epilogue = {bits[together].data(), rows, rows, rows, other.data(), d[together].data(), true};
      run<Shape>(gradient, together);
    }
    const auto equal = [](const auto& pair) {
      return std::memcmp(pair[0].data(), pair[1].data(), pair[0].size() * sizeof(pair[0][0])) == 0;
    };
    same = same && equal(z) && equal(activated) && equal(d) && equal(bits) && equal(sums) && equal(gradient_sums);
  }
  return same;
}

}  // namespace

int main() {
  // two or three chunks of input channels, the last not always whole, and columns that are not all there
  const bool same = check<Halo16>(48, 32) && check<Halo32>(80, 48) && check<Halo64>(80, 48) && check<Halo128>(80, 112);
  std::puts(same ? "same" : "different");
  return same ? 0 : 1;
}
