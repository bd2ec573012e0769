// The driver's memory on the host, and launchers that run blocks one thread after the other. SANITIZE_SKIP names a
// launcher that does nothing, as a kernel without a body would.
#include <cstdlib>
#include <cstring>

#include "distillation_loss.h"
#include "halo_conv.h"
#include "pack.h"
#include "perturb_step.h"
#include "sanitize_driver.h"

namespace sanitize {

int devices() { return 1; }
void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void release(void* memory) { std::free(memory); }
void fill(void* memory, int byte, size_t bytes) { std::memset(memory, byte, bytes); }
void upload(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void download(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
std::string synchronise() { return ""; }

}  // namespace sanitize

namespace fed {
namespace {

bool skipped(const char* name) {
  const char* skip = std::getenv("SANITIZE_SKIP");
  return skip != nullptr && std::strcmp(skip, name) == 0;
}

template <class Scratch, int THREADS, class F>
void run(unsigned grid, F f) {
  for (unsigned n = 0; n < grid; ++n) {
    HostBlock<THREADS> block{int(n), false};
    Scratch scratch;
    std::memset(static_cast<void*>(&scratch), 0xff, sizeof scratch);
    f(block, scratch);
  }
}

}  // namespace

template <class T>
int launch_both(const BothArgs<T>& args, const ScalarArgs<typename Arithmetic<T>::type>& scalars, void*) {
  using A = typename Arithmetic<T>::type;
  if (skipped("launch_both")) return 0;
  run<LossScratch<A>, ROW_THREADS>(
      both_grid(args), [&](auto& block, auto& scratch) { both_body(block, scratch, args); });
  run<RowScratch<A>, ROW_THREADS>(1, [&](auto& block, auto& scratch) { scalar_body(block, scratch, scalars); });
  return 0;
}

template <class T>
int launch_pairs(const PairsArgs<T>& args, const MeanArgs<typename Arithmetic<T>::type>& means, void*) {
  using A = typename Arithmetic<T>::type;
  if (skipped("launch_pairs")) return 0;
  run<RowScratch<A>, ROW_THREADS>(
      pairs_grid(args), [&](auto& block, auto& scratch) { pairs_body(block, scratch, args); });
  run<RowScratch<A>, ROW_THREADS>(1, [&](auto& block, auto& scratch) { mean_body(block, scratch, means); });
  return 0;
}

template <class T>
int launch_ods(const OdsArgs<T>& args, void*) {
  using A = typename Arithmetic<T>::type;
  if (skipped("launch_ods")) return 0;
  run<RowScratch<A>, ROW_THREADS>(
      unsigned(args.B), [&](auto& block, auto& scratch) { ods_body(block, scratch, args); });
  return 0;
}

template <class T, class G>
int launch_step(const StepArgs<T, G>& args, void*) {
  using A = typename Arithmetic<T>::type;
  if (skipped("launch_step")) return 0;
  run<StepScratch<A>, STEP_THREADS>(
      unsigned(args.B), [&](auto& block, auto& scratch) { step_body(block, scratch, args); });
  return 0;
}

template <class A>
int launch_pack(const PackArgs<A>& args, void*) {
  if (skipped("launch_pack")) return 0;
  run<TileScratch<A>, TILE_THREADS>(
      args.table.tiles, [&](auto& block, auto& scratch) { pack_body(block, scratch, args); });
  return 0;
}

namespace {

template <class Shape, class Epilogue>
int halo_shape(const HaloArgs<Epilogue>& args) {
  using Block = HostTensorBlock<Shape::THREADS>;
  std::vector<Words> shared(HALO_SHARED<Shape> / 16 + 1);
  for (int n = 0; n < halo_grid<Shape>(args); ++n) {
    std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(Words));
    Block block(n, false, reinterpret_cast<char*>(shared.data()));
    HaloBlock<Block, Shape, Epilogue>(block, args).run();
  }
  return 0;
}

}  // namespace

template <class Epilogue>
int launch_halo(const HaloArgs<Epilogue>& args, int columns, void*) {
  if (skipped("launch_halo")) return 0;
  return columns == 16   ? halo_shape<Halo16>(args)
         : columns == 32 ? halo_shape<Halo32>(args)
         : columns == 64 ? halo_shape<Halo64>(args)
                         : halo_shape<Halo128>(args);
}

#define FED_ROWS_OF(T)                                                                            \
  template int launch_both<T>(const BothArgs<T>&, const ScalarArgs<Arithmetic<T>::type>&, void*); \
  template int launch_pairs<T>(const PairsArgs<T>&, const MeanArgs<Arithmetic<T>::type>&, void*); \
  template int launch_ods<T>(const OdsArgs<T>&, void*);
FED_ROWS_OF(float)
FED_ROWS_OF(double)
FED_ROWS_OF(bf16)
FED_ROWS_OF(half)

#define FED_STEP_OF(T, G) template int launch_step<T, G>(const StepArgs<T, G>&, void*);
FED_STEP_OF(double, double)
FED_STEP_OF(float, float)
FED_STEP_OF(float, bf16)
FED_STEP_OF(float, half)
FED_STEP_OF(bf16, float)
FED_STEP_OF(bf16, bf16)
FED_STEP_OF(bf16, half)
FED_STEP_OF(half, float)
FED_STEP_OF(half, bf16)
FED_STEP_OF(half, half)

template int launch_pack<float>(const PackArgs<float>&, void*);
template int launch_pack<double>(const PackArgs<double>&, void*);

template int launch_halo<HaloForward>(const HaloArgs<HaloForward>&, int, void*);
template int launch_halo<HaloGradient>(const HaloArgs<HaloGradient>&, int, void*);

}  // namespace fed
