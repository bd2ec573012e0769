"""Where the layers of a network lie in flat buffers, and the tables that kernels over all layers at once read.

One launch covers every layer: a program reads its row of a table on the device and finds there which tile of which
layer it owns. Tables depend on the layout alone; they are built once per layout and device and kept for good, because
captured graphs go on reading them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.operands import FLOATING, check_contiguous, check_device

# A packed layer starts at a multiple of this many elements: 128 bytes of bf16, which every kind of load accepts.
PACKED_ALIGNMENT = 64
OFFSETS = 2**31  # kernels count elements inside of a layer in 32 bits


class LayerOffsets(NamedTuple):
    """Where one convolution or linear layer lies in the flat buffers (offsets and sizes count elements)."""

    name: str
    weight: int  # offset of W [Co, Ci, taps] in the parameters
    bias: int  # offset of b [Co] in the parameters, or −1
    r: int  # offset of r [channel_groups · Ci] in a row of the deviations
    s: int  # offset of s [Co] in a row of the deviations
    packed: int  # offset of the layer's slots in either packing
    out_channels: int  # Co
    in_channels: int  # Ci, of a linear layer C·H·W, of a layer with channel groups those of one
    taps: int  # kh·kw
    positions: int = 1  # H·W of a linear layer over [C, H, W], whose packing has the channels innermost
    channel_groups: int = 1  # output channel o multiplies the Ci inputs of group o // (Co / channel_groups)

    @property
    def weight_size(self) -> int:
        return self.out_channels * self.in_channels * self.taps

    @property
    def inputs(self) -> int:
        """Input channels of all groups: how many values r has."""
        return self.channel_groups * self.in_channels

    @property
    def group_outputs(self) -> int:
        """Output channels of one channel group."""
        return self.out_channels // self.channel_groups


FIELDS = len(LayerOffsets._fields) - 1  # integers of a layer, all but its name
DENSE_FIELDS = FIELDS - 1  # the same but for the channel groups, the last: what the extension's packing knows


@dataclass(frozen=True)
class Layout:
    """Table of the layers of a network in its flat buffers.

    parameters [size]: every layer's W and b first (``ranked`` values), then ``plain`` values without factors, such as
        those of batch norm. Of several networks [copies · size], every parameter [copies, *shape].
    deviations [K, factors]: every layer's r − 1 and s − 1. Of several networks their branches one after the other.
    packed, packed_gradient [packed_size]: per layer ``slots`` weights, one after the other.
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
        return [value for layer in self.layers for value in layer[1:]]

    @cached_property
    def dense_fields(self) -> list[int]:
        """``DENSE_FIELDS`` integers per layer, of a layout without channel groups."""
        return [value for layer in self.layers for value in layer[1:-1]]

    @staticmethod
    def build(
        weights: Iterable[tuple[str, Sequence[int], bool]],
        plain: int = 0,
        slots: int = 1,
        positions: Mapping[str, int] | None = None,
        channel_groups: Mapping[str, int] | None = None,
    ) -> "Layout":
        """Lays the layers out one after the other.

        Args:
            weights: per layer its name, the shape of its weight ([Co, Ci, kh, kw], or [Co, Ci] for a linear layer), and
                whether it has a bias. With channel groups, Ci are the input channels of one.
            plain: number of parameters without factors, which follow the layers.
            slots: weights per layer in the packed buffers; K, or more where frozen networks share them.
            positions: H·W of every linear layer over [C, H, W], by name.
            channel_groups: of every convolution that has several, by name.

        Raises:
            InputError: a shape that is not a layer's, or no layers.
        """
        layers: list[LayerOffsets] = []
        ranked = factors = packed = 0
        for name, shape, has_bias in weights:
            if len(shape) not in (2, 4) or min(shape) < 1:
                raise InputError(
                    f"layer {name!r} has weight shape {tuple(shape)}; expected [Co, Ci, kh, kw] or [Co, Ci]"
                )
            Co, Ci, *kernel = shape
            P, count = (positions or {}).get(name, 1), prod(shape)
            if P < 1 or (P > 1 and kernel) or Ci % P:
                raise InputError(
                    f"layer {name!r} of shape {tuple(shape)} is over {P} positions; expected a linear layer "
                    "whose inputs they divide"
                )
            n = (channel_groups or {}).get(name, 1)
            if n < 1 or Co % n or (n > 1 and not kernel):
                raise InputError(
                    f"layer {name!r} of shape {tuple(shape)} has {n} channel groups; expected a convolution whose "
                    "outputs they divide"
                )
            if slots * count >= OFFSETS:
                raise InputError(f"layer {name!r} has {slots} x {count} weights; expected less than {OFFSETS}")
            bias = ranked + count if has_bias else -1
            layer = LayerOffsets(name, ranked, bias, factors, factors + n * Ci, packed, Co, Ci, prod(kernel), P, n)
            layers.append(layer)
            ranked += count + Co * has_bias
            factors += layer.inputs + Co
            packed += -(-slots * count // PACKED_ALIGNMENT) * PACKED_ALIGNMENT
        if not layers:
            raise InputError("the layout has no layers; expected at least one")
        return Layout(tuple(layers), ranked, plain, factors, slots, packed)

    def gradients(self, networks: int, partials: Mapping[str, "Partials"] | None = None) -> "GradientLayout":
        """Room for the gradients of so many networks, one layer after the other.

        ``partials`` says by a layer's name how its weight gradient is left; else it is one result in the op's order.
        Raises InputError for blocks of a linear layer over positions, and for more values than offsets reach.
        """
        places: list[Place] = []
        at = 0
        for layer in self.layers:
            splits, order = (partials or {}).get(layer.name, Partials())
            if order is not None and layer.positions > 1:
                raise InputError(f"layer {layer.name!r} is over {layer.positions} positions; expected no {order}")
            order = order or Order(layer.in_channels // layer.positions, layer.out_channels)
            place = Place(at, -1, splits, order.in_block, order.out_block, int(order.in_innermost))
            count = networks * prod(weight_share(layer, place))
            if splits < 1 or count >= OFFSETS:
                raise InputError(f"layer {layer.name!r} leaves {splits} x {count} values; expected less than {OFFSETS}")
            at += -(-splits * count // GRADIENT_ALIGNMENT) * GRADIENT_ALIGNMENT
            if layer.bias >= 0:
                place, at = place._replace(bias=at), at + networks * layer.out_channels
                at += -at % GRADIENT_ALIGNMENT
            places.append(place)
        return GradientLayout(tuple(places), at, networks)


def layers_of(fields: Sequence[int], width: int = FIELDS) -> list[LayerOffsets]:
    """The layers behind an op's integers, ``width`` of them each."""
    return [LayerOffsets("", *fields[at : at + width]) for at in range(0, len(fields), width)]


def branch_weights(parameters: Tensor, layer: LayerOffsets, copies: int, K: int) -> Tensor:
    """[K, Co, Ci, taps]: for each of K branches the weight of the network that it is of, K / copies neighbours each.

    Of one network [1, Co, Ci, taps].
    """
    W = layer_weight(parameters, layer, copies)
    return W if copies in (1, K) else W.repeat_interleave(K // copies, 0)


def layer_weight(flat: Tensor, layer: LayerOffsets, copies: int = 1) -> Tensor:
    """[copies, Co, Ci, taps] view of the layer's weight in a flat buffer of so many networks."""
    start, count = copies * layer.weight, copies * layer.weight_size
    return flat[start : start + count].view(copies, layer.out_channels, layer.in_channels, layer.taps)


def layer_bias(flat: Tensor, layer: LayerOffsets, copies: int = 1) -> Tensor:
    """[copies, Co] view of the layer's bias."""
    start = copies * layer.bias
    return flat[start : start + copies * layer.out_channels].view(copies, layer.out_channels)


def layer_factors(deviations: Tensor, layer: LayerOffsets) -> tuple[Tensor, Tensor]:
    """r [K, 1, Ci, 1], or [K, Co, Ci, 1] with channel groups, and s [K, Co, 1, 1]."""
    r = 1 + deviations[:, layer.r : layer.r + layer.inputs].unflatten(1, (layer.channel_groups, -1))
    s = 1 + deviations[:, layer.s : layer.s + layer.out_channels]
    if layer.channel_groups > 1:
        r = r.repeat_interleave(layer.group_outputs, 1)
    return r[..., None], s[:, :, None, None]


class Order(NamedTuple):
    """How a kernel leaves one network's share of a layer's weight gradient: [Ci blocks, Co blocks, taps, block].

    A block is [in_block, out_block] or, with ``in_innermost``, [out_block, in_block]. The last blocks are whole ones,
    whatever channels there are: of what lies past these nothing is read, and nothing need be written. One block of all
    channels is [taps, Ci, Co], the order of ``conv_weight_gradient``. What un-folds reads runs of 32 channels along
    the inner side, so 32 or 64 a block are whole runs; with Co innermost its tiles are whole runs of the weights too.
    """

    in_block: int  # input channels of a block
    out_block: int  # output channels of a block
    in_innermost: bool = False

    def blocks(self, in_channels: int, out_channels: int) -> tuple[int, int]:
        """Blocks along the input and along the output channels."""
        return -(-in_channels // self.in_block), -(-out_channels // self.out_block)

    def shape(self, taps: int, in_channels: int, out_channels: int) -> tuple[int, ...]:
        """Of a share: Ci blocks, Co blocks, taps and the two sides of a block."""
        sides = (self.out_block, self.in_block) if self.in_innermost else (self.in_block, self.out_block)
        return *self.blocks(in_channels, out_channels), taps, *sides

    def element(self, taps: int, in_channels: int, out_channels: int, tap: int, i: int, o: int) -> int:
        """Which element of a share is the gradient of the weight from input channel ``i`` to output channel ``o``."""
        _, across = self.blocks(in_channels, out_channels)
        block = (i // self.in_block * across + o // self.out_block) * taps + tap
        row, column = i % self.in_block, o % self.out_block
        inside = column * self.in_block + row if self.in_innermost else row * self.out_block + column
        return block * self.in_block * self.out_block + inside


class Partials(NamedTuple):
    """What a weight gradient leaves: [splits, networks, *order.shape] float32, partial results that add up to it.

    Without an order it is the op's own, [splits, networks, taps, Ci, Co].
    """

    splits: int = 1
    order: Order | None = None


class Place(NamedTuple):
    """Where in one flat memory the gradients of a layer lie, as the kernels leave them (offsets count elements)."""

    weight: int  # offset of the partial results
    bias: int  # offset of db [K, Co], or −1
    splits: int
    in_block: int
    out_block: int
    in_innermost: int  # 0 or 1

    @property
    def order(self) -> Order:
        return Order(self.in_block, self.out_block, bool(self.in_innermost))


GRADIENT_ALIGNMENT = 32  # values: partial results start at a multiple of 128 bytes, as every kind of store likes it


@dataclass(frozen=True)
class GradientLayout:
    """Where the gradients of so many networks' layers lie in one flat memory [size]; made by ``Layout.gradients``."""

    places: tuple[Place, ...]
    size: int
    networks: int

    @cached_property
    def fields(self) -> list[int]:
        """As the op takes it: the integers of every place."""
        return [value for place in self.places for value in place]


def weight_share(layer: LayerOffsets, place: Place) -> tuple[int, ...]:
    """Shape of one network's share of a split, whose input channels are those of one of the layer's positions."""
    return place.order.shape(layer.taps * layer.positions, layer.in_channels // layer.positions, layer.out_channels)


def weight_partials(flat: Tensor, layer: LayerOffsets, place: Place, networks: int) -> Tensor:
    """[splits, networks, *order.shape] view of the partial results of a layer's weight gradient."""
    shape = place.splits, networks, *weight_share(layer, place)
    return flat[place.weight : place.weight + prod(shape)].view(shape)


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


def check_buffers(layout: Layout, parameters: Tensor, deviations: Tensor | None) -> int:
    """K, how many branches or plain networks the flat buffers hold, as many of each of the ``copies_of`` networks.

    Raises InputError for buffers that fit neither the layout nor one another.
    """
    if parameters.dtype not in (torch.float32, torch.float64):
        raise InputError(f"parameters has dtype {parameters.dtype}; expected float32 or float64")
    K = copies = copies_of(layout, parameters)
    if deviations is not None:
        if deviations.dim() != 2:
            raise InputError(f"deviations has shape {tuple(deviations.shape)}; expected [K, {layout.factors}]")
        K = len(deviations)
        check_flat("deviations", deviations, (K, layout.factors), parameters)
        if K % copies:
            raise InputError(f"deviations are of {K} branches and parameters of {copies} networks; expected as many "
                             "branches of each")  # fmt: skip
    check_flat("parameters", parameters, (copies * layout.size,), parameters)
    return K


def copies_of(layout: Layout, parameters: Tensor) -> int:
    """How many networks the flat parameters are of."""
    return max(1, parameters.numel() // layout.size)


def check_flat(name: str, tensor: Tensor, shape: tuple[int, ...], parameters: Tensor) -> None:
    """Refuse a buffer of another shape than ``shape``, or of another dtype or device than the parameters."""
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    if tensor.dtype != parameters.dtype:
        raise InputError(f"{name} has dtype {tensor.dtype}; expected {parameters.dtype}, that of the parameters")
    check_device(name, tensor, "parameters", parameters)


def check_packed(
    layout: Layout, parameters: Tensor, K: int, packed: Tensor, packed_gradient: Tensor, first_slot: int
) -> None:
    """Refuse packings of another size, dtype or device, and slots past the layout's for K networks."""
    for name, tensor in (("packed", packed), ("packed_gradient", packed_gradient)):
        good = tensor.dtype in FLOATING and tensor.dtype == packed.dtype
        if not good or tuple(tensor.shape) != (layout.packed_size,):
            raise InputError(
                f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; expected "
                f"{' or '.join(map(str, FLOATING))}, one for both packings, and ({layout.packed_size},)"
            )
        check_device(name, tensor, "parameters", parameters)
    check_contiguous(("packed", packed), ("packed_gradient", packed_gradient))
    if not 0 <= first_slot <= layout.slots - K:
        raise InputError(f"first_slot is {first_slot} with {K} branches; the layout has {layout.slots} slots per layer")
