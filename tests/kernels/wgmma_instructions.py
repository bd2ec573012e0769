"""Writes csrc/wgmma_instructions.h: one form of the instruction for every N, as it names each of its registers.

python -m tests.kernels.wgmma_instructions
"""

from collections.abc import Iterator
from pathlib import Path

PATH = Path(__file__).parents[2] / "csrc/wgmma_instructions.h"
COLUMNS = (16, 32, 48, 64, 96, 128, 192, 256)
HEADER = """\
// wgmma.mma_async in bf16 with float32 accumulators, both operands in shared memory: 64 x N by 16 (PTX ISA 9.7.15.5).
// An instruction names each of its registers, so there is a form for every N. Without `add` the accumulators are not
// read. Written by tests/kernels/wgmma_instructions.py.
#pragma once

#include "numbers.h"

// Where there are such instructions.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FED_WGMMA
#endif

#ifdef FED_WGMMA
namespace fed {
"""


def lines(items: list[str], first: str, rest: str, width: int = 118) -> Iterator[str]:
    """``items`` with commas between them, cut into lines that start with ``first`` and then with ``rest``."""
    line = first
    for item in [*(f"{item}," for item in items[:-1]), items[-1]]:
        if len(line) + len(item) + 1 > width:
            yield line.rstrip()
            line = rest
        line += f"{item} "
    yield line.rstrip()


def form(columns: int) -> Iterator[str]:
    """The function for 64 x ``columns`` results."""
    count = columns // 2
    yield "template <bool M_INNERMOST, bool N_INNERMOST>"
    yield f"__device__ __forceinline__ void wgmma(float (&d)[{count}], uint64_t a, uint64_t b, bool add) {{"
    yield "  asm volatile("
    yield f'      "{{.reg .pred p; setp.ne.b32 p, %{count + 2}, 0; "'
    yield f'      "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{"'
    for text in lines([f"%{i}" for i in range(count)], "", "", 108):
        yield f'      "{text}"'
    yield f'      "}}, %{count}, %{count + 1}, p, 1, 1, %{count + 3}, %{count + 4};}}"'
    yield from lines([f'"+f"(d[{i}])' for i in range(count)], "      : ", "        ")
    yield '      : "l"(a), "l"(b), "r"(int(add)), "n"(int(M_INNERMOST)), "n"(int(N_INNERMOST)));'
    yield "}"


def text() -> str:
    """The header."""
    forms = ("\n".join(form(columns)) for columns in COLUMNS)
    return HEADER + "\n" + "\n\n".join(forms) + "\n\n}  // namespace fed\n#endif\n"


if __name__ == "__main__":
    PATH.write_text(text())
