"""Tables of the un-fold: which tile of which layer a program owns, and where in the gradients it begins.

A tile is up to 32 output channels by 32 values of a row of W. Along the side that is innermost in the gradients it is a
run of neighbours, which does not leave its block: of a row of W its neighbours where Co is innermost, whatever blocks
and taps they are in, and input channels at one tap where Ci is.

In a layer with channel groups dr sums over the outputs of a group alone. Where these fill tiles, none crosses from a
group into the next, and the rest is as in a dense layer with the r of the group. Smaller groups, such as a depthwise
layer's, would leave a tile nearly empty, one 32nd of it. Their tiles are across groups in a launch of their own, which
leaves s · W · dW_k unsummed over the outputs, one value for each of W: a depthwise layer has few.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from fastensdistill.kernels.layout import FIELDS, LayerOffsets, Place, Rows, layers_of, weight_share
from fastensdistill.kernels.tiles import Tile

UNFOLD_TILE = Tile(32, 32, 0, 8, 1, "4 values a thread, 8 partial results of each at once: 64 KB on their way", 0, 128)
FACTOR_TILE = Tile(32, 32, 0, 4, 1, "latency decides: 32 factors by 32 of their partial sums at a time")
UNFOLD_COLUMNS, GROUPED_COLUMNS, FACTOR_COLUMNS = 22, 24, 10  # integers of a row of the three tables


def places_of(places: Sequence[int]) -> list[Place]:
    """The places behind an op's integers."""
    count = len(Place._fields)
    return [Place(*places[at : at + count]) for at in range(0, len(places), count)]


def _runs(first: int, end: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """First and end of runs of at most so many of the channels from ``first`` to ``end``, each inside of a block."""
    while first < end:
        after = min(first + most, first - first % block + block, end)
        yield first, after
        first = after


def across_groups(layer: LayerOffsets) -> bool:
    """Whether the layer's channel groups are too small to fill tiles of their own."""
    return layer.channel_groups > 1 and layer.group_outputs < UNFOLD_TILE.BLOCK_M


class _Sides(NamedTuple):
    """The tiles of a layer."""

    over_o: list[tuple[int, int, int]]  # along the output channels: first, end, and channel group
    over_j: list[tuple[int, int]]  # along a row of W: first and end
    step: int  # from value to value along a row

    def partial_sums(self, layer: LayerOffsets) -> tuple[int, int]:
        """How many the first launch leaves of one branch: for r, and for s."""
        rows = layer.out_channels if across_groups(layer) else len(self.over_o)
        return rows * layer.in_channels * layer.taps, layer.out_channels * len(self.over_j)


def _sides(layer: LayerOffsets, place: Place) -> _Sides:
    Ci, Co, taps = layer.in_channels, layer.out_channels, layer.taps
    M, N = UNFOLD_TILE.BLOCK_M, UNFOLD_TILE.BLOCK_N
    outputs = Co if across_groups(layer) else layer.group_outputs
    block = Co if place.in_innermost else place.out_block
    over_o = [
        (*run, first // outputs) for first in range(0, Co, outputs) for run in _runs(first, first + outputs, block, M)
    ]
    if not place.in_innermost:
        return _Sides(over_o, [*_runs(0, Ci * taps, Ci * taps, N)], 1)
    rows = [(c * taps + tap, end * taps) for c, end in _runs(0, Ci, place.in_block, N) for tap in range(taps)]
    return _Sides(over_o, rows, taps)


def partial_count(fields: Sequence[int], places: Sequence[int]) -> int:
    """Partial sums of one branch, which the first launches leave to the last."""
    pairs = zip(layers_of(fields), places_of(places), strict=True)
    return sum(sum(_sides(layer, place).partial_sums(layer)) for layer, place in pairs)


def _input_factors(layer: LayerOffsets, sides: _Sides, at: int) -> Rows:
    """Where the partial sums for r begin, what to add up for a factor and the stride of that, first factor, their end,
    place of r; for each run of factors. ``at``: of the layer's first partial sum for r."""
    Ci, Co, taps, n = layer.in_channels, layer.out_channels, layer.taps, layer.channel_groups
    J = Ci * taps
    if across_groups(layer) and Ci == 1:  # the outputs of a group lie one after the other, and so do the groups
        runs = [(at, Co // n * taps, Co // n * taps, 0, Co // n * taps, n, layer.r)]
    else:
        tiles = layer.group_outputs if across_groups(layer) else len(sides.over_o) // n
        runs = [(at + g * tiles * J, tiles * taps, taps, J, taps, Ci, layer.r + g * Ci) for g in range(n)]
    return [
        (*terms, c, count, factor, -1, -1)
        for *terms, count, factor in runs
        for c in range(0, count, FACTOR_TILE.BLOCK_M)
    ]


def tables(fields_and_places: Sequence[int]) -> tuple[Rows, ...]:
    """A row per tile for the first launch and for that of tiles across channel groups, and one per run of factors for
    the last; arguments one after the other."""
    tiles: Rows = []
    grouped: Rows = []
    factors: Rows = []
    over_rows, layers = 0, len(fields_and_places) // (FIELDS + len(Place._fields))
    fields, places = fields_and_places[: layers * FIELDS], fields_and_places[layers * FIELDS :]
    for layer, place in zip(layers_of(fields), places_of(places), strict=True):
        Co, Ci, taps, order = layer.out_channels, layer.in_channels, layer.taps, place.order
        every, C, J = taps * layer.positions, Ci // layer.positions, Ci * taps
        sides, across = _sides(layer, place), across_groups(layer)
        for_r, for_s = sides.partial_sums(layer)
        share, block = prod(weight_share(layer, place)), place.in_block * place.out_block
        # the other side: values of a block, from block to block, from channel to channel, from tap to tap
        if order.in_innermost:
            other = place.out_block, every * block, place.in_block, 0
        else:
            other = place.in_block, order.blocks(C, Co)[1] * every * block, place.out_block, block
        over_columns = over_rows + for_r
        for n, (o, end_o, group) in enumerate(sides.over_o):
            for m, (j, end_j) in enumerate(sides.over_j):
                tap, i, first = (j % taps, j // taps, 0) if order.in_innermost else (0, 0, o)
                begin = place.weight + order.element(every, C, Co, tap, i, first)
                row = (
                    layer.weight, layer.weight_size, begin, share, place.splits, place.in_innermost,
                    layer.r + group * Ci, layer.s, J, taps, every, *other, o, end_o, j, end_j, sides.step,
                    over_rows + (0 if across else n * J), over_columns + m * Co,
                )  # fmt: skip
                if across:
                    grouped.append((*row, layer.group_outputs, Ci))
                else:
                    tiles.append(row)
        factors += _input_factors(layer, sides, over_rows)
        for c in range(0, Co, FACTOR_TILE.BLOCK_M):
            factors.append((over_columns, len(sides.over_j), 1, Co, 1, c, Co, layer.s, layer.bias, place.bias))
        over_rows = over_columns + for_s
    return tiles, grouped, factors
