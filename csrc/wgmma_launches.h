// Which kernel makes a convolution's launch: the wide one, or the narrow one up to NARROW_CHANNELS channels.
#pragma once

#include "wgmma_conv.h"

namespace fed {

FED_HD bool is_narrow(const ConvLaunch& launch) { return launch.at.channels <= NARROW_CHANNELS; }

// Rows of partial sums of a group: a pure function of shapes, groups and multiprocessors.
inline int statistics_rows(const ConvLaunch& launch) { return wide_statistics_rows(launch); }

// Why no kernel makes a launch, or nullptr.
inline const char* uncovered(const ConvLaunch& launch) {
  if (is_narrow(launch)) return "32 channels or fewer";  // until the narrow kernel is here
  return wide_uncovered(launch);
}

// Puts a covered launch on a stream; 0 or the CUDA error.
inline int launch_conv(const ConvLaunch& launch, void* stream) {
  return launch_wide(launch, stream);
}

}  // namespace fed
