// fold, un-fold, packing and step of rank-one factors for CPU and CUDA tensors: operands, outputs, registration.
#include "rank_one.h"

#include <cstring>

#include "operands.h"

namespace fed {
namespace {

using Fields = std::vector<int64_t>;

// ---- CPU: a row is one output channel of one branch

template <class A>
void fold_row(const Layer& layer, const A* w, const A* r, A s, A* out) {
  for (int i = 0; i < layer.Ci; ++i)
    for (int t = 0; t < layer.taps; ++t) out[i * layer.taps + t] = folded_weight(s, w[i * layer.taps + t], r[i]);
}

template <class A>
const A* factors_r(const RankOneArgs<A>& args, const Layer& layer, int64_t k, int64_t o) {
  return args.deviations + k * args.R + layer.r + o / layer.group_Co() * layer.Ci;
}

template <class A>
void fold_on_cpu(const RankOneArgs<A>& args, const Layer& layer) {
  const int64_t row = int64_t(layer.Ci) * layer.taps;
  parallel(args.K * layer.Co, row, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t k = n / layer.Co, o = n % layer.Co;
      const A s = args.deviations[k * args.R + layer.s + o];
      A* out = args.out + k * args.ranked;
      fold_row(layer, args.parameters + layer.weight + o * row, factors_r(args, layer, k, o), s,
               out + layer.weight + o * row);
      if (layer.bias >= 0) out[layer.bias + o] = (A(1) + s) * args.parameters[layer.bias + o];
    }
  });
}

// dW, db and ds of output channels [begin, end), and this piece's share of dr in `dr` [K, Ci of all groups].
template <class A>
void unfold_rows(
    const RankOneArgs<A>& args, const Layer& layer, int64_t begin, int64_t end, A* gradient, A* factors, A* dr) {
  const int64_t row = int64_t(layer.Ci) * layer.taps;
  for (int64_t o = begin; o < end; ++o) {
    const A* w = args.parameters + layer.weight + o * row;
    A* dW = gradient + layer.weight + o * row;
    std::fill(dW, dW + row, A(0));
    if (layer.bias >= 0) gradient[layer.bias + o] = 0;
    for (int64_t k = 0; k < args.K; ++k) {
      const A* d = args.branch_gradients + k * args.ranked + layer.weight + o * row;
      const A* r = factors_r(args, layer, k, o);
      const A s = A(1) + args.deviations[k * args.R + layer.s + o];
      A* dr_k = dr + k * layer.all_Ci() + o / layer.group_Co() * layer.Ci;
      A ds = 0;
      for (int i = 0; i < layer.Ci; ++i) {
        const A r_i = A(1) + r[i], factor = s * r_i;
        A sum = 0;
        for (int t = 0; t < layer.taps; ++t) {
          const int64_t at = int64_t(i) * layer.taps + t;
          dW[at] += factor * d[at];
          sum += w[at] * d[at];
        }
        ds += r_i * sum;
        dr_k[i] += s * sum;
      }
      if (layer.bias >= 0) {
        const A db = args.branch_gradients[k * args.ranked + layer.bias + o];
        ds += args.parameters[layer.bias + o] * db;
        gradient[layer.bias + o] += s * db;
      }
      factors[k * args.R + layer.s + o] = ds;
    }
  }
}

template <class A>
void unfold_on_cpu(const RankOneArgs<A>& args, const Layer& layer, A* gradient, A* factors) {
  // A fixed number of pieces, added up in order: the result does not depend on the number of threads.
  constexpr int64_t PIECES = 8;
  const int64_t width = args.K * layer.all_Ci(), each = (layer.Co + PIECES - 1) / PIECES;
  std::vector<A> dr(PIECES * width, A(0));
  parallel(PIECES, args.K * each * layer.Ci * layer.taps, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t from = std::min<int64_t>(piece * each, layer.Co), to = std::min<int64_t>(from + each, layer.Co);
      unfold_rows(args, layer, from, to, gradient, factors, dr.data() + piece * width);
    }
  });
  for (int64_t k = 0; k < args.K; ++k)
    for (int64_t i = 0; i < layer.all_Ci(); ++i) {
      A sum = 0;
      for (int64_t piece = 0; piece < PIECES; ++piece) sum += dr[piece * width + k * layer.all_Ci() + i];
      factors[k * args.R + layer.r + i] = sum;
    }
}

template <class A>
void update_on_cpu(A* p, A* v, const A* g, int64_t count, A learning_rate, A momentum, A weight_decay) {
  parallel(count, 3, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) nesterov(p[n], v[n], g[n], learning_rate, momentum, weight_decay);
  });
}

template <class A>
void pack_on_cpu(const RankOneArgs<A>& args, const Layer& layer) {
  const int64_t row = int64_t(layer.Ci) * layer.taps;
  parallel(args.K * layer.taps, int64_t(layer.Co) * layer.Ci, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t k = n / layer.taps, t = n % layer.taps, slot = layer.packed + (args.first_slot + k) * layer.size();
      for (int64_t o = 0; o < layer.Co; ++o) {
        const int64_t group = o / layer.group_Co(), local = o % layer.group_Co();
        const A* r = factors_r(args, layer, k, o);
        const A s = args.deviations[k * args.R + layer.s + o];
        const A* w = args.parameters + layer.weight + o * row + t;
        bf16* forward = args.packed + slot + t * layer.Ci * layer.Co + o;
        bf16* backward = args.packed_gradient + slot + group * layer.Ci +
                         ((layer.taps - 1 - t) * layer.group_Co() + local) * layer.all_Ci();
        for (int64_t i = 0; i < layer.Ci; ++i)
          forward[i * layer.Co] = backward[i] = narrow<bf16>(float(folded_weight(s, w[i * layer.taps], r[i])));
      }
    }
  });
}

// ---- all layers of the op's integers, a table at a time

template <class A, class F>
void for_tables(RankOneArgs<A>& args, const Fields& fields, F f) {
  int64_t at = 0, workspace = 0;
  const int64_t count = int64_t(fields.size());
  while (at < count) {
    at += fill_table<A>(args.table, fields.data() + at, count - at, args.K, workspace);
    f(at == count);
  }
}

template <class A>
Tensor new_workspace(RankOneArgs<A>& args, const Tensor& like, const Fields& fields) {
  int64_t size = 0, at = 0;
  const int64_t count = int64_t(fields.size());
  while (at < count) {
    at += fill_table<A>(args.table, fields.data() + at, count - at, args.K, size);
  }
  Tensor workspace = new_tensor(like, {size}, like.scalar_type());
  args.workspace = pointer<A>(workspace);
  return workspace;
}

// Every layer inside the buffers: `ranked` parameters, R factors, and the packings where there is one.
void check_layers(
    const char* op, const Fields& fields, int64_t ranked, int64_t R, int64_t K, const Tensor* packed,
    int64_t first_slot) {
  STD_TORCH_CHECK(
      !fields.empty() && fields.size() % FIELDS == 0, "fastensdistill::", op, ": fields has ", fields.size(),
      " integers; expected ", FIELDS, " for each layer, and a layer at least");
  const auto inside = [](int64_t from, int64_t count, int64_t size) { return from >= 0 && from <= size - count; };
  for (size_t at = 0; at < fields.size(); at += FIELDS) {
    const int64_t *f = fields.data() + at, Co = f[5], Ci = f[6], taps = f[7], groups = f[8];
    bool good = Co >= 1 && Ci >= 1 && taps >= 1 && groups >= 1 && Co % groups == 0 && Ci <= ranked / taps &&
                Co <= std::min<int64_t>(ranked, INT_MAX) / (Ci * taps);
    good = good && inside(f[0], Co * Ci * taps, ranked) && (f[1] == -1 || inside(f[1], Co, ranked)) &&
           inside(f[2], Ci * groups, R) && inside(f[3], Co, R);
    if (packed != nullptr)
      good = good && first_slot >= 0 && first_slot <= packed->numel() &&
             inside(f[4], (first_slot + K) * Co * Ci * taps, packed->numel());
    STD_TORCH_CHECK(
        good, "fastensdistill::", op, ": layer ", at / FIELDS, " of fields is ", text_of(Fields(f, f + FIELDS)),
        " with ", K, " branches from slot ", first_slot, "; expected offsets of weight, bias, r, s and packing, and ",
        "Co, Ci, taps and groups, inside ", ranked, " parameters, ", R, " factors and ", packed ? packed->numel() : 0,
        " packed weights");
  }
}

void check_parameters(const Operands& operands, bool dense = false) {
  const ScalarType type = operands.first.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double)
    operands.refuse("parameters", text_of(operands.first), "float32 or float64");
  operands.check("parameters", operands.first, type, {ANY}, dense);
}

// Deviations, packings and layers, for all four ops. `dense`: written in place.
void check_layout(
    const Operands& operands, const Tensor& parameters, const Tensor& deviations, const Fields& fields, int64_t ranked,
    const Tensor* packed = nullptr, const Tensor* packed_gradient = nullptr, int64_t first_slot = 0,
    bool dense = false) {
  operands.check("deviations", deviations, parameters.scalar_type(), {ANY, ANY}, dense);
  operands.check_counts("deviations", deviations, "[K, R]");
  if (ranked < 0 || ranked > parameters.numel())
    operands.refuse("ranked", std::to_string(ranked), "at most the " + std::to_string(parameters.numel()) +
                                                          " parameters");
  if (packed != nullptr) {
    operands.check("packed", *packed, ScalarType::BFloat16, {ANY}, true);
    operands.check("packed_gradient", *packed_gradient, ScalarType::BFloat16, {packed->numel()}, true);
  }
  check_layers(operands.op, fields, ranked, deviations.size(1), deviations.size(0), packed, first_slot);
}

template <class A>
void check_tiles(const RankOneArgs<A>& args) {
  STD_TORCH_CHECK(
      args.table.fits, "fastensdistill: a layer has more than the ", tile_row<A>, " taps of the CUDA kernel");
}

template <class A>
RankOneArgs<A> rank_one_args(const Tensor& parameters, const Tensor& deviations) {
  RankOneArgs<A> args{};
  args.parameters = pointer<A>(parameters);
  args.deviations = pointer<A>(deviations);
  args.K = int(deviations.size(0));
  args.R = deviations.size(1);
  return args;
}

template <class F>
auto dispatch_parameters(const Tensor& parameters, F f) {
  if (parameters.scalar_type() == ScalarType::Double) return f(Type<double>());
  STD_TORCH_CHECK(parameters.scalar_type() == ScalarType::Float, "fastensdistill: expected float32 or float64");
  return f(Type<float>());
}

template <bool CUDA>
Tensor fold_rank_one(Tensor parameters, Tensor deviations, Fields fields, int64_t ranked) {
  const Operands operands{"fold_rank_one", parameters};
  check_parameters(operands);
  check_layout(operands, parameters, deviations, fields, ranked);
  operands.check_device<CUDA>("parameters");
  const Tensor p = packed_copy(parameters), d = packed_copy(deviations);
  const Tensor folded = new_tensor(p, {d.size(0), ranked}, p.scalar_type());
  dispatch_parameters(p, [&](auto type) {
    using A = typename decltype(type)::type;
    RankOneArgs<A> args = rank_one_args<A>(p, d);
    args.out = pointer<A>(folded);
    args.ranked = ranked;
    for_tables(args, fields, [&](bool) {
      if constexpr (CUDA) {
#ifdef FED_CUDA
        const auto guard = on_device(p);
        check_tiles(args);
        check_launch(launch_fold(args, current_stream(p)));
#endif
      } else {
        for (int l = 0; l < args.table.count; ++l) fold_on_cpu(args, args.table.layers[l]);
      }
    });
  });
  return folded;
}

template <bool CUDA>
std::tuple<Tensor, Tensor> unfold_rank_one(
    Tensor branch_gradients, Tensor parameters, Tensor deviations, Fields fields) {
  const Operands operands{"unfold_rank_one", parameters};
  check_parameters(operands);
  operands.check("branch_gradients", branch_gradients, parameters.scalar_type(), {ANY, ANY});
  check_layout(operands, parameters, deviations, fields, branch_gradients.size(1));
  operands.check("branch_gradients", branch_gradients, parameters.scalar_type(), {deviations.size(0), ANY});
  operands.check_device<CUDA>("parameters");
  const Tensor g = packed_copy(branch_gradients), p = packed_copy(parameters), d = packed_copy(deviations);
  const Tensor gradient = new_tensor(p, {g.size(1)}, p.scalar_type());
  const Tensor factors = new_tensor(p, {d.size(0), d.size(1)}, p.scalar_type());
  dispatch_parameters(p, [&](auto type) {
    using A = typename decltype(type)::type;
    RankOneArgs<A> args = rank_one_args<A>(p, d);
    args.branch_gradients = pointer<A>(g);
    args.out = pointer<A>(gradient);
    args.factor_gradients = pointer<A>(factors);
    args.ranked = g.size(1);
    if constexpr (CUDA) {
#ifdef FED_CUDA
      const auto guard = on_device(p);
      const Tensor workspace = new_workspace(args, p, fields);
      for_tables(args, fields, [&](bool) {
        check_tiles(args);
        check_launch(launch_unfold(args, false, current_stream(p)));
      });
#endif
    } else {
      for_tables(args, fields, [&](bool) {
        for (int l = 0; l < args.table.count; ++l)
          unfold_on_cpu(args, args.table.layers[l], args.out, args.factor_gradients);
      });
    }
  });
  return {gradient, factors};
}

template <class A, bool CUDA>
void pack_all(RankOneArgs<A>& args, const Tensor& parameters, const Fields& fields) {
  for_tables(args, fields, [&](bool) {
    if constexpr (CUDA) {
#ifdef FED_CUDA
      const auto guard = on_device(parameters);
      check_tiles(args);
      check_launch(launch_pack(args, current_stream(parameters)));
#endif
    } else {
      for (int l = 0; l < args.table.count; ++l) pack_on_cpu(args, args.table.layers[l]);
    }
  });
}

template <bool CUDA>
void pack_rank_one(
    Tensor parameters, Tensor deviations, Tensor packed, Tensor packed_gradient, Fields fields, int64_t first_slot) {
  const Operands operands{"pack_rank_one", parameters};
  check_parameters(operands);
  check_layout(operands, parameters, deviations, fields, parameters.numel(), &packed, &packed_gradient, first_slot);
  operands.check_device<CUDA>("parameters");
  const Tensor p = packed_copy(parameters), d = packed_copy(deviations);
  dispatch_parameters(p, [&](auto type) {
    using A = typename decltype(type)::type;
    RankOneArgs<A> args = rank_one_args<A>(p, d);
    args.packed = pointer<bf16>(packed);
    args.packed_gradient = pointer<bf16>(packed_gradient);
    args.first_slot = int(first_slot);
    pack_all<A, CUDA>(args, p, fields);
  });
}

template <bool CUDA>
void rank_one_step(
    Tensor parameters, Tensor momentum_buffer, Tensor deviations, Tensor deviation_buffer, Tensor branch_gradients,
    Tensor plain_gradients, Tensor learning_rate, Tensor packed, Tensor packed_gradient, Fields fields,
    int64_t first_slot, double momentum, double weight_decay) {
  const Operands operands{"rank_one_step", parameters};
  check_parameters(operands, true);
  const ScalarType type = parameters.scalar_type();
  operands.check("plain_gradients", plain_gradients, type, {ANY});
  const int64_t ranked = parameters.numel() - plain_gradients.numel();
  if (ranked < 0)
    operands.refuse("plain_gradients", text_of(plain_gradients), "at most as many as " + text_of(parameters));
  check_layout(operands, parameters, deviations, fields, ranked, &packed, &packed_gradient, first_slot, true);
  operands.check("momentum_buffer", momentum_buffer, type, {parameters.numel()}, true);
  operands.check("deviation_buffer", deviation_buffer, type, {deviations.size(0), deviations.size(1)}, true);
  operands.check("branch_gradients", branch_gradients, type, {deviations.size(0), ranked});
  operands.check("learning_rate", learning_rate, type, {});
  operands.check_device<CUDA>("parameters");
  const Tensor g = packed_copy(branch_gradients), plain = packed_copy(plain_gradients);
  dispatch_parameters(parameters, [&](auto type) {
    using A = typename decltype(type)::type;
    RankOneArgs<A> args = rank_one_args<A>(parameters, deviations);
    args.momentum_buffer = pointer<A>(momentum_buffer);
    args.deviation_buffer = pointer<A>(deviation_buffer);
    args.branch_gradients = pointer<A>(g);
    args.plain_gradients = pointer<A>(plain);
    args.learning_rate = pointer<A>(learning_rate);
    args.packed = pointer<bf16>(packed);
    args.packed_gradient = pointer<bf16>(packed_gradient);
    args.ranked = g.size(1);
    args.first_slot = int(first_slot);
    args.momentum = A(momentum);
    args.weight_decay = A(weight_decay);
    if constexpr (CUDA) {
#ifdef FED_CUDA
      const auto guard = on_device(parameters);
      const Tensor workspace = new_workspace(args, parameters, fields);
      for_tables(args, fields, [&](bool last) {
        args.plain = last ? plain.numel() : 0;
        check_tiles(args);
        check_launch(launch_unfold(args, true, current_stream(parameters)));
      });
#endif
    } else {
      std::vector<A> gradient(args.ranked + plain.numel()), factors(args.K * args.R);
      for_tables(args, fields, [&](bool) {
        for (int l = 0; l < args.table.count; ++l)
          unfold_on_cpu(args, args.table.layers[l], gradient.data(), factors.data());
      });
      std::copy(args.plain_gradients, args.plain_gradients + plain.numel(), gradient.begin() + args.ranked);
      const A rate = *args.learning_rate, K = A(args.K);
      update_on_cpu(args.parameters, args.momentum_buffer, gradient.data(), int64_t(gradient.size()), rate,
                    args.momentum, args.weight_decay);
      update_on_cpu(args.deviations, args.deviation_buffer, factors.data(), int64_t(factors.size()), K * rate,
                    args.momentum, args.weight_decay / K);
    }
    pack_all<A, CUDA>(args, parameters, fields);
  });
}

template <bool CUDA>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("fold_rank_one", TORCH_BOX(&fold_rank_one<CUDA>));
  library.impl("unfold_rank_one", TORCH_BOX(&unfold_rank_one<CUDA>));
  library.impl("pack_rank_one", TORCH_BOX(&pack_rank_one<CUDA>));
  library.impl("rank_one_step", TORCH_BOX(&rank_one_step<CUDA>));
}

}  // namespace
}  // namespace fed

STABLE_TORCH_LIBRARY_IMPL(fastensdistill, CPU, library) { fed::implement<false>(library); }
#ifdef FED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastensdistill, CUDA, library) { fed::implement<true>(library); }
#endif
