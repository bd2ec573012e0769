"""What a convolution by the wgmma kernels should take, from the cycles that its parts need: a model, no measurement.

A warpgroup makes 64 channels of 256 positions (Dᵀ = Wᵀ · Xᵀ); two of them share a multiprocessor's tensor cores, so
one loads, transforms and stores while the other multiplies. Results of 32 channels or fewer are made the other way
round (positions x channels), bound by what shared memory delivers. A weight gradient multiplies 64 rows, windows of
the input, by up to 192 columns, windows of the gradient, and its positions are shared by as many blocks as fill the
multiprocessors. Tiles that reach past an image, blocks that do not fill the last wave, weights that do not stay in
shared memory and partial results are counted. What is assumed stands in ``ASSUMED``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch

from bench.recorded import L2, MULTIPROCESSORS, Assumption, Kernel
from fastensdistill.kernels import wgmma
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.wgmma_conv import takes_norm
from fastensdistill.network.launch import Launch, Part
from fastensdistill.network.nodes import Conv, Node
from fastensdistill.network.on_load import NONE, Abilities

OPS = ("conv", "conv gradient", "weight gradient")

ASSUMED = {
    "clock": Assumption(1.47e9, "Hz", "a large product's 790-798 TFLOP/s at 4,096 FLOP a cycle and multiprocessor"),
    "wgmma": Assumption(0.5, "cycles a column", "m64n256k16 in 128: 2,048 products a cycle, the datasheet's rate"),
    "shared": Assumption(128, "bytes a cycle", "32 banks of 4 bytes; A and B both come from there"),
    "share": Assumption(0.8, "of that", "540-700 TFLOP/s expected of 798: barriers, first and last taps of a tile"),
    "epilogue": Assumption(1100, "instructions a warp and tile", "a probe of one epilogue had 1,210 with its products"),
    "on load": Assumption(46, "instructions for 16 bytes", "compiled: read, scale, shift, ReLU, write"),
    "issue": Assumption(0.5, "instructions a cycle", "a scheduler with one warp of each warpgroup, half of its slots"),
    "resident": Assumption(80e3, "bytes of weights", "what is left of 227 KB beside two tiles and what is stored"),
    "box": Assumption(400, "positions", "of a tile of 256 with its border; of a strided one's, a phase"),
    "overhead": Assumption(3, "tiles a block", "a weight gradient's ring is filled, its result written and summed"),
}  # fmt: skip
NARROW = 32  # channels of a result up to which positions are the rows
POSITIONS, COLUMNS, LINES, BORDERED = 256, 8, 32, 40
THREADS = 128  # of a warpgroup


def assumed(name: str) -> float:
    return ASSUMED[name].value


def tiles(images: int, height: int, width: int) -> int:
    """Tiles of eight columns and at most 32 lines, of one image or of several whole ones."""
    rows = min(height, LINES)
    rows = ceil(height / ceil(height / rows))
    together = max(1, min(images, LINES // rows, BORDERED // (rows + 2))) if rows == height else 1
    return ceil(width / COLUMNS) * ceil(height / rows) * ceil(images / together)


@dataclass(frozen=True)
class Shape:
    """A convolution over G groups of N images; for a data gradient result and input are swapped."""

    G: int
    N: int
    kernel: int
    stride: int
    channels: int
    out_channels: int
    height: int
    width: int
    gradient: bool = False  # of the data
    second: int = 0  # channels of a second source, one tap

    @property
    def depth(self) -> int:
        """What is summed over for a result, all taps: multiples of 16."""
        own = self.out_channels if self.gradient else self.channels
        return self.kernel**2 * 16 * ceil(own / 16) + 16 * ceil(self.second / 16)

    @property
    def result(self) -> int:
        """Channels."""
        return self.channels if self.gradient else self.out_channels

    @property
    def phases(self) -> int:
        """Of the result; a strided gradient makes each with the taps that reach it."""
        return self.stride**2 if self.gradient else 1

    @property
    def tiles(self) -> int:
        """Of all groups, and of one phase of the result."""
        return self.G * tiles(self.N, ceil(self.height / self.stride), ceil(self.width / self.stride))

    @property
    def box(self) -> float:
        """Bytes of a tile's input."""
        own = self.out_channels if self.gradient else self.channels
        phases = self.stride**2 if self.kernel == 3 and not self.gradient else 1
        return assumed("box") * phases * own * 2


def of(part: Part, launch: Launch) -> Shape:
    """The shape of a convolution's launch, with what it takes in as a second source."""
    node, G, gradient = part.network.by_name[launch.node], len(part.groups), launch.op == "conv gradient"
    assert isinstance(node, Conv)
    second = 0
    for step in launch.steps("second"):
        shortcut = part.network.by_name[step.arg]
        assert isinstance(shortcut, Conv)
        second = shortcut.shape[0] if gradient else shortcut.in_shape[0]
    (C, H, W), Co = node.in_shape, node.shape[0]
    return Shape(G, part.batch, node.kernel, node.stride, C, Co, H, W, gradient, second)


@dataclass(frozen=True)
class Wgmma:
    """Which convolutions are by these kernels, and what their plan lets them take in.

    ``plain``: only 3x3 at stride 1 from 64 channels on. ``ops`` as of launches.
    """

    plain: bool = False
    ops: tuple[str, ...] = OPS
    abilities: Abilities = NONE

    def covers(self, node: Node) -> bool:
        if not isinstance(node, Conv):
            return False
        channels, out_channels = node.in_shape[0], node.shape[0]
        if self.plain and not (min(channels, out_channels) >= 64 and (node.kernel, node.stride) == (3, 1)):
            return False
        return wgmma.covers(channels, out_channels, Window(node.kernel, node.stride, node.padding), torch.bfloat16)

    def __call__(self, part: Part, node: Conv) -> Abilities:
        if not self.covers(node):
            return NONE
        window = Window(node.kernel, node.stride, node.padding)
        fits = takes_norm(node.shape[0], node.in_channels, window, *node.in_shape[1:])
        return replace(self.abilities, norm_gradient=self.abilities.norm_gradient and fits)

    def computes(self, part: Part, launch: Launch) -> bool:
        return launch.op in self.ops and self.covers(part.network.by_name[launch.node])

    def kernel(self, part: Part, launch: Launch) -> Kernel:
        """One node: a launch's product by this model, its traffic by the plan."""
        shape, kinds = of(part, launch), {step.kind for step in launch.prologue}
        one = Kernel(launch.op, launch, part.network.by_name[launch.node], shape.G)
        one = replace(one, flops=float(launch.flops), nbytes=launch.nbytes)
        on_load, normed = bool(kinds & {"relu", "batch_norm", "scale_shift"}), "norm_gradient" in kinds
        if launch.op == "weight gradient":
            seconds = gradient_seconds(shape, on_load, normed)
            return replace(one, product=seconds, nbytes=one.nbytes + partial_bytes(shape))
        return replace(one, product=conv_seconds(shape, on_load or normed))


def together(one: Kernel, other: Kernel) -> Kernel:
    """Two convolutions of one layer as one launch: what one leaves idle the other uses, but for the last wave."""
    both = replace(one, groups=one.groups + other.groups, product=one.product + other.product)
    both = replace(both, flops=one.flops + other.flops, nbytes=one.nbytes + other.nbytes)
    if both.product:
        return both
    programs, occupancy = one.programs + other.programs, min(one.occupancy, other.occupancy)  # Triton's
    return replace(both, programs=programs, occupancy=occupancy, l2=one.l2 + other.l2, steps=one.steps + other.steps)


def on_load_slots(nbytes: float, threads: int = THREADS) -> float:
    """Instructions of a warp for so many bytes that ``threads`` share."""
    return nbytes / 16 / threads * assumed("on load")


def waves(units: float) -> int:
    return ceil(units / MULTIPROCESSORS)


def conv_seconds(shape: Shape, on_load: bool = False) -> float:
    """Forward or data gradient, its product alone; memory is the caller's."""
    return (narrow_cycles if shape.result <= NARROW else wide_cycles)(shape, on_load) / assumed("clock")


def wide_cycles(shape: Shape, on_load: bool) -> float:
    blocks = ceil(shape.result / 64)
    product = shape.depth / 16 * POSITIONS * assumed("wgmma") / shape.phases  # of a warpgroup and tile, on average
    beside = assumed("epilogue") / assumed("issue")
    if on_load:  # one block: each warpgroup its own tile; more: two share one
        beside += on_load_slots(shape.box / (1 if blocks == 1 else 2)) / assumed("issue") / shape.phases
    pair = max(2 * product / assumed("share"), product + beside)
    units = shape.tiles * shape.phases * blocks / 2
    weights = shape.depth * 2 * 64 * min(2, blocks)
    loaded = shape.tiles * shape.box * ceil(blocks / 2)
    loaded += 0 if weights <= assumed("resident") and blocks == 1 else units * weights / shape.phases
    return max(waves(units) * pair, loaded / L2 * assumed("clock"))


def narrow_cycles(shape: Shape, on_load: bool) -> float:
    rows, columns = 64, shape.result
    instruction = max(columns * assumed("wgmma"), (rows + columns) * 32 / assumed("shared"))
    product = shape.depth / 16 * POSITIONS / rows * instruction
    staged = POSITIONS * shape.result * 2 * shape.phases
    moved = shape.box * (3 if on_load else 1) + 2 * staged
    slots = assumed("epilogue") * shape.result / 64 * shape.phases + (on_load_slots(shape.box) if on_load else 0)
    # of three or four consumers one always has something to issue
    tile = max((product + moved / assumed("shared")) / assumed("share"), slots / (2 * assumed("issue")))
    return waves(shape.tiles) * tile


@dataclass(frozen=True)
class GradientCut:
    """How a weight gradient is cut: blocks of a group, products of 64 x ``columns`` for 16 positions, splits."""

    blocks: int
    products: int
    columns: int
    splits: int
    tiles: int  # of a group


def gradient_cut(shape: Shape) -> GradientCut:
    square = shape.kernel == 3
    shifted = square and shape.stride == 1
    x_width = 64 if min(shape.channels, 64) == 48 else min(shape.channels, 64)
    x_all = ceil(shape.channels / x_width)
    x_blocks = x_all if square else ceil(x_all / 3)
    windows = 3 if square else ceil(x_all / x_blocks)
    Co = shape.out_channels
    d_width = (Co if Co <= 32 else 64) if shifted else 16 if Co <= 48 else 32 if Co <= 96 else 64
    d_blocks = ceil(Co / d_width) if shifted else ceil(ceil(Co / d_width) / 3)
    blocks = (3 if square and not shifted else 1) * x_blocks * d_blocks
    count = shape.tiles // shape.G

    def time(splits: int) -> float:
        return waves(shape.G * blocks * splits) * (ceil(count / splits) + assumed("overhead"))

    splits = min(range(1, min(count, MULTIPROCESSORS) + 1), key=time)
    return GradientCut(blocks, ceil(windows / (64 // x_width)), 3 * d_width, splits, count)


def gradient_seconds(shape: Shape, on_load: bool = False, normed: bool = False) -> float:
    """A weight gradient's product; ``normed``: d goes through a BatchNorm's gradient as it is loaded."""
    cut = gradient_cut(shape)
    instruction = max(cut.columns * assumed("wgmma"), (64 + cut.columns) * 32 / assumed("shared"))
    product = POSITIONS / 16 * cut.products * instruction
    changed = on_load * assumed("box") * min(shape.channels, 64) * 2 + normed * POSITIONS * min(cut.columns, 64) * 2
    beside = on_load_slots(changed, 3 * THREADS) / assumed("issue")
    tile = max(product / assumed("share"), product / 3 + beside)
    own = ceil(cut.tiles / cut.splits) + assumed("overhead")
    return waves(shape.G * cut.blocks * cut.splits) * own * tile / assumed("clock")


def partial_bytes(shape: Shape) -> float:
    """Partial results of a weight gradient, written and read again."""
    return 8.0 * gradient_cut(shape).splits * shape.G * shape.kernel**2 * shape.channels * shape.out_channels
