"""Device functions that several kernels share: a convolution's inner loop, residuals, 1-bit masks."""

from fastensdistill.kernels.launch import tl, triton


@triton.jit
def gather_product(
    acc, p_x, p_w, p_scale, p_shift, o_x, i_row, i_column, m_m, o_n, m_n, tap_row, tap_column, n_rows, n_columns,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, KERNEL: tl.constexpr, TAP_STEP: tl.constexpr,
    BLOCK_K: tl.constexpr, ROW_TAPS: tl.constexpr, PRECISION: tl.constexpr, IN_RELU: tl.constexpr,
):  # fmt: skip
    """acc[m, n] += Σ over n_rows x n_columns taps and C channels of x[position m shifted by the tap] · w[tap, c, n].

    ``o_x`` is the element offset of each position's first tap (which may lie outside), ``i_row, i_column`` its
    coordinates in x; the first weight tap is (tap_row, tap_column), the next ones TAP_STEP further.
    ROW_TAPS multiplies a whole row of taps at once, whose values are neighbours in memory: an input of 1 or 3
    channels then fills a block of 16 or 32 instead of 3 of 16. Counters are carried from step to step: dividing a
    flattened counter was miscompiled at 8 warps (and costs integer instructions).
    """
    o_k = tl.arange(0, BLOCK_K)
    BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    EVEN_K: tl.constexpr = C % BLOCK_K == 0
    if ROW_TAPS:
        tl.static_assert(KERNEL * C <= BLOCK_K, "a row of taps must fit one block")
        i_shift = i_column[:, None] + (o_k // C)[None, :]
        m_column = m_m[:, None] & (i_shift >= 0) & (i_shift < W) & (o_k < KERNEL * C)[None, :]
        m_k = o_k < KERNEL * C
        i_channel = o_k % C
        steps = n_rows
    else:
        steps = n_rows * n_columns * BLOCKS
    i_r = 0
    i_s = 0
    i_c = 0
    for _ in range(steps):
        row_inside = (i_row + i_r >= 0) & (i_row + i_r < H)
        if ROW_TAPS:
            m_x = m_column & row_inside[:, None]
            o_w = (tap_row + i_r) * (KERNEL * C * CO) + o_k * CO
            o_in = o_x + i_r * (W * C)
        else:
            i_channel = i_c + o_k
            m_k = i_channel < C
            inside = m_m & row_inside & (i_column + i_s >= 0) & (i_column + i_s < W)
            m_x = inside[:, None] if EVEN_K else inside[:, None] & m_k[None, :]
            tap = (tap_row + i_r * TAP_STEP) * KERNEL + tap_column + i_s * TAP_STEP
            o_w = (tap * C + i_channel) * CO
            o_in = o_x + ((i_r * W + i_s) * C + i_c)
        b_x = tl.load(p_x + (o_in[:, None] + o_k[None, :]), mask=m_x, other=0.0)
        if p_scale is not None:
            b_scale = tl.load(p_scale + i_channel, mask=m_k, other=0.0)
            b_shift = tl.load(p_shift + i_channel, mask=m_k, other=0.0)
            b_u = b_x.to(tl.float32) * b_scale[None, :] + b_shift[None, :]
            if IN_RELU:
                b_u = tl.maximum(b_u, 0.0, propagate_nan=tl.PropagateNan.ALL)
            # zero padding comes after the prologue: a masked 0 has just become a shift
            b_x = tl.where(m_x, b_u, 0.0)
        if EVEN_K and not ROW_TAPS:
            b_w = tl.load(p_w + (o_w[:, None] + o_n[None, :]), mask=m_n[None, :], other=0.0)
        else:
            b_w = tl.load(p_w + (o_w[:, None] + o_n[None, :]), mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(b_x.to(b_w.dtype), b_w, acc, input_precision=PRECISION)
        if ROW_TAPS:
            i_r += 1
        else:
            if BLOCKS == 1:
                i_s += 1
            else:
                i_c += BLOCK_K
                next_tap = i_c >= C
                i_c = tl.where(next_tap, 0, i_c)
                i_s += next_tap.to(tl.int32)
            next_row = i_s >= n_columns
            i_s = tl.where(next_row, 0, i_s)
            i_r += next_row.to(tl.int32)
    return acc


@triton.jit
def column_halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right BLOCK_N / 2 columns of a (BLOCK_M, BLOCK_N) block."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def store_bits(p_mask, b_positive, o_m, m_m, i_first, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store ``b_positive`` (BLOCK_M, BLOCK_N), false past C, as bits: positions ``o_m``, channels from ``i_first``."""
    CB: tl.constexpr = (C + 7) // 8
    b_bits = tl.reshape(b_positive.to(tl.int32), (BLOCK_M, BLOCK_N // 8, 8))
    b_bytes = tl.sum(b_bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
    o_b = i_first // 8 + tl.arange(0, BLOCK_N // 8)
    tl.store(p_mask + (o_m * CB)[:, None] + o_b[None, :], b_bytes, mask=m_m[:, None] & (o_b < CB)[None, :])


@triton.jit
def load_bits(p_mask, o_m, m_m, i_first, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The inverse of ``store_bits``: a (BLOCK_M, BLOCK_N) block of booleans."""
    CB: tl.constexpr = (C + 7) // 8
    o_b = i_first // 8 + tl.arange(0, BLOCK_N // 8)
    m_b = m_m[:, None] & (o_b < CB)[None, :]
    b_bytes = tl.load(p_mask + (o_m * CB)[:, None] + o_b[None, :], mask=m_b, other=0).to(tl.int32)
    b_bits = (b_bytes[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(b_bits, (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def load_shortcut(
    p_residual, image, i_h, i_w, m_m, o_n, HR: tl.constexpr, WR: tl.constexpr, CR: tl.constexpr, STRIDE: tl.constexpr
):
    """A group's residual (N, HR, WR, CR) at every STRIDE-th position, 0 for channels that it has not, in float32."""
    o_r = ((image * HR + i_h * STRIDE) * WR + i_w * STRIDE) * CR
    m_r = m_m[:, None] & (o_n < CR)[None, :]
    return tl.load(p_residual + (o_r[:, None] + o_n[None, :]), mask=m_r, other=0.0).to(tl.float32)


@triton.jit
def load_spread(
    p_residual, image, i_h, i_w, m_m, o_n, m_n,
    HR: tl.constexpr, WR: tl.constexpr, CR: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of what ``load_shortcut`` reads: a residual at every STRIDE-th position, 0 at the others."""
    on_grid = m_m & (i_h % STRIDE == 0) & (i_w % STRIDE == 0)
    o_r = ((image * HR + i_h // STRIDE) * WR + i_w // STRIDE) * CR
    m_r = on_grid[:, None] & (m_n & (o_n < CR))[None, :]
    return tl.load(p_residual + (o_r[:, None] + o_n[None, :]), mask=m_r, other=0.0).to(tl.float32)
