// The wgmma convolutions and data gradients by their launcher, against plain loops.
#include "wgmma_driver.h"
#include "wgmma_launches.h"

namespace driver {
namespace {

using namespace fed;
using sanitize::Buffer;
using sanitize::Numbers;

constexpr int SLOTS = 3, G = 2;

// What stands around a convolution; of a gradient: its own. Stage by stage, so that the first wrong one tells.
enum Around { PLAIN, EPILOGUE, SECOND, ON_LOAD, ALL };

struct Case {
  bool gradient;
  int N, H, W, Ci, Co, kernel, stride;  // of the convolution: a gradient makes Ci channels of H x W from Co
  int around;
  bool copies;
};

std::string name_of(const Case& of) {
  const auto text = [](int number) { return std::to_string(number); };
  static const char* const names[] = {"plain", "epilogue", "second", "on_load", "all"};
  return std::string(of.gradient ? "data_gradient " : "conv ") + text(of.kernel) + "x" + text(of.kernel) + " s" +
         text(of.stride) + " " + text(of.Ci) + ">" + text(of.Co) + " " + text(of.N) + "x" + text(of.H) + "x" +
         text(of.W) + " " + names[of.around] + (of.copies ? " copies" : " tile");
}

double rounded(double value) { return double(widen(narrow<bf16>(float(value)))); }

// Values with a copy on the device.
template <class T>
struct Given {
  std::vector<T> values;
  Buffer<T> device;
  explicit Given(std::vector<T> from) : values(std::move(from)), device(values) {}
  const T& operator[](size_t i) const { return values[i]; }
};

struct Run {
  const Case& of;
  const bool gradient = of.gradient;
  const bool epilogue = of.around == EPILOGUE || of.around == ALL, second = of.around == SECOND || of.around == ALL;
  const bool on_load = of.around == ON_LOAD || of.around == ALL;
  const int N = of.N, stride = of.stride, taps = of.kernel * of.kernel, pad = of.kernel / 2;
  const int small_H = (of.H + stride - 1) / stride, small_W = (of.W + stride - 1) / stride;
  // of the input and of the result
  const int in_H = gradient ? small_H : of.H, in_W = gradient ? small_W : of.W, Ci = gradient ? of.Co : of.Ci;
  const int H = gradient ? of.H : small_H, W = gradient ? of.W : small_W, Co = gradient ? of.Ci : of.Co;
  const int C2 = 48, H2 = gradient ? small_H : of.H, W2 = gradient ? small_W : of.W;
  const size_t inputs = size_t(G) * N * in_H * in_W * Ci, results = size_t(G) * N * H * W * Co;
  Numbers numbers{uint64_t(Ci + Co)};
  const std::vector<int32_t> slots{2, 0};
  const Buffer<int32_t> slot{slots};
  const Given<bf16> x{quarters(inputs)}, norm_z{quarters(inputs)}, w{quarters(size_t(SLOTS) * taps * Ci * Co)};
  const Given<bf16> x2{quarters(size_t(G) * N * H2 * W2 * C2)}, w2{quarters(size_t(SLOTS) * C2 * Co)};
  const Given<bf16> residual{quarters(results)}, z{quarters(results)};
  const Given<float> in_scale{factors(SLOTS * Ci, 0)}, in_shift{row(SLOTS * Ci)};
  const Given<float> a{factors(G * Ci, 1)}, b{factors(G * Ci, 2)}, c{row(G * Ci)};
  const Given<float> scale{factors(SLOTS * Co, 1)}, shift{row(SLOTS * Co)}, bias{row(SLOTS * Co)};
  const Given<float> bias2{row(SLOTS * Co)}, center{row(SLOTS * Co)}, inv_std{factors(SLOTS * Co, 2)};
  const Buffer<bf16> out{results}, active{results};
  const Buffer<uint8_t> mask{results / 8};

  std::vector<bf16> quarters(size_t count) { return numbers.quarters<bf16>(count); }
  std::vector<float> row(int count) { return numbers.quarters<float>(count); }
  static Rows rows(const Given<float>& of, int channels) { return {of.device, channels}; }

  ConvLaunch launch(float* statistics) const {
    ConvLaunch launch{};
    launch.gradient = gradient;
    launch.multiprocessors = multiprocessors();
    launch.at = conv_geometry({of.kernel, stride, pad}, gradient, of.copies, N, in_H, in_W, H, W, Ci, second ? C2 : 0,
                              stride, Co);
    SideTensors& tensors = launch.tensors[0];
    ConvSide& side = launch.side[0];
    tensors.in = {x.device, in_H, in_W, Ci, false};
    tensors.second_stride = gradient ? 1 : stride;
    tensors.residual_stride = 1;
    tensors.weight[0] = w.device;
    tensors.slots = SLOTS;
    tensors.taps = taps;
    tensors.out = out;
    side.weight_index = slot;
    side.groups = G;
    if (second) {
      side.has_second = true;
      tensors.second = {x2.device, H2, W2, C2, false};
      tensors.weight[1] = w2.device;
      if (!gradient) side.second_bias = rows(bias2, Co);
    }
    if (on_load && gradient) {
      tensors.norm_z = {norm_z.device, in_H, in_W, Ci, false};
      side.norm_a = rows(a, Ci);
      side.norm_b = rows(b, Ci);
      side.norm_c = rows(c, Ci);
    } else if (on_load) {
      side.in_scale = rows(in_scale, Ci);
      side.in_shift = rows(in_shift, Ci);
      side.in_relu = true;
    }
    if (!epilogue) return launch;
    tensors.residual = {residual.device, H, W, Co, false};
    side.statistics = statistics;
    if (gradient) {
      side.residual_first = true;
      tensors.z = {z.device, H, W, Co, false};
      side.scale = rows(scale, Co);
      side.mean = rows(center, Co);
      side.inv_std = rows(inv_std, Co);
      side.mask_scale = rows(scale, Co);
      side.mask_shift = rows(shift, Co);
    } else {
      tensors.activated = active;
      side.relu = true;
      side.mask_out = mask;
      side.bias = rows(bias, Co);
      side.next_scale = rows(scale, Co);
      side.next_shift = rows(shift, Co);
      side.center = rows(center, Co);
    }
    return launch;
  }

  // What is multiplied.
  std::vector<double> input() const {
    std::vector<double> u(inputs);
    for (size_t i = 0; i < inputs; ++i) {
      const int g = int(i / (inputs / G)), channel = int(i % Ci), own = slots[g] * Ci + channel, of = g * Ci + channel;
      u[i] = widen(x[i]);
      if (on_load)
        u[i] = rounded(gradient ? a[of] * u[i] + b[of] * widen(norm_z[i]) + c[of]
                                : std::fmax(in_scale[own] * u[i] + in_shift[own], 0));
    }
    return u;
  }

  // [G, N, H, W, Co], before anything else is done.
  std::vector<double> products() const {
    const std::vector<double> u = input();
    std::vector<double> sums(results);
    for (int g = 0; g < G; ++g)
      for (int n = 0; n < N; ++n)
        for (int h = 0; h < H; ++h)
          for (int v = 0; v < W; ++v) {
            double* to = &sums[(((size_t(g) * N + n) * H + h) * W + v) * Co];
            const auto add = [&](const double* from, const bf16* by, int channels) {
              for (int i = 0; i < channels; ++i)
                for (int o = 0; o < Co; ++o) to[o] += from[i] * widen(by[size_t(i) * Co + o]);
            };
            for (int tap = 0; tap < taps; ++tap) {
              // a convolution's position stride · y + tap - pad, or the y whose is this one
              int y = h * stride + tap / of.kernel - pad, q = v * stride + tap % of.kernel - pad;
              if (gradient) {
                y = h + pad - tap / of.kernel;
                q = v + pad - tap % of.kernel;
                if (y % stride != 0 || q % stride != 0) continue;
                y /= stride;
                q /= stride;
              }
              if (y < 0 || y >= in_H || q < 0 || q >= in_W) continue;
              const int packed = gradient ? taps - 1 - tap : tap;
              add(&u[(((size_t(g) * N + n) * in_H + y) * in_W + q) * Ci],
                  &w.values[(size_t(slots[g]) * taps + packed) * Ci * Co], Ci);
            }
            if (!second || (gradient && (h % stride != 0 || v % stride != 0))) continue;
            const int y = gradient ? h / stride : h * stride, q = gradient ? v / stride : v * stride;
            std::vector<double> from(C2);
            for (int i = 0; i < C2; ++i) from[i] = widen(x2[(((size_t(g) * N + n) * H2 + y) * W2 + q) * C2 + i]);
            add(from.data(), &w2.values[size_t(slots[g]) * C2 * Co], C2);
          }
    return sums;
  }

  std::string run() {
    const ConvLaunch shape = launch(nullptr);
    if (const char* reason = uncovered(shape)) return std::string(UNCOVERED) + reason;
    const int count = statistics_rows(shape);
    const Buffer<float> statistics(size_t(G) * count * 2 * Co);
    if (const std::string error = after(launch_conv(launch(statistics), nullptr)); !error.empty()) return error;

    std::vector<double> expected = products(), activated(results), bits(results / 8), sums(size_t(G) * 2 * Co);
    for (size_t i = 0; i < results; ++i) {
      const int g = int(i / (results / G)), channel = int(i % Co), own = slots[g] * Co + channel;
      double& value = expected[i];
      double& first = sums[g * 2 * Co + channel];
      double& other = sums[(g * 2 + 1) * Co + channel];
      if (second && !gradient) value += bias2[own];
      if (epilogue && !gradient) {
        value = rounded(std::fmax(value + bias[own] + widen(residual[i]), 0));
        activated[i] = rounded(std::fmax(scale[own] * value + shift[own], 0));
        bits[i / 8] += activated[i] > 0 ? 1 << i % 8 : 0;
        first += value - center[own];
        other += (value - center[own]) * (value - center[own]);
      } else if (epilogue) {
        const double before = widen(z[i]);
        value += widen(residual[i]);
        value = rounded(scale[own] * before + shift[own] > 0 ? scale[own] * value : 0);
        first += value;
        other += value * (before - center[own]) * inv_std[own];
      }
      value = rounded(value);
    }
    const std::vector<int> sizes{G, N, H, W, Co};
    std::string wrong = compare("out", out.read(), expected, sizes);
    if (!wrong.empty() || !epilogue) return wrong;
    if (!gradient) {
      wrong = compare("activated", active.read(), activated, sizes);
      const std::vector<uint8_t> found = mask.read();
      if (wrong.empty())
        wrong = compare("mask", std::vector<float>(found.begin(), found.end()), bits, {G, N, H, W, Co / 8});
    }
    const std::vector<float> parts = statistics.read();
    std::vector<float> found(sums.size());
    for (size_t i = 0; i < parts.size(); ++i) found[i / (size_t(count) * 2 * Co) * 2 * Co + i % (2 * Co)] += parts[i];
    return wrong.empty() ? compare("statistics", found, sums, {G, 2, Co}, 1e-4, 1e-2) : wrong;
  }
};

}  // namespace

void add_convolutions(std::vector<Test>& tests) {
  struct Shape {
    int N, H, W, Ci, Co, kernel, stride;
  };
  // wide and narrow, chunks that are not whole, pairs of blocks of channels, odd sizes, every window
  for (const Shape& s : {Shape{5, 8, 8, 64, 64, 3, 1}, Shape{2, 9, 11, 80, 48, 3, 1}, Shape{2, 5, 7, 128, 128, 3, 1},
                         Shape{2, 33, 10, 16, 64, 3, 1}, Shape{3, 9, 10, 64, 128, 3, 2}, Shape{2, 7, 9, 64, 128, 1, 2},
                         Shape{3, 6, 5, 128, 64, 1, 1}, Shape{3, 9, 9, 16, 16, 3, 1}, Shape{2, 10, 13, 32, 32, 3, 1},
                         Shape{3, 9, 10, 16, 32, 3, 2}, Shape{2, 1, 1, 64, 64, 3, 1}})
    for (bool gradient : {false, true})
      for (int around : {PLAIN, EPILOGUE, SECOND, ON_LOAD, ALL})
        for (bool copies : {false, true}) {
          if (copies && around != PLAIN && around != ALL) continue;
          const Case of{gradient, s.N, s.H, s.W, s.Ci, s.Co, s.kernel, s.stride, around, copies};
          tests.push_back({name_of(of), false, [of] { return Run{of}.run(); }});
        }
}

}  // namespace driver
