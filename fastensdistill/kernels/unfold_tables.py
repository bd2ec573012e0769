"""Tables of the un-fold: which tile of which layer a program owns, and where in the gradients it begins.

A tile is up to 32 output channels by 32 values of a row of W. Along the side that is innermost in the gradients it is a
run of neighbours, which does not leave its block: of a row of W its neighbours where Co is innermost, whatever blocks
and taps they are in, and input channels at one tap where Ci is.
"""

from collections.abc import Iterator, Sequence
from math import prod

from fastensdistill.kernels.layout import FIELDS, LayerOffsets, Place, Rows, layers_of, weight_share
from fastensdistill.kernels.tiles import Tile

UNFOLD_TILE = Tile(32, 32, 0, 8, 1, "4 values a thread, 8 partial results of each at once: 64 KB on their way", 0, 128)
FACTOR_TILE = Tile(32, 32, 0, 4, 1, "latency decides: 32 factors by 32 of their partial sums at a time")
UNFOLD_COLUMNS, FACTOR_COLUMNS = 22, 10  # integers of a row of the two tables


def places_of(places: Sequence[int]) -> list[Place]:
    """The places behind an op's integers."""
    count = len(Place._fields)
    return [Place(*places[at : at + count]) for at in range(0, len(places), count)]


def _runs(count: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """First and end of runs of at most so many of ``count`` channels, each inside of a block."""
    for begin in range(0, count, block):
        for first in range(begin, min(begin + block, count), most):
            yield first, min(first + most, begin + block, count)


def _sides(layer: LayerOffsets, place: Place) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int]:
    """(first, end) of every tile along the output channels and along a row of W, and the step from value to value."""
    Ci, Co, taps = layer.in_channels, layer.out_channels, layer.taps
    M, N = UNFOLD_TILE.BLOCK_M, UNFOLD_TILE.BLOCK_N
    if not place.in_innermost:
        return [*_runs(Co, place.out_block, M)], [*_runs(Ci * taps, Ci * taps, N)], 1
    rows = [(c * taps + tap, end * taps) for c, end in _runs(Ci, place.in_block, N) for tap in range(taps)]
    return [*_runs(Co, Co, M)], rows, taps


def partial_count(fields: Sequence[int], places: Sequence[int]) -> int:
    """Partial sums of one branch, which the first launch leaves to the second."""
    count = 0
    for layer, place in zip(layers_of(fields), places_of(places), strict=True):
        over_o, over_j, _ = _sides(layer, place)
        count += len(over_o) * layer.in_channels * layer.taps + layer.out_channels * len(over_j)
    return count


def tables(fields_and_places: Sequence[int]) -> tuple[Rows, ...]:
    """A row per tile for the first launch, and one per run of factors for the second; arguments one after the other."""
    tiles: Rows = []
    factors: Rows = []
    over_rows, layers = 0, len(fields_and_places) // (FIELDS + len(Place._fields))
    fields, places = fields_and_places[: layers * FIELDS], fields_and_places[layers * FIELDS :]
    for layer, place in zip(layers_of(fields), places_of(places), strict=True):
        Co, Ci, taps, order = layer.out_channels, layer.in_channels, layer.taps, place.order
        every, C, J = taps * layer.positions, Ci // layer.positions, Ci * taps
        over_o, over_j, step = _sides(layer, place)
        share, block = prod(weight_share(layer, place)), place.in_block * place.out_block
        # the other side: values of a block, from block to block, from channel to channel, from tap to tap
        if order.in_innermost:
            other = place.out_block, every * block, place.in_block, 0
        else:
            other = place.in_block, order.blocks(C, Co)[1] * every * block, place.out_block, block
        over_columns = over_rows + len(over_o) * J
        for n, (o, end_o) in enumerate(over_o):
            for m, (j, end_j) in enumerate(over_j):
                tap, i, first = (j % taps, j // taps, 0) if order.in_innermost else (0, 0, o)
                begin = place.weight + order.element(every, C, Co, tap, i, first)
                tiles.append((
                    layer.weight, layer.weight_size, begin, share, place.splits, place.in_innermost, layer.r, layer.s,
                    J, taps, every, *other, o, end_o, j, end_j, step, over_rows + n * J, over_columns + m * Co,
                ))  # fmt: skip
        for c in range(0, Ci, FACTOR_TILE.BLOCK_M):
            factors.append((over_rows, len(over_o) * taps, taps, J, taps, c, Ci, layer.r, -1, -1))
        for c in range(0, Co, FACTOR_TILE.BLOCK_M):
            factors.append((over_columns, len(over_j), 1, Co, 1, c, Co, layer.s, layer.bias, place.bias))
        over_rows = over_columns + len(over_j) * Co
    return tiles, factors
