// Which elements of shared memory wgmma reads for an operand, against what the emulation takes for granted.
#include "host_operands.h"
#include "wgmma_driver.h"
#include "wgmma_read_operand.h"

namespace driver {
namespace {

using sanitize::Buffer;

// Operands of one form, their number, and how many were read as either hypothesis has it; of those that start at a
// multiple of eight rows and whose eights of rows lie at multiples of 1024 bytes, all are the same by both.
struct Count {
  int all = 0, address = 0, offset = 0, aligned = 0, aligned_right = 0;
  std::string first;  // that was not as the address has it
};

template <class Kernel>
class Reading {
 public:
  Reading(std::string form, bool of_a, bool k_innermost) : form(std::move(form)), of_a(of_a), k_innermost(k_innermost) {
    for (int pass = 0; pass < 2; ++pass) {
      std::vector<bf16> values(Kernel::BYTES / 2);
      for (size_t i = 0; i < values.size(); ++i) values[i] = narrow<bf16>(float(i >> 8 * pass & 255));
      memory.push_back(std::make_unique<Buffer<bf16>>(values));
    }
  }

  std::string read(int start, int leading, int stride, int swizzle) {
    std::vector<int> found(Kernel::SIZE * 16);
    for (int pass = 0; pass < 2; ++pass) {
      const Buffer<float> result(found.size());
      Kernel kernel{*memory[pass], result, start, leading, stride, swizzle};
      if (const std::string error = after(launch_wgmma(kernel, nullptr)); !error.empty()) return error;
      const std::vector<float> values = result.read();
      for (size_t i = 0; i < found.size(); ++i) found[i] += int(values[i]) << 8 * pass;
    }
    const std::vector<int> address = expected(start, leading, stride, swizzle, SwizzleOf::ADDRESS);
    const bool right = found == address, aligned = start % (8 * swizzle) < swizzle && stride % 1024 == 0 && leading % 1024 == 0;
    count.all += 1;
    count.address += right;
    count.offset += found == expected(start, leading, stride, swizzle, SwizzleOf::OFFSET);
    count.aligned += aligned;
    count.aligned_right += aligned && right;
    if (!right && count.first.empty()) {
      size_t i = 0;
      while (found[i] == address[i]) ++i;
      count.first = "start " + std::to_string(start) + " leading " + std::to_string(leading) + " stride " +
                    std::to_string(stride) + " swizzle " + std::to_string(swizzle) + ": element " +
                    std::to_string(i / 16) + ", k " + std::to_string(i % 16) + " was read at byte " +
                    std::to_string(2 * found[i]) + ", expected " + std::to_string(2 * address[i]);
    }
    return "";
  }

  // Every form that a kernel uses, and shifts of 0 to 63 rows.
  std::string read_all(const std::vector<int>& swizzles) {
    for (int swizzle : swizzles)
      for (int rows : {8, 10, 18})
        for (int shift = 0; shift < 64; shift += step()) {
          const std::vector<int> leadings = k_innermost ? std::vector<int>{0} : std::vector<int>{swizzle, 8192};
          for (int leading : leadings)
            for (int along = 0; along < (k_innermost ? swizzle : 32); along += 32) {
              const std::string wrong = read(shift * swizzle + along, leading, rows * swizzle, swizzle);
              if (!wrong.empty()) return form + ": " + wrong;
            }
        }
    return "";
  }

  const std::string form;
  const bool of_a, k_innermost;
  Count count;

 private:
  // The element of shared memory, of every element of the operand and every k.
  std::vector<int> expected(int start, int leading, int stride, int swizzle, SwizzleOf by) const {
    const SwizzleOf before = swizzle_of;
    swizzle_of = by;
    std::vector<int> elements(Kernel::SIZE * 16);
    for_pieces(Operand(operand(start, leading, stride, swizzle)), k_innermost, Kernel::SIZE,
               [&](int row, int piece, int offset) {
                 for (int i = 0; i < 8; ++i)
                   elements[k_innermost ? row * 16 + piece * 8 + i : (piece * 8 + i) * 16 + row] = offset / 2 + i;
               });
    swizzle_of = before;
    return elements;
  }

  std::vector<std::unique_ptr<Buffer<bf16>>> memory;
};

std::string run() {
  std::string json, wrong, first;
  bool tile = true, copies = true;
  const auto all = [&](auto reading, const std::vector<int>& swizzles) {
    if (!wrong.empty()) return;
    wrong = reading.read_all(swizzles);
    const Count& of = reading.count;
    tile = tile && of.address == of.all;
    copies = copies && of.aligned_right == of.aligned;
    if (first.empty()) first = of.first;
    json += (json.empty() ? "{" : ", ") + ("\"" + reading.form + "\": {\"all\": ") + std::to_string(of.all) +
            ", \"address\": " + std::to_string(of.address) + ", \"offset\": " + std::to_string(of.offset) +
            ", \"aligned\": " + std::to_string(of.aligned) + ", \"aligned right\": " + std::to_string(of.aligned_right) +
            ", \"first\": \"" + of.first + "\"}";
  };
  all(Reading<ReadOperand<false, true, 256>>("B 256 K innermost", false, true), {128});
  all(Reading<ReadOperand<false, true, 64>>("B 64 K innermost", false, true), {128, 64, 32});
  all(Reading<ReadOperand<false, false, 192>>("B 192 N innermost", false, false), {128, 64});
  all(Reading<ReadOperand<false, false, 64>>("B 64 N innermost", false, false), {128, 64, 32});
  all(Reading<ReadOperand<true, true, 16>>("A K innermost", true, true), {128, 64, 32});
  all(Reading<ReadOperand<true, false, 16>>("A M innermost", true, false), {128, 64, 32});
  if (!wrong.empty()) return wrong;
  say("descriptors " + json + "}");
  say(tile ? "layout tile" : copies ? "layout copies" : "layout none");
  return tile || copies ? "" : first;
}

}  // namespace

void add_operands(std::vector<Test>& tests) { tests.push_back({"operands", false, run}); }

}  // namespace driver
