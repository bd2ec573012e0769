"""Where the layers of a network lie in flat buffers, and the tables that kernels over all layers at once read.

One launch covers every layer: a program reads its row of a table on the device and finds there which tile of which
layer it owns. Tables depend on the layout alone; they are built once per layout and device and kept for good, because
captured graphs go on reading them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.operands import FLOATING, check_contiguous, check_device

# A packed layer starts at a multiple of this many elements: 128 bytes of bf16, which every kind of load accepts.
PACKED_ALIGNMENT = 64


@dataclass(frozen=True)
class LayerOffsets:
    """Where one convolution or linear layer lies in the flat buffers (offsets and sizes count elements).

    The order of the fields is that of the integers the ops receive, see :attr:`Layout.fields`.
    """

    name: str
    weight: int  # offset of W [Co, Ci/groups, taps] in the parameters
    bias: int  # offset of b [Co] in the parameters, or −1
    r: int  # offset of r [Ci] in a row of the deviations
    s: int  # offset of s [Co] in a row of the deviations
    packed: int  # offset of the layer's slots in either packing
    out_channels: int  # Co
    group_channels: int  # Ci/groups
    taps: int  # kh·kw
    groups: int
    positions: int = 1  # H·W of a linear layer over [C, H, W], whose packing has the channels innermost

    @property
    def in_channels(self) -> int:
        return self.group_channels * self.groups

    @property
    def weight_size(self) -> int:
        return self.out_channels * self.group_channels * self.taps

    @property
    def fields(self) -> tuple[int, ...]:
        channels = (self.out_channels, self.group_channels, self.taps, self.groups)
        return self.weight, self.bias, self.r, self.s, self.packed, *channels


FIELDS = 9
PACK_FIELDS = FIELDS + 1  # and the positions
OFFSETS = 2**31  # kernels count elements inside of a layer in 32 bits


@dataclass(frozen=True)
class Layout:
    """Table of the layers of a network in its flat buffers.

    parameters [size]: every layer's W and b first (``ranked`` values), then ``plain`` values without factors, such as
        those of batch norm.
    deviations [K, factors]: every layer's r − 1 and s − 1.
    packed, packed_gradient [packed_size] bf16: per layer ``slots`` weights, one after the other.
    """

    layers: tuple[LayerOffsets, ...]
    ranked: int
    plain: int
    factors: int
    slots: int
    packed_size: int

    @property
    def size(self) -> int:
        return self.ranked + self.plain

    @cached_property
    def fields(self) -> list[int]:
        """The table as the ops take it: ``FIELDS`` integers per layer."""
        return [value for layer in self.layers for value in layer.fields]

    @cached_property
    def pack_fields(self) -> list[int]:
        """The table as packing takes it: ``PACK_FIELDS`` integers per layer."""
        return [value for layer in self.layers for value in (*layer.fields, layer.positions)]

    @staticmethod
    def build(
        weights: Iterable[tuple[str, Sequence[int], int, bool]],
        plain: int = 0,
        slots: int = 1,
        positions: Mapping[str, int] | None = None,
    ) -> Layout:
        """Lays the layers out one after the other.

        Args:
            weights: per layer its name, shape of its weight ([Co, Ci/groups, kh, kw], or [Co, Ci] for a linear layer),
                number of groups, and whether it has a bias.
            plain: number of parameters without factors, which follow the layers.
            slots: weights per layer in the packed buffers; K, or more where frozen networks share them.
            positions: H·W of every linear layer over [C, H, W], by name.

        Raises:
            InputError: a shape that is not a layer's, or no layers.
        """
        layers: list[LayerOffsets] = []
        ranked = factors = packed = 0
        for name, shape, groups, has_bias in weights:
            if len(shape) not in (2, 4) or groups < 1 or min(shape) < 1 or shape[0] % groups:
                raise InputError(
                    f"layer {name!r} has weight shape {tuple(shape)} and {groups} groups; expected "
                    "[Co, Ci/groups, kh, kw] or [Co, Ci] with Co divisible by the groups"
                )
            Co, Ci, *kernel = shape
            taps = kernel[0] * kernel[1] if kernel else 1
            P = (positions or {}).get(name, 1)
            if P < 1 or (P > 1 and (kernel or groups > 1)) or Ci % P:
                raise InputError(
                    f"layer {name!r} of shape {tuple(shape)} is over {P} positions; expected a linear layer "
                    "whose inputs they divide"
                )
            if slots * Co * Ci * taps >= OFFSETS:
                raise InputError(f"layer {name!r} has {slots} x {Co * Ci * taps} weights; expected less than {OFFSETS}")
            bias = ranked + Co * Ci * taps if has_bias else -1
            layers.append(
                LayerOffsets(name, ranked, bias, factors, factors + Ci * groups, packed, Co, Ci, taps, groups, P)
            )
            ranked += Co * Ci * taps + Co * has_bias
            factors += Ci * groups + Co
            packed += -(-slots * Co * Ci * taps // PACKED_ALIGNMENT) * PACKED_ALIGNMENT
        if not layers:
            raise InputError("the layout has no layers; expected at least one")
        return Layout(tuple(layers), ranked, plain, factors, slots, packed)


def layers_of(fields: Sequence[int], width: int = FIELDS) -> list[LayerOffsets]:
    """The layers behind an op's integers, ``width`` (``FIELDS`` or ``PACK_FIELDS``) each."""
    return [LayerOffsets("", *fields[at : at + width]) for at in range(0, len(fields), width)]


def layer_weight(flat: Tensor, layer: LayerOffsets) -> Tensor:
    """[…, groups, Co/groups, Ci/groups, taps] view of the layer's weight in a flat buffer."""
    shape = (layer.groups, layer.out_channels // layer.groups, layer.group_channels, layer.taps)
    return flat[..., layer.weight : layer.weight + layer.weight_size].unflatten(-1, shape)


def layer_factors(deviations: Tensor, layer: LayerOffsets) -> tuple[Tensor, Tensor]:
    """r [K, groups, 1, Ci/groups, 1] and s [K, groups, Co/groups, 1, 1]."""
    r = 1 + deviations[:, layer.r : layer.r + layer.in_channels]
    s = 1 + deviations[:, layer.s : layer.s + layer.out_channels]
    return r.unflatten(1, (layer.groups, 1, layer.group_channels, 1)), s.unflatten(1, (layer.groups, -1, 1, 1))


# ---- tables on the device

Rows = list[tuple[int, ...]]
_tables: dict[tuple[object, ...], tuple[Tensor, ...]] = {}


def device_tables(
    build: Callable[[Sequence[int]], tuple[Rows, ...]], fields: Sequence[int], device: torch.device
) -> tuple[Tensor, ...]:
    """``build(fields)`` as int64 tensors on ``device``, made by the first call alone."""
    key = (build, tuple(fields), device)
    if key not in _tables:
        tables = (torch.tensor(rows, dtype=torch.int64, device="cpu") for rows in build(fields))
        _tables[key] = tuple(table.to(device) for table in tables)
    return _tables[key]


# ---- checks


def check_buffers(
    layout: Layout,
    parameters: Tensor,
    deviations: Tensor | None,
    extra: Iterable[tuple[str, Tensor, tuple[int, ...]]] = (),
    copies: int = 1,
) -> None:
    """Refuse flat buffers that do not fit the layout, each other's dtype or device."""
    if parameters.dtype not in (torch.float32, torch.float64):
        raise InputError(f"parameters has dtype {parameters.dtype}; expected float32 or float64")
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [("parameters", parameters, (copies * layout.size,))]
    if deviations is not None:
        if deviations.dim() != 2:
            raise InputError(f"deviations has shape {tuple(deviations.shape)}; expected [K, {layout.factors}]")
        expected.append(("deviations", deviations, (deviations.shape[0], layout.factors)))
    for name, tensor, shape in (*expected, *extra):
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.dtype != parameters.dtype:
            raise InputError(f"{name} has dtype {tensor.dtype}; expected {parameters.dtype}, that of the parameters")
        check_device(name, tensor, "parameters", parameters)


def check_packed(
    layout: Layout,
    parameters: Tensor,
    count: int,
    packed: Tensor,
    packed_gradient: Tensor,
    first_slot: int,
    dtypes: Sequence[torch.dtype] = FLOATING,
) -> None:
    """Refuse packings of another size, dtype or device, and slots past the layout's for ``count`` networks."""
    allowed = " or ".join(map(str, dtypes))
    for name, tensor in (("packed", packed), ("packed_gradient", packed_gradient)):
        good = tensor.dtype in dtypes and tensor.dtype == packed.dtype
        if not good or tuple(tensor.shape) != (layout.packed_size,):
            raise InputError(
                f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; "
                f"expected {allowed}, one for both packings, and ({layout.packed_size},)"
            )
        check_device(name, tensor, "parameters", parameters)
    check_contiguous(("packed", packed), ("packed_gradient", packed_gradient))
    if not 0 <= first_slot <= layout.slots - count:
        raise InputError(
            f"first_slot is {first_slot} with {count} branches; the layout has {layout.slots} slots per layer"
        )
