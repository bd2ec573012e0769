// Which kernel makes a convolution's launch: the wide one, or the narrow one up to NARROW_CHANNELS channels.
#pragma once

#include "wgmma_conv.h"
#include "wgmma_narrow.h"

namespace fed {

// So many channels of the inputs have weights that fit beside the narrow kernel's boxes.
constexpr int NARROW_IN_CHANNELS = 128;

inline bool is_narrow(const ConvLaunch& launch) {
  return launch.at.channels <= NARROW_CHANNELS &&
         std::max(launch.at.in_channels[0], launch.at.in_channels[1]) <= NARROW_IN_CHANNELS;
}

// Rows of partial sums of a group: a pure function of shapes, groups and multiprocessors.
inline int statistics_rows(const ConvLaunch& launch) {
  return is_narrow(launch) ? narrow_statistics_rows(launch) : wide_statistics_rows(launch);
}

// Why no kernel makes a launch, or nullptr.
inline const char* uncovered(const ConvLaunch& launch) {
  const auto& [one, other] = launch.side;
  if (is_narrow(launch) && one.groups > 0 && other.groups > 0 && one.has_second != other.has_second)
    return "a second source of one side, with few channels of the result";
  return is_narrow(launch) ? narrow_uncovered(launch) : wide_uncovered(launch);
}

// Puts a covered launch on a stream; 0 or the CUDA error.
inline int launch_conv(const ConvLaunch& launch, void* stream) {
  return is_narrow(launch) ? launch_narrow(launch, stream) : launch_wide(launch, stream);
}

}  // namespace fed
