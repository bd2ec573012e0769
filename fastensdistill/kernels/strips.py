"""What the depthwise kernels share: a strip of rows, computed from rows that are read once per column of taps.

A program owns ``ROWS`` results below each other (a strip) at BLOCK_M columns, for BLOCK_N channels. Strips are numbered
along (image, strip of the image, column), so that no image size wastes columns. For one column of taps it reads each
row of its source once, into registers, and uses it for all results that a tap leads to: with 8 rows a 3x3 window loads
30 values for 8 results instead of 72, a 7x7 window 98 instead of 392. The columns of taps re-read what the same
program has just read, out of L1.
"""

from torch import Tensor
from torch.nn import functional as F

from fastensdistill.kernels.launch import tl, triton
from fastensdistill.kernels.reference import partial_rows


@triton.constexpr_function
def end_of_pass(low, taps, most):
    """The end of a pass over rows of taps from ``low`` on, ``most`` at a time."""
    return min(low + most, taps)


@triton.constexpr_function
def tap_of(distance, dilation, low, taps, most):
    """Which tap of a pass lies ``distance`` rows from the first tap, −1 if none does."""
    tap = distance // dilation
    return tap - low if distance % dilation == 0 and low <= tap < min(low + most, taps) else -1


@triton.constexpr_function
def is_read(distance, by_result, rows, dilation, low, taps, most):
    """Whether a pass reads a row for any result of a strip: at stride 2 and dilation 2 every second row for none."""
    return any(tap_of(distance + by_result * j, dilation, low, taps, most) >= 0 for j in range(rows))


@triton.constexpr_function
def first_tap(distance, stride, dilation, taps):
    """The first tap that reads position p of the input, ``distance`` = p + padding, for a result; else ``taps``."""
    return next((tap for tap in range(taps) if (distance - tap * dilation) % stride == 0), taps)


@triton.constexpr_function
def tap_step(stride, dilation):
    """From one such tap to the next."""
    return next(step for step in range(1, stride + 1) if step * dilation % stride == 0)


@triton.jit
def zero_strip(ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """ROWS blocks of sums, as a tuple."""
    accs = ()
    for _ in tl.static_range(ROWS):
        accs += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)  # type: ignore[assignment]
    return accs


@triton.jit
def added(accs, i: tl.constexpr, value):
    """The tuple with ``value`` added to its i-th block."""
    return accs[:i] + (accs[i] + value,) + accs[i + 1 :]  # noqa: RUF005 (Triton has no starred tuples)


@triton.jit
def strip_product(
    accs, p_x, p_w, o_x, i_row, i_column, m_m, o_n, m_n,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BY_SOURCE: tl.constexpr, BY_RESULT: tl.constexpr, SHIFT: tl.constexpr, DILATION: tl.constexpr,
    FIRST: tl.constexpr, STEP: tl.constexpr, MOVE: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """accs[j][m, n] += Σ over taps of x[the tap's position, n] · w[tap, n], for the rows j of a strip.

    ``o_x`` is the element offset of row ``i_row``, column ``i_column`` of each position (both may lie outside). Row
    LOW ≤ r < HIGH from there meets result j by the tap with tap · DILATION = BY_SOURCE · r + BY_RESULT · j + SHIFT.
    Columns of taps are FIRST, FIRST + STEP …, each MOVE columns of x further; weights (taps, C), in the order of taps
    or, FLIPPED, reversed.
    """
    # The weights of a pass are held at once: 72 registers at 8 channels a thread; 31 rows of taps spilled.
    MOST: tl.constexpr = 9
    for low in tl.static_range(0, TAPS_H, MOST):
        for i_s in range((TAPS_W - FIRST + STEP - 1) // STEP):
            i_w = i_column + i_s * MOVE
            m_w = m_m & (i_w >= 0) & (i_w < W)
            o_in = o_x + i_s * (MOVE * C)
            weights = ()
            for tap in tl.static_range(low, end_of_pass(low, TAPS_H, MOST)):
                o_w = tap * TAPS_W + FIRST + i_s * STEP
                o_w = (TAPS_H * TAPS_W - 1 - o_w if FLIPPED else o_w) * C + o_n
                b_w = tl.load(p_w + o_w, mask=m_n, other=0.0).to(tl.float32)[None, :]
                weights += (b_w,)  # type: ignore[assignment]
            for r in tl.static_range(LOW, HIGH):
                if is_read(BY_SOURCE * r + SHIFT, BY_RESULT, ROWS, DILATION, low, TAPS_H, MOST):
                    m_x = m_w & (i_row + r >= 0) & (i_row + r < H)
                    o_r = (o_in + r * (W * C))[:, None] + o_n[None, :]
                    b_x = tl.load(p_x + o_r, mask=m_x[:, None] & m_n[None, :], other=0.0)
                    b_x = b_x.to(p_w.dtype.element_ty).to(tl.float32)
                    for j in tl.static_range(ROWS):
                        if tap_of(BY_SOURCE * r + SHIFT + BY_RESULT * j, DILATION, low, TAPS_H, MOST) >= 0:
                            b_w = weights[tap_of(BY_SOURCE * r + SHIFT + BY_RESULT * j, DILATION, low, TAPS_H, MOST)]
                            accs = added(accs, j, b_x * b_w)
    return accs


def strip_rows(values: Tensor, rows: int, columns: int, block: int) -> Tensor:
    """Partial sums of (G, N, H, W, C) as the kernels make them.

    A strip is ``rows`` high and ``columns`` wide, and ``block`` neighbouring strips are a row.
    """
    padded = F.pad(values, (0, 0, 0, -values.shape[3] % columns, 0, -values.shape[2] % rows))
    strips = padded.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).sum((3, 5))
    return partial_rows(strips.flatten(1, 3), block)
