// The weight gradient by its launcher, against plain loops.
#include "wgmma_driver.h"
#include "wgmma_weight_gradient.h"

namespace driver {
namespace {

using namespace fed;
using sanitize::Buffer;
using sanitize::Numbers;

struct Case {
  int G, N, H, W, Ci, Co, kernel, stride;
  bool in, in_relu, norm, shared, copies;
};

std::string name_of(const Case& of) {
  const auto text = [](int number) { return std::to_string(number); };
  return "weight_gradient " + text(of.kernel) + "x" + text(of.kernel) + " s" + text(of.stride) + " " + text(of.Ci) +
         ">" + text(of.Co) + " " + text(of.N) + "x" + text(of.H) + "x" + text(of.W) + (of.in ? " scaled" : "") +
         (of.in_relu ? " relu" : "") + (of.norm ? " norm" : "") + (of.shared ? " shared" : "") +
         (of.copies ? " copies" : " tile");
}

std::string run(const Case& of) {
  const auto [G, N, H, W, Ci, Co, kernel, stride, in, in_relu, norm, shared, copies] = of;
  const int Ho = (H + stride - 1) / stride, Wo = (W + stride - 1) / stride, taps = kernel * kernel, pad = kernel / 2;
  Numbers numbers(Ci + Co + kernel);
  const int xg = shared ? 1 : G;
  const auto x = numbers.quarters<bf16>(size_t(xg) * N * H * W * Ci), d = numbers.quarters<bf16>(size_t(G) * N * Ho * Wo * Co);
  const auto z = numbers.quarters<bf16>(d.size());
  const auto scale = factors(G * Ci, 0), shift = numbers.quarters<float>(G * Ci);
  const auto a = factors(G * Co, 1), b = factors(G * Co, 2), c = numbers.quarters<float>(G * Co);
  const Buffer<bf16> d_x(x), d_d(d), d_z(z);
  const Buffer<float> d_scale(scale), d_shift(shift), d_a(a), d_b(b), d_c(c);
  WeightGradientArgs args{};
  args.sizes = {G, N, H, W, Ci, Co, kernel, stride, norm, copies};
  args.multiprocessors = multiprocessors();
  args.x = d_x;
  args.d = d_d;
  args.norm_z = norm ? static_cast<bf16*>(d_z) : nullptr;
  args.x_groups = xg;
  if (in) {
    args.in_scale = {d_scale, Ci};
    args.in_shift = {d_shift, Ci};
  }
  args.in_relu = in_relu;
  if (norm) {
    args.norm_a = {d_a, Co};
    args.norm_b = {d_b, Co};
    args.norm_c = {d_c, Co};
  }
  const size_t splits = partials(weight_gradient_cut(args.sizes, args.multiprocessors)), size = size_t(G) * taps * Ci * Co;
  const Buffer<float> partial(splits * size);
  args.partial = partial;
  if (const std::string error = after(launch_weight_gradient(args, nullptr)); !error.empty()) return error;

  std::vector<double> u(size_t(G) * N * H * W * Ci), v(d.size()), expected(size);
  for (size_t i = 0; i < u.size(); ++i) {
    const int g = int(i / (u.size() / G)), channel = g * Ci + int(i % Ci);
    double value = widen(x[shared ? i % x.size() : i]);
    if (in) value = value * scale[channel] + shift[channel];
    if (in_relu) value = std::fmax(value, 0);
    u[i] = widen(narrow<bf16>(float(value)));
  }
  for (size_t i = 0; i < v.size(); ++i) {
    const int channel = int(i / (v.size() / G)) * Co + int(i % Co);
    const double value = widen(d[i]);
    v[i] = norm ? widen(narrow<bf16>(float(a[channel] * value + b[channel] * widen(z[i]) + c[channel]))) : value;
  }
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n)
      for (int h = 0; h < Ho; ++h)
        for (int w = 0; w < Wo; ++w)
          for (int tap = 0; tap < taps; ++tap) {
            const int y = h * stride + tap / kernel - pad, q = w * stride + tap % kernel - pad;
            if (y < 0 || y >= H || q < 0 || q >= W) continue;
            const double* from = &u[(((size_t(g) * N + n) * H + y) * W + q) * Ci];
            const double* by = &v[(((size_t(g) * N + n) * Ho + h) * Wo + w) * Co];
            double* to = &expected[(size_t(g) * taps + tap) * Ci * Co];
            for (int i = 0; i < Ci; ++i)
              for (int o = 0; o < Co; ++o) to[i * Co + o] += from[i] * by[o];
          }
  const std::vector<float> parts = partial.read();
  std::vector<float> sum(size);
  for (size_t s = 0; s < splits; ++s)
    for (size_t i = 0; i < size; ++i) sum[i] += parts[s * size + i];
  return compare("weight gradient", sum, expected, {G, kernel, kernel, Ci, Co}, 1e-6);
}

}  // namespace

void add_weight_gradients(std::vector<Test>& tests) {
  for (bool copies : {false, true})
    for (const Case& one : {
             // the width of every kernel, odd sizes, splits, both windows and strides
             Case{2, 3, 9, 11, 64, 64, 3, 1, false, false, false, false}, Case{1, 5, 8, 8, 128, 80, 3, 1, false, false, false, false},
             Case{2, 3, 5, 7, 16, 16, 3, 1, false, false, false, true}, Case{1, 2, 33, 17, 32, 48, 3, 1, false, false, false, false},
             Case{2, 3, 9, 10, 64, 128, 3, 2, false, false, false, false}, Case{1, 2, 7, 9, 16, 32, 3, 2, false, false, false, false},
             Case{2, 3, 9, 8, 64, 128, 1, 2, false, false, false, false}, Case{1, 3, 6, 5, 160, 64, 1, 1, false, false, false, false},
             Case{2, 3, 9, 11, 64, 64, 3, 1, true, true, true, false}, Case{1, 3, 8, 9, 16, 48, 3, 1, true, true, false, false},
             Case{2, 2, 7, 9, 32, 64, 3, 2, true, true, true, false}, Case{1, 2, 4, 4, 256, 64, 3, 1, false, true, true, false},
             Case{1, 3, 5, 5, 80, 32, 1, 2, true, true, true, false}, Case{1, 3, 1, 1, 64, 64, 3, 1, false, false, true, false}}) {
      Case of = one;
      of.copies = copies;
      tests.push_back({name_of(of), false, [of] { return run(of); }});
    }
}

}  // namespace driver
