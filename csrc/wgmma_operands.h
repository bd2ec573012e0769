// What the wgmma convolutions, wide and narrow, are given: the tensors and parameters of one side, the maps that boxes
// are cut by, and the geometry that both sides of a launch share.
#pragma once

#include "conv_steps.h"
#include "halo_epilogue.h"
#include "wgmma_block.h"

namespace fed {

// A bf16 tensor [G or 1, N, H, W, C], 16-byte aligned.
struct Activation {
  const bf16* values;  // or nullptr
  int H, W, C;
  bool shared;  // one for all groups
};

// A convolution of up to two sources, or its data gradient, in the kernel's terms: it makes `channels` of N x H x W
// positions; source 0 is convolved (or d is, back), source 1 multiplied by a 1x1 kernel.
struct ConvGeometry {
  int N, H, W, channels;  // of the result
  int phases_stride;  // of the result's phases: the gradient's stride, or 1
  int in_stride;  // of source 0's phases: the convolution's stride, or 1 for a gradient
  int sources;
  int in_channels[2];
  int in_H, in_W;  // source 0's positions
  ConvTile tile;
  ConvSteps steps;
};

FED_HD int phase_row(int phase, int stride) { return stride == 1 ? 0 : phase / stride; }
FED_HD int phase_column(int phase, int stride) { return stride == 1 ? 0 : phase % stride; }
FED_HD int phase_height(const ConvGeometry& at, int phase) {
  return phase_size(at.H, at.phases_stride, phase_row(phase, at.phases_stride));
}
FED_HD int phase_width(const ConvGeometry& at, int phase) {
  return phase_size(at.W, at.phases_stride, phase_column(phase, at.phases_stride));
}

// One side of a launch. Rows are by slot, those of norm_a, norm_b and norm_c by group.
struct ConvSide {
  TensorMap in[MOST_PHASES];  // by phase of source 0
  TensorMap second, norm_z;
  TensorMap weight[2];  // by source
  TensorMap out[MOST_PHASES], residual[MOST_PHASES];  // by phase of the result
  TensorMap other[MOST_PHASES];  // forward: the second output; gradient: z
  const int32_t* weight_index;  // [groups]
  int groups;
  bool in_shared, second_shared;
  bool has_second;  // source 1 of the geometry
  int residual_phases;  // bit p: phase p of the result has a residual
  bool relu;  // forward
  bool residual_first;  // gradient: before mask and scale
  bool in_relu;  // after in_scale and in_shift
  Rows in_scale, in_shift, norm_a, norm_b, norm_c;
  Rows bias, second_bias, next_scale, next_shift, center;  // forward
  Rows scale, mean, inv_std, mask_scale, mask_shift;  // gradient
  uint8_t* mask_out;  // [groups, N, H, W, channels / 8] or nullptr
  const uint8_t* mask_in;
  float* statistics;  // [groups, rows, 2, channels] or nullptr
};

FED_HD bool has_second_output(const ConvSide& side) { return side.next_scale.values != nullptr; }
FED_HD bool has_norm(const ConvSide& side) { return side.norm_a.values != nullptr; }
FED_HD bool has_z(const ConvSide& side) { return side.mean.values != nullptr; }

// The tensors that a side's maps are of; `z` is a gradient's.
struct SideTensors {
  Activation in, second, norm_z, residual, z;
  int second_stride;  // forward: every so many-th position of it is read
  int residual_stride;  // forward: likewise; gradient: every so many-th position of the result has one
  const bf16* weight[2];  // [slots, taps, in_channels, channels]
  int slots, taps;  // of weight[0]; weight[1] has one tap
  bf16 *out, *activated;  // [groups, N, H, W, channels]; activated: forward, or nullptr
};

// Channels in a box's rows, so that a row is 128, 64 or 32 bytes.
struct Chunks {
  int in, out;
  int weight_rows, weight_columns;  // of a box of weights
};

// Why neither kernel covers a gradient with such strides, or nullptr.
inline const char* uncovered_strides(int stride, int residual_stride, bool second, int second_stride) {
  if (residual_stride != stride && residual_stride != 1) return "residual_stride is neither 1 nor the convolution's";
  return second && second_stride != stride ? "second_stride is not the convolution's" : nullptr;
}

// A map of the positions of one phase, in boxes of `chunk` channels x columns x images x rows.
inline int phase_map(
    const Activation& of, int groups, int N, int stride, int phase, int chunk, const int (&box)[3], TensorMap& map) {
  const int64_t py = phase / stride, px = phase % stride, C = of.C, W = phase_size(of.W, stride, int(px)),
                H = phase_size(of.H, stride, int(py)), row = of.W * C * 2;
  if (of.values == nullptr || W == 0 || H == 0) return 0;
  return make_map({of.values + (py * of.W + px) * C, {C, W, N, H, of.shared ? 1 : groups},
                   {stride * C * 2, of.H * row, stride * row, N * of.H * row}, {chunk, box[0], box[1], box[2], 1},
                   chunk * 2}, map);
}

inline int weight_map(
    const bf16* weight, int slots, int taps, int rows, int columns, const Chunks& chunks, TensorMap& map) {
  const int64_t row = columns * int64_t(2), tap = row * rows;
  if (weight == nullptr) return 0;
  return make_map({weight, {columns, rows, taps, slots, 1}, {row, tap, tap * taps, tap * taps * slots},
                   {chunks.weight_columns, chunks.weight_rows, 1, 1, 1}, chunks.weight_columns * 2}, map);
}

// All maps of a side. 0, or a CUDA error.
inline int side_maps(const ConvGeometry& at, const SideTensors& of, const Chunks& chunks, ConvSide& side) {
  const int in_box[3] = {at.steps.columns, at.tile.images, at.tile.rows + at.steps.border};
  const int out_box[3] = {TILE_COLUMNS, at.tile.images, at.tile.rows};
  int status = 0;
  const auto map = [&](const Activation& what, int stride, int phase, int chunk, const int (&box)[3], TensorMap& to) {
    if (status == 0) status = phase_map(what, side.groups, at.N, stride, phase, chunk, box, to);
  };
  for (int phase = 0; phase < at.in_stride * at.in_stride; ++phase)
    map(of.in, at.in_stride, phase, chunks.in, in_box, side.in[phase]);
  map(of.second, of.second_stride, 0, chunks.in, in_box, side.second);
  map(of.norm_z, 1, 0, chunks.in, in_box, side.norm_z);
  const int stride = at.phases_stride;
  const Activation out{of.out, at.H, at.W, at.channels, false}, activated{of.activated, at.H, at.W, at.channels, false};
  for (int phase = 0; phase < stride * stride; ++phase) {
    map(out, stride, phase, chunks.out, out_box, side.out[phase]);
    map(activated.values != nullptr ? activated : of.z, stride, phase, chunks.out, out_box, side.other[phase]);
  }
  // A residual of every position of the result, or of those of phase 0 alone; forward there is no other phase.
  const bool everywhere = stride > 1 && of.residual_stride == 1;
  side.residual_phases = of.residual.values == nullptr ? 0 : everywhere ? (1 << stride * stride) - 1 : 1;
  for (int phase = 0; phase < (everywhere ? stride * stride : 1); ++phase)
    map(of.residual, everywhere ? stride : stride > 1 ? 1 : of.residual_stride, phase, chunks.out, out_box,
        side.residual[phase]);
  for (int source = 0; status == 0 && source < at.sources; ++source)
    status = weight_map(of.weight[source], of.slots, source == 0 ? of.taps : 1, at.in_channels[source], at.channels,
                        chunks, side.weight[source]);
  return status;
}

struct ConvWindow {
  int kernel, stride, padding;
};

// The geometry of a convolution of in_H x in_W positions to H x W, or of the gradient that makes H x W positions of
// in_H x in_W. Steps that read a phase without positions are left out: they read zeros.
inline ConvGeometry conv_geometry(
    const ConvWindow& window, bool gradient, bool copies, int N, int in_H, int in_W, int H, int W, int in_channels,
    int second_channels, int second_stride, int channels) {
  ConvGeometry at{};
  at.N = N;
  at.H = H;
  at.W = W;
  at.channels = channels;
  at.phases_stride = gradient ? window.stride : 1;
  at.in_stride = gradient ? 1 : window.stride;
  at.sources = second_channels > 0 ? 2 : 1;
  at.in_channels[0] = in_channels;
  at.in_channels[1] = second_channels;
  at.in_H = in_H;
  at.in_W = in_W;
  at.tile = conv_tile(N, phase_height(at, 0), phase_width(at, 0));
  const ConvSource sources[2] = {{window.kernel, window.stride, window.padding}, {1, second_stride, 0}};
  at.steps = conv_steps(sources, at.sources, gradient, copies);
  const auto read = [&](const ConvStep& step) {
    return step.source == 1 || (phase_size(in_H, at.in_stride, phase_row(step.phase, at.in_stride)) > 0 &&
                                phase_size(in_W, at.in_stride, phase_column(step.phase, at.in_stride)) > 0);
  };
  int kept = 0;
  for (int phase = 0, step = 0; phase < at.steps.phases; ++phase) {
    const int end = at.steps.first_step[phase + 1];
    at.steps.first_step[phase] = kept;
    for (; step < end; ++step)
      if (read(at.steps.step[step])) at.steps.step[kept++] = at.steps.step[step];
  }
  at.steps.first_step[at.steps.phases] = kept;
  return at;
}

// Blocks that share the tiles of a group's block of channels: what the multiprocessors take at once, at most one for
// each of `items`.
FED_HD int block_parts(int groups, int channel_blocks, int items, int multiprocessors) {
  const int parts = multiprocessors / (groups * channel_blocks > 0 ? groups * channel_blocks : 1);
  return parts < 1 ? 1 : parts > items ? (items > 0 ? items : 1) : parts;
}

// What a block works for: a group of a side, a block of channels, and which of the blocks that share its tiles it is.
// Neighbours differ in channels: they read the same boxes.
struct BlockWork {
  int side, group, channels, part;
};
FED_HD BlockWork block_work(int index, int first_groups, int channel_blocks, int parts) {
  const int rest = index / channel_blocks, group = rest / parts;
  const bool second = group >= first_groups;
  return {int(second), second ? group - first_groups : group, index - rest * channel_blocks, rest - group * parts};
}

// One launch, as either kernel takes it; the second side of a single one has no groups.
struct ConvLaunch {
  ConvGeometry at;
  bool gradient;
  SideTensors tensors[2];
  ConvSide side[2];  // without maps
  int multiprocessors;
};
FED_HD int groups_of(const ConvLaunch& launch) { return launch.side[0].groups + launch.side[1].groups; }

// Up to so many channels the narrow kernel makes, the wide one the rest.
constexpr int NARROW_CHANNELS = 32;

}  // namespace fed
