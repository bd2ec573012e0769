"""Sums of rows in a fixed order, without atomics.

    out[set, r] = Σ_t rows[set, t · kept + r]

Weight gradients add the partial results of their splits with it (kept = 1), BatchNorm makes few rows of many.
"""

from torch import Tensor

from fastensdistill.kernels.tiles import Tile
from fastensdistill.kernels.triton_utils import BATCH_SIZES, launch, tl, triton

TERMS = 8
SUM_TILE = Tile(0, 512, 0, 4, 1, "8 rows of 512 values: 8 loads of 16 bytes in flight a thread, or latency decides")


@triton.jit(do_not_specialize=[*BATCH_SIZES, "n_kept"])
def add_rows_kernel(
    p_rows, p_out, n_rows, n_kept, n_width, ADD: tl.constexpr, TERMS: tl.constexpr, BLOCK_N: tl.constexpr
):
    n_total = n_rows.to(tl.int64) * n_width
    n_values = n_kept * n_width
    i_set = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.arange(0, TERMS)[:, None] * n_values.to(tl.int64) + o_n[None, :]
    m_n = (o_n < n_values)[None, :]
    p_rows += i_set * n_total
    acc = tl.zeros((TERMS, BLOCK_N), tl.float32)
    for _ in range(0, n_rows, TERMS * n_kept):
        acc += tl.load(p_rows + o, mask=m_n & (o < n_total), other=0.0)
        o += TERMS * n_values.to(tl.int64)
    b_sum = tl.sum(acc, 0)
    p_out += i_set * n_values + o_n
    if ADD:
        b_sum += tl.load(p_out, mask=o_n < n_values, other=0.0)
    tl.store(p_out, b_sum, mask=o_n < n_values)


def add_rows(rows: Tensor, kept: int, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Contiguous float32 (sets, rows, width) → (sets, kept, width), into ``out`` or, with ``add``, on top of it."""
    sets, count, width = rows.shape
    out = rows.new_empty(sets, kept, width) if out is None else out
    launch(
        add_rows_kernel,
        (-(-kept * width // SUM_TILE.BLOCK_N), sets),
        SUM_TILE,
        p_rows=rows,
        p_out=out,
        n_rows=count,
        n_kept=kept,
        n_width=width,
        ADD=add,
        TERMS=TERMS,
    )
    return out
