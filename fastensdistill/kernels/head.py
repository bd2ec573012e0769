"""The classifier: BatchNorm by known scale and shift, ReLU, mean over positions, linear.

pooled[c] = mean over positions of relu(scale · z + shift)
logits[g] = pooled · W[weight_index[g]] + bias[weight_index[g]]

``head_backward`` is its gradient.
"""

from typing import Any, NamedTuple

from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import BATCH_SIZES, KernelLaunch, issue, kernel_launch, row_stride, tl, triton
from fastensdistill.kernels.operands import accumulator, check_pair, check_precision, check_tensor
from fastensdistill.kernels.ops import define
from fastensdistill.kernels.reference import pick
from fastensdistill.kernels.tiles import Tile

IMAGES_BLOCK = 16  # images of one program, the fewest a matrix product takes; one row of the statistics each
POSITIONS_BLOCK, CHANNELS_BLOCK = 16, 32  # read at once for each of them
HEAD_TILE = Tile(0, 0, 0, 8, 2, "few programs: latency decides, so 32 values a thread are in flight")


class HeadOperands(NamedTuple):
    """What ``head`` takes."""

    z: Tensor  # (G, N, H, W, C)
    weight: Tensor  # (S, C, classes) of the dtype that is multiplied in
    bias: Tensor | None  # (S, classes) float32
    weight_index: Tensor  # (G,) int32
    scale: Tensor | None  # (S or 1, C) float32, by slot
    shift: Tensor | None
    relu: bool
    precision: str


class HeadOutput(NamedTuple):
    """Logits, and the pooled features that the backward pass reads."""

    logits: Tensor  # (G, N, classes) float32
    pooled: Tensor  # (G, N, C) float32


def normalized(o: Any) -> Tensor:
    """What the ReLU is taken of, (G, N, H, W, C) wide, of the operands of ``head`` or of ``head_backward``."""
    y = o.z.to(accumulator(o.z.dtype))
    return y if o.scale is None else y * pick(o.scale, o.weight_index) + pick(o.shift, o.weight_index)


def head_reference(o: HeadOperands) -> tuple[Tensor, Tensor]:
    y, index = normalized(o), o.weight_index.long()
    pooled = (y.relu() if o.relu else y).mean((2, 3))
    logits = pooled.to(o.weight.dtype).to(y.dtype) @ o.weight[index].to(y.dtype)
    if o.bias is not None:
        logits = logits + o.bias[index][:, None].to(y.dtype)
    return logits, pooled


@triton.jit
def head_program(
    i_g, p_z, p_weight, p_bias, p_weight_index, p_scale, p_shift, p_logits, p_pooled,
    N, s_scale,
    POSITIONS: tl.constexpr, C: tl.constexpr, CLASSES: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The program of group ``i_g``, int64; the grid's first two axes say of which of its images and classes."""
    i_n = tl.program_id(1)
    i_slot = tl.load(p_weight_index + i_g).to(tl.int64)
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < N
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < CLASSES
    o_p = tl.arange(0, BLOCK_P)
    p_z += i_g * N * (POSITIONS * C)
    p_weight += i_slot * (C * CLASSES)
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        if p_scale is not None:
            b_scale = tl.load(p_scale + i_slot * s_scale + o_c, mask=m_c, other=0.0)[None, None, :]
            b_shift = tl.load(p_shift + i_slot * s_scale + o_c, mask=m_c, other=0.0)[None, None, :]
        b_pooled = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for i_p in range(0, POSITIONS, BLOCK_P):
            m_z = m_b[:, None, None] & ((i_p + o_p) < POSITIONS)[None, :, None] & m_c[None, None, :]
            o_z = (o_b[:, None, None] * POSITIONS + (i_p + o_p)[None, :, None]) * C + o_c[None, None, :]
            b_y = tl.load(p_z + o_z, mask=m_z, other=0.0).to(tl.float32)
            if p_scale is not None:
                b_y = tl.where(m_z, b_y * b_scale + b_shift, 0.0)
            if RELU:
                b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            b_pooled += tl.sum(b_y, 1)
        b_pooled *= 1.0 / POSITIONS
        if i_n == 0:
            o_pooled = i_g * N * C + o_b[:, None] * C + o_c[None, :]
            tl.store(p_pooled + o_pooled, b_pooled, mask=m_b[:, None] & m_c[None, :])
        m_w = m_c[:, None] & m_n[None, :]
        b_w = tl.load(p_weight + (o_c[:, None] * CLASSES + o_n[None, :]), mask=m_w, other=0.0)
        acc = tl.dot(b_pooled.to(b_w.dtype), b_w, acc, input_precision=PRECISION)
    if p_bias is not None:
        acc += tl.load(p_bias + i_slot * CLASSES + o_n, mask=m_n, other=0.0)[None, :]
    o_logits = i_g * N * CLASSES + o_b[:, None] * CLASSES + o_n[None, :]
    tl.store(p_logits + o_logits, acc, mask=m_b[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=BATCH_SIZES)
def head_kernel(
    p_z, p_weight, p_bias, p_weight_index, p_scale, p_shift, p_logits, p_pooled,
    N, s_scale,
    POSITIONS: tl.constexpr, C: tl.constexpr, CLASSES: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head_program(
        tl.program_id(2).to(tl.int64), p_z, p_weight, p_bias, p_weight_index, p_scale, p_shift, p_logits, p_pooled,
        N, s_scale, POSITIONS, C, CLASSES, RELU, PRECISION, BLOCK_B, BLOCK_P, BLOCK_C, BLOCK_N,
    )  # fmt: skip


def head_sizes(o: Any) -> dict[str, int]:
    """Sizes and blocks as the kernels of ``head`` and ``head_backward`` take them."""
    _, images, height, width, channels = o.z.shape
    blocks = {"BLOCK_B": IMAGES_BLOCK, "BLOCK_P": POSITIONS_BLOCK, "BLOCK_C": CHANNELS_BLOCK}
    return {"N": images, "POSITIONS": height * width, "C": channels, "CLASSES": o.weight.shape[2], **blocks}


def class_block(classes: int) -> int:
    """Classes of one program."""
    return min(128, max(16, 1 << (classes - 1).bit_length()))


def head_empty(o: HeadOperands) -> tuple[Tensor, Tensor]:
    """Logits and pooled features, unwritten."""
    groups, images, *_, channels = o.z.shape
    shapes = ((groups, images, o.weight.shape[2]), (groups, images, channels))
    logits, pooled = (o.z.new_empty(shape, dtype=accumulator(o.z.dtype)) for shape in shapes)
    return logits, pooled


def head_launch(o: HeadOperands) -> tuple[KernelLaunch, tuple[Tensor, Tensor]]:
    """The kernel's launch, and the results that it writes."""
    logits, pooled = head_empty(o)
    groups, images, classes = logits.shape
    columns = class_block(classes)
    one = kernel_launch(
        head_kernel,
        (-(-images // IMAGES_BLOCK), -(-classes // columns), groups),
        HEAD_TILE,
        o,
        p_logits=logits,
        p_pooled=pooled,
        s_scale=row_stride(o.scale),
        BLOCK_N=columns,
        **head_sizes(o),
    )
    return one, (logits, pooled)


def _launch(o: HeadOperands) -> tuple[Tensor, Tensor]:
    one, results = head_launch(o)
    issue(one)
    return results


_head = define("head", head_reference, head_empty, _launch)


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InputError unless ``x`` has the expected shape."""
    good = tuple(x.shape) == shape and x.is_contiguous()
    if not good:
        raise InputError(f"{name} has shape {tuple(x.shape)}, expected {shape}, contiguous")


def check_head(o: Any) -> None:
    """Refuse operands of ``head`` or of ``head_backward`` that do not fit one another."""
    z, weight, groups = o.z, o.weight, o.weight_index.shape[0]
    check_tensor("z", z, 5)
    check_tensor("weight", weight, 3)
    check_precision(o.precision)
    if z.shape[0] != groups:
        raise InputError(f"z has {z.shape[0]} groups, expected {groups} as weight_index has")
    good = weight.shape[1] == z.shape[4]
    if not good:
        raise InputError(f"weight has shape {tuple(weight.shape)}, expected (slots, {z.shape[4]}, classes)")
    check_pair("scale and shift", o.scale, o.shift, weight.shape[0], z.shape[4])


def head_operands(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_index: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = True,
    precision: str = "ieee",
) -> HeadOperands:
    """The operands of :func:`head`, checked."""
    o = HeadOperands(z, weight, bias, weight_index, scale, shift, relu, precision)
    check_head(o)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0], weight.shape[2]))
    return o


def head(z: Tensor, weight: Tensor, bias: Tensor | None, weight_index: Tensor, **options: Any) -> HeadOutput:
    """Logits (G, N, classes) and the pooled features they come from (G, N, C), both float32.

    Args:
        z: (G, N, H, W, C), float32, float16 or bfloat16 (float64: reference only).
        weight: (S, C, classes), in the dtype that is multiplied in. bias: (S, classes) float32, or None.
        weight_index: int32 (G,), the slot of each group.
        scale, shift: (S or 1, C) float32, by slot, or None.
        relu: True; False for a network whose last layer has its ReLU already.
        precision: how float32 is multiplied, "ieee" or "tf32".

    Raises:
        InputError: shapes that disagree, another precision.
    """
    return HeadOutput(*_head(*head_operands(z, weight, bias, weight_index, **options)))
