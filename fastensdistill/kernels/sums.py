"""Partial sums of many programs, added up in a fixed order, without atomics.

    out[set, r] = Σ_t rows[set, t · kept + r]                                       (add_rows)
    first, second [set, c] = Σ over the groups and rows of a set of partials        (sum_rows, set_sums)

Partials (G, P, 2, C) hold two sums per channel, one row per program. The Q sets of groups that share a BatchNorm's
statistics, each of G / Q neighbours, are one (all K branches of a student), G (teachers, each its own) or between
(several students of K branches). What is made of a set's sums and read by group has one row, or one per group
(``result_rows``). Weight gradients add the partial results of their splits (kept = 1).
"""

from torch import Tensor

from fastensdistill.kernels.launch import BATCH_SIZES, launch, tl, triton
from fastensdistill.kernels.tiles import Tile

TERMS = 8
SUM_TILE = Tile(0, 512, 0, 4, 1, "8 rows of 512 values: 8 loads of 16 bytes in flight a thread, or latency decides")
# Sums of a set: 8 channels are one 32-byte sector, 1024 rows of them 16 values a thread. A layer at 32 x 32 has 1024
# rows per group, and few programs read them: latency decides, so many loads are in flight.
SET_BLOCKS = {"BLOCK_R": 1024, "BLOCK_C": 8}
SET_TILE = Tile(0, 0, 0, 16, 1, "one program per 8 channels")
FEW_ROWS = 4096


def set_sums(partials: Tensor, sets: int) -> tuple[Tensor, Tensor]:
    """Both sums of each set, (Q, C), of partials (G, P, 2, C): the reference of ``sum_rows``."""
    first, second = partials.sum(1).unflatten(0, (sets, -1)).sum(1).unbind(1)
    return first, second


def result_rows(groups: int, sets: int) -> int:
    """Rows of a result per channel that kernels read by group: one where all groups share it, else one per group."""
    return 1 if sets == 1 else groups


def by_group(rows: Tensor, groups: int) -> Tensor:
    """(Q, C) as such a result: :func:`result_rows` of them."""
    repeat = result_rows(groups, len(rows)) // len(rows)
    return rows if repeat == 1 else rows.repeat_interleave(repeat, 0)


@triton.jit
def sum_rows(p_partials, i_first, n_rows, o_c, m_c, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Both sums over rows i_first .. i_first + n_rows of (rows, 2, C), in one fixed order."""
    first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(0, n_rows, BLOCK_R):
        o_r = i + tl.arange(0, BLOCK_R)
        m_r = (o_r < n_rows)[:, None] & m_c[None, :]
        o = ((i_first + o_r) * (2 * C))[:, None] + o_c[None, :]
        first += tl.load(p_partials + o, mask=m_r, other=0.0)
        second += tl.load(p_partials + C + o, mask=m_r, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


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


def fewer_rows(partials: Tensor, sets: int) -> Tensor:
    """The rows of partials of each set, (Q, P, 2C): 1024 rows made of them first where there are many.

    At 64 channels of 32 x 32 and B = 512, 16,384 rows of 8 channels are 1 MB for one multiprocessor, about 20 µs by
    estimate, and 8 multiprocessors have work; all of them read the rows in about 2. Up to 4 blocks of rows a launch
    more would cost what it saves.
    """
    rows = partials.view(sets, -1, 2 * partials.shape[3])
    return add_rows(rows, SET_BLOCKS["BLOCK_R"]) if rows.shape[1] > FEW_ROWS else rows


def set_grid(sets: int, channels: int) -> tuple[int, int]:
    """Programs of a kernel that adds up a set's rows with ``sum_rows``: by channels and set."""
    return -(-channels // SET_BLOCKS["BLOCK_C"]), sets
