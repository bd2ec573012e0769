// The halo convolution by its CUDA launcher, forward and data gradient, in each shape of a block, against plain loops.
// Operands are multiples of 1/4 and factors powers of two, so that every sum before a rounding is exact.
#include "halo_conv.h"
#include "sanitize_driver.h"

namespace sanitize {
namespace {

using namespace fed;
using Row = std::vector<double>;

constexpr int G = 2, N = 3, H = 5, W = 4, SLOTS = 3, POSITIONS = N * H * W;
const std::vector<int32_t> SLOT{2, 0};

// Of every slot and channel: 1/2, 1 or 2.
std::vector<float> factors(int count, int seed) {
  std::vector<float> values(count);
  for (int n = 0; n < count; ++n) values[n] = std::ldexp(1.0f, (n + seed) % 3 - 1);
  return values;
}

double rounded(double value) { return double(widen(narrow<bf16>(float(value)))); }

struct Case {
  int Ci, Co;
  HaloTile tile;
  Numbers numbers;
  const std::vector<bf16> x, weight, other, strided;
  const std::vector<float> in_scale, in_shift, scale, next_shift, bias, center;
  const Buffer<bf16> d_x{x}, d_weight{weight}, d_other{other}, d_strided{strided};
  const Buffer<int32_t> weight_index{SLOT};
  const Buffer<float> d_in_scale{in_scale}, d_in_shift{in_shift}, d_scale{scale}, d_next_shift{next_shift};
  const Buffer<float> d_bias{bias}, d_center{center};

  Case(int Ci, int Co, int images, int rows, int columns)
      : Ci(Ci), Co(Co), tile(halo_tile(images, rows, columns, N, H, W)), numbers(Ci + Co),
        x(numbers.quarters<bf16>(G * POSITIONS * Ci)), weight(numbers.quarters<bf16>(SLOTS * 9 * Ci * Co)),
        other(numbers.quarters<bf16>(G * POSITIONS * Co)), strided(numbers.quarters<bf16>(G * N * 3 * 2 * Co)),
        in_scale(factors(SLOTS * Ci, 0)), in_shift(numbers.quarters<float>(SLOTS * Ci)),
        scale(factors(SLOTS * Co, 1)), next_shift(numbers.quarters<float>(SLOTS * Co)),
        bias(numbers.quarters<float>(SLOTS * Co)), center(numbers.quarters<float>(SLOTS * Co)) {}

  template <class Epilogue>
  HaloArgs<Epilogue> args(float* statistics) const {
    HaloArgs<Epilogue> args{};
    args.x = d_x;
    args.weight = d_weight;
    args.weight_index = weight_index;
    args.statistics = statistics;
    args.x_stride = POSITIONS * Ci;
    args.G = G;
    args.N = N;
    args.H = H;
    args.W = W;
    args.Ci = Ci;
    args.Co = Co;
    args.residual_stride = 1;
    args.tile = tile;
    return args;
  }
  Rows row_of(const Buffer<float>& values, int channels) const { return {values, channels}; }

  // f(group, image, row, column, channel, its offset in the result)
  template <class F>
  void for_results(F f) const {
    for (int64_t at = 0; at < int64_t(G) * POSITIONS * Co; ++at) {
      const int c = int(at % Co), w = int(at / Co % W), h = int(at / Co / W % H), n = int(at / Co / W / H % N);
      f(int(at / Co / POSITIONS), n, h, w, c, at);
    }
  }

  // The sum over taps and channels; `in` gives the input of a group at an offset.
  template <class F>
  double sum(int g, int n, int h, int w, int c, F in) const {
    double total = 0;
    for (int tap = 0; tap < 9; ++tap) {
      const int y = h + tap / 3 - 1, z = w + tap % 3 - 1;
      if (y < 0 || y >= H || z < 0 || z >= W) continue;
      for (int i = 0; i < Ci; ++i)
        total += in((((int64_t)n * H + y) * W + z) * Ci + i, i) *
                 double(widen(weight[((SLOT[g] * 9 + tap) * (int64_t)Ci + i) * Co + c]));
    }
    return total;
  }

  // Sums over the positions of a tile of first and second(at), [G, tiles, 2, Co].
  template <class First, class Second>
  Row tile_sums(First first, Second second) const {
    Row sums(G * tile.count * 2 * Co);
    for_results([&](int g, int n, int h, int w, int c, int64_t at) {
      const int i = (n / tile.images * tile.down + h / tile.rows) * tile.across + w / tile.columns;
      double* to = sums.data() + (int64_t(g) * tile.count + i) * 2 * Co + c;
      to[0] += first(g, c, at);
      to[Co] += second(g, c, at);
    });
    return sums;
  }
};

void forward_case(Line& line, const Case& t, int columns, bool plain) {
  const int64_t results = int64_t(G) * POSITIONS * t.Co;
  const Buffer<bf16> z(results), activated(results);
  const Buffer<uint8_t> mask(results / 8);
  const Buffer<float> statistics(G * t.tile.count * 2 * t.Co);
  auto args = t.args<HaloForward>(plain ? nullptr : static_cast<float*>(statistics));
  args.epilogue.z = z;
  if (!plain) {
    args.in_scale = t.row_of(t.d_in_scale, t.Ci);
    args.in_shift = t.row_of(t.d_in_shift, t.Ci);
    args.residual = t.d_other;
    args.HR = H;
    args.WR = W;
    args.CR = t.Co;
    const Rows scale = t.row_of(t.d_scale, t.Co), shift = t.row_of(t.d_next_shift, t.Co);
    args.epilogue = {t.row_of(t.d_bias, t.Co), scale, shift, t.row_of(t.d_center, t.Co), z, activated, mask, true};
  }
  if (!line.ran(launch_halo(args, columns, nullptr))) return;

  Row expected(results), active(results);
  t.for_results([&](int g, int n, int h, int w, int c, int64_t at) {
    const int slot = SLOT[g];
    double value = t.sum(g, n, h, w, c, [&](int64_t offset, int i) {
      const double raw = widen(t.x[int64_t(g) * POSITIONS * t.Ci + offset]);
      return plain ? raw : raw * t.in_scale[slot * t.Ci + i] + t.in_shift[slot * t.Ci + i];
    });
    if (!plain) value = std::fmax(value + t.bias[slot * t.Co + c] + widen(t.other[at]), 0);
    expected[at] = rounded(value);
    active[at] = rounded(std::fmax(expected[at] * t.scale[slot * t.Co + c] + t.next_shift[slot * t.Co + c], 0));
  });
  line.compare("z", z.read(), expected, 0, 0);
  if (plain) return;
  line.compare("activated", activated.read(), active, 0, 0);
  Row bits(results / 8);
  for (int64_t at = 0; at < results; ++at) bits[at / 8] += active[at] > 0 ? 1 << at % 8 : 0;
  const auto found = mask.read();
  line.compare("mask", std::vector<float>(found.begin(), found.end()), bits, 0, 0);
  const auto rest = [&](int g, int c, int64_t at) { return expected[at] - t.center[SLOT[g] * t.Co + c]; };
  const auto square = [&](int g, int c, int64_t at) { return rest(g, c, at) * rest(g, c, at); };
  line.compare("statistics", statistics.read(), t.tile_sums(rest, square));
}

// With a residual at every second position, added before the mask and the scale or after them.
void gradient_case(Line& line, const Case& t, int columns, bool first) {
  const int64_t results = int64_t(G) * POSITIONS * t.Co;
  const Buffer<bf16> out(results);
  const Buffer<float> statistics(G * t.tile.count * 2 * t.Co);
  std::vector<uint8_t> bits(results / 8);
  for (size_t n = 0; n < bits.size(); ++n) bits[n] = uint8_t(37 * n + n / 7);
  const Buffer<uint8_t> mask(bits);
  auto args = t.args<HaloGradient>(statistics);
  args.residual = t.d_strided;
  args.HR = (H + 1) / 2;
  args.WR = (W + 1) / 2;
  args.CR = t.Co;
  args.residual_stride = 2;
  args.epilogue = {mask, t.row_of(t.d_scale, t.Co), t.row_of(t.d_bias, t.Co), t.row_of(t.d_scale, t.Co), t.d_other,
                   out, first};
  if (!line.ran(launch_halo(args, columns, nullptr))) return;

  Row expected(results);
  t.for_results([&](int g, int n, int h, int w, int c, int64_t at) {
    double value = t.sum(g, n, h, w, c, [&](int64_t offset, int) {
      return double(widen(t.x[int64_t(g) * POSITIONS * t.Ci + offset]));
    });
    const int64_t from = (((int64_t(g) * N + n) * args.HR + h / 2) * args.WR + w / 2) * t.Co + c;
    const double residual = h % 2 == 0 && w % 2 == 0 ? double(widen(t.strided[from])) : 0;
    if (first) value += residual;
    value = bits[at / 8] >> at % 8 & 1 ? value * t.scale[SLOT[g] * t.Co + c] : 0;
    expected[at] = rounded(first ? value : value + residual);
  });
  line.compare("d", out.read(), expected, 0, 0);
  const auto d = [&](int, int, int64_t at) { return expected[at]; };
  const auto hat = [&](int g, int c, int64_t at) {
    const int channel = SLOT[g] * t.Co + c;
    return expected[at] * (widen(t.other[at]) - t.bias[channel]) * t.scale[channel];
  };
  line.compare("statistics", statistics.read(), t.tile_sums(d, hat));
}

bool halo_of(int columns, int Ci, int Co) {
  const std::string of = "<" + std::to_string(columns) + " channels>";
  Line forward("HaloForward" + of), gradient("HaloGradient" + of);
  for (bool second : {false, true}) {
    poisoned = second;
    // Two whole images, a tile that is cut short below, and one beside; a large tile before a small one
    for (const auto& size : {std::vector<int>{2, H, W}, std::vector<int>{1, 3, W}, std::vector<int>{1, H, 3}}) {
      const Case t(Ci, Co, size[0], size[1], size[2]);
      for (bool flag : {false, true}) {
        forward_case(forward, t, columns, flag);
        gradient_case(gradient, t, columns, flag);
      }
    }
  }
  const bool good[] = {forward.end(), gradient.end()};
  return good[0] && good[1];
}

}  // namespace

bool halo() {
  // Two or three chunks of input channels, the last not always whole, and columns that are not all there
  const bool good[] = {halo_of(16, 48, 32), halo_of(32, 80, 48), halo_of(64, 80, 48), halo_of(128, 80, 112)};
  return good[0] && good[1] && good[2] && good[3];
}

}  // namespace sanitize
