// What the copy engine does, on the CPU: boxes of a tensor, their clipping, and their order in shared memory.
#pragma once

#include <cstring>
#include <string>

#include "host_memory.h"
#include "wgmma_block.h"

namespace fed {

static_assert(sizeof(Boxes) <= sizeof(TensorMap), "what emulates a map fits in one");

// What the driver would refuse, or "".
inline std::string wrong_boxes(const Boxes& boxes) {
  const auto text = [](auto number) { return std::to_string(number); };
  if (boxes.base == nullptr || uintptr_t(boxes.base) % 16 != 0) return "the base is not 16-byte aligned";
  if (boxes.swizzle != 32 && boxes.swizzle != 64 && boxes.swizzle != 128) return "no swizzle of " + text(boxes.swizzle);
  if (boxes.extent[0] * 2 != boxes.swizzle) return "rows of " + text(boxes.extent[0] * 2) + " bytes, not the swizzle's";
  for (int i = 0; i < 5; ++i) {
    if (boxes.size[i] < 1 || boxes.size[i] > int64_t(1) << 32) return "size " + text(boxes.size[i]);
    if (boxes.extent[i] < 1 || boxes.extent[i] > 256) return "extent " + text(boxes.extent[i]);
    if (i < 4 && (boxes.stride[i] < 1 || boxes.stride[i] % 16 != 0 || boxes.stride[i] >= int64_t(1) << 40))
      return "stride " + text(boxes.stride[i]);
  }
  return "";
}

inline void set_boxes(const Boxes& boxes, TensorMap& map) { std::memcpy(map.opaque, &boxes, sizeof boxes); }
inline Boxes boxes_of(const TensorMap& map) {
  Boxes boxes;
  std::memcpy(&boxes, map.opaque, sizeof boxes);
  if (const std::string wrong = wrong_boxes(boxes); !wrong.empty()) throw Misuse("a map that was not made: " + wrong);
  return boxes;
}
inline int box_bytes(const Boxes& boxes) {
  int bytes = 2;
  for (int extent : boxes.extent) bytes *= extent;
  return bytes;
}

// f(offset of a row in shared memory, its address in the tensor or null where it is outside, its bytes inside)
template <class F>
void for_rows(const Boxes& boxes, int offset, const Corner& corner, F f) {
  const int64_t inner = boxes.size[0] - corner.at[0];
  const int length = int(std::min<int64_t>(std::max<int64_t>(inner, 0), boxes.extent[0]));
  int row = offset, i[5] = {};
  for (i[4] = 0; i[4] < boxes.extent[4]; ++i[4])
    for (i[3] = 0; i[3] < boxes.extent[3]; ++i[3])
      for (i[2] = 0; i[2] < boxes.extent[2]; ++i[2])
        for (i[1] = 0; i[1] < boxes.extent[1]; ++i[1], row += boxes.swizzle) {
          bool inside = length > 0;
          int64_t from = int64_t(corner.at[0]) * 2;
          for (int d = 1; d < 5; ++d) {
            const int64_t at = int64_t(corner.at[d]) + i[d];
            inside = inside && at >= 0 && at < boxes.size[d];
            from += at * boxes.stride[d - 1];
          }
          f(row, inside ? static_cast<const char*>(boxes.base) + from : nullptr, length * 2);
        }
}

// Offset of a 16-byte piece of a row of `swizzle` bytes, by the address.
inline int stored_piece(int row, int piece, int swizzle) {
  return swizzle == 128  ? swizzled_piece<128>(row, piece)
         : swizzle == 64 ? swizzled_piece<64>(row, piece)
                         : swizzled_piece<32>(row, piece);
}

inline void load_box(const Boxes& boxes, char* shared, int offset, const Corner& corner) {
  for_rows(boxes, offset, corner, [&](int row, const char* from, int bytes) {
    // Elements before the first are outside as well
    const int before = std::min(std::max(-corner.at[0] * 2, 0), boxes.swizzle);
    char line[128] = {};
    if (from != nullptr && before < bytes) std::memcpy(line + before, from + before, bytes - before);
    for (int piece = 0; piece < boxes.swizzle / 16; ++piece)
      std::memcpy(shared + stored_piece(row, piece, boxes.swizzle), line + piece * 16, 16);
  });
}

inline void store_box(const Boxes& boxes, const char* shared, int offset, const Corner& corner) {
  for_rows(boxes, offset, corner, [&](int row, const char* to, int bytes) {
    const int before = std::min(std::max(-corner.at[0] * 2, 0), boxes.swizzle);
    char line[128];
    for (int piece = 0; piece < boxes.swizzle / 16; ++piece)
      std::memcpy(line + piece * 16, shared + stored_piece(row, piece, boxes.swizzle), 16);
    if (to != nullptr && before < bytes) std::memcpy(const_cast<char*>(to) + before, line + before, bytes - before);
  });
}

}  // namespace fed
