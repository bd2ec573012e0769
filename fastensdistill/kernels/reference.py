"""What the references share, in plain PyTorch: rows by slot, shortcuts, 1-bit ReLU masks, rows of partial sums."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.kernels.operands import accumulator


def wide(rows: Tensor) -> Tensor:
    """Rows (G or 1, C) of a per-group parameter, shaped to go with (G, N, H, W, C)."""
    return rows[:, None, None, None, :]


def pick(rows: Tensor, weight_index: Tensor | None) -> Tensor:
    """Rows of a per-slot parameter (S or 1, C) for each group, as ``wide``; without an index they are by group."""
    return wide(rows if weight_index is None or rows.shape[0] == 1 else rows[weight_index.long()])


def shortcut(x: Tensor, stride: int, height: int, width: int, channels: int) -> Tensor:
    """``x[:, :, ::stride, ::stride]`` with zero channels appended (or the first ``channels`` kept)."""
    x = x[:, :, ::stride, ::stride][:, :, :height, :width]
    return F.pad(x, (0, channels - x.shape[-1]))


def pack_mask(positive: Tensor) -> Tensor:
    """Bool (..., C) → uint8 (..., ceil(C/8)): channel c is bit c % 8 of byte c // 8; bits past C are 0."""
    channels = positive.shape[-1]
    bits = F.pad(positive.to(torch.uint8), (0, -channels % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=positive.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, channels: int) -> Tensor:
    """The inverse of ``pack_mask``: uint8 (..., ceil(C/8)) → bool (..., C)."""
    bits = (mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.flatten(-2)[..., :channels].bool()


def partial_rows(values: Tensor, block: int) -> Tensor:
    """Sums of (G, positions, C) over runs of ``block`` positions: (G, ceil(positions / block), C)."""
    padded = F.pad(values, (0, 0, 0, -values.shape[1] % block))
    return padded.unflatten(1, (-1, block)).sum(2)


def leave(value: Tensor, out: Tensor, add: bool) -> None:
    """``value`` into ``out``, or on top of what is there. Of several partial results it is the first."""
    if out.dim() > value.dim():
        if not add:
            out[1:].zero_()
        out = out[0]
    out.add_(value) if add else out.copy_(value)


def as_channels(x: Tensor) -> Tensor:
    """(G, N, H, W, C) → (N, G·C, H, W): what PyTorch's grouped convolutions take."""
    return x.permute(1, 0, 4, 2, 3).flatten(1, 2)


def as_groups(x: Tensor, groups: int) -> Tensor:
    """The inverse of ``as_channels``, not contiguous."""
    return x.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2)


def through_norm(d: Tensor, z: Tensor | None, a: Tensor | None, b: Tensor | None, c: Tensor | None) -> Tensor:
    """norm_a · d + norm_b · norm_z + norm_c, rows by group, in d's dtype; without z d itself."""
    if z is None or a is None or b is None or c is None:
        return d
    high = accumulator(d.dtype)
    return (wide(a) * d.to(high) + wide(b) * z.to(high) + wide(c)).to(d.dtype)
