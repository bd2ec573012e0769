"""What the updates of a flat tensor share: runs of values that are treated alike, and averages over time.

Values that all have the same scale, decay and count of steps are one run, and a launch needs no table. Where they do
not, the launch goes over blocks of runs, one after the other: which values, whose clipping factor, whose count, and
whether they decay and move at all. No byte is read per value, and no block is of two runs.

    e ← e + w · (p − e)        w = max(1 − ema_decay, 9 / (10 + t))        t: updates before this one

is an average with a decay of min(ema_decay, (1 + t) / (10 + t)), which forgets where it began soon.
Source: the beginning is that of TensorFlow's ExponentialMovingAverage.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.launch import launch, tl, triton
from fastensdistill.kernels.layout import Rows, device_tables
from fastensdistill.kernels.operands import check_contiguous, check_like
from fastensdistill.kernels.tiles import Tile


class Run(NamedTuple):
    """Values ``start`` .. ``start + size`` of a flat tensor, which an update treats alike."""

    start: int
    size: int
    network: int = 0  # whose norm clips the gradient
    counter: int = 0  # which of the counts is that of its steps
    decays: int = 1  # 0 or 1
    moves: int = 1  # 0: it is left as it is


RUN_FIELDS = len(Run._fields)


class Average(NamedTuple):
    """What an update moves an average over time by."""

    values: Tensor  # like the parameters
    updates: Tensor  # t, a scalar
    decay: float


def runs_of(fields: Sequence[int], count: int) -> list[Run]:
    """The runs behind an op's integers; one of all ``count`` values where there are none."""
    found = [Run(*fields[i : i + RUN_FIELDS]) for i in range(0, len(fields), RUN_FIELDS)]
    return found or [Run(0, count)]


def fields_of(runs: Iterable[Run]) -> list[int]:
    """The integers by which ops take ``runs``."""
    return [value for run in runs for value in run]


def joined(runs: Iterable[Run]) -> list[Run]:
    """``runs`` by network, those that follow one another and are treated alike as one."""
    found: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.network, run.start)):
        last = found[-1] if found else None
        if last is not None and last.start + last.size == run.start and last[2:] == run[2:]:
            found[-1] = last._replace(size=last.size + run.size)
        elif run.size:
            found.append(run)
    return found


def unit(fields: Sequence[int]) -> int:
    """What every run's start and size are multiples of: 1, 2 or 4 values, so that a thread may load 16 bytes."""
    return math.gcd(4, *(value for run in runs_of(fields, 4) for value in (run.start, run.size)))


@dataclass(frozen=True)
class Blocks:
    """Runs cut into blocks of at most so many values: called with the runs' integers, the rows of their table.

    A row is that of a run, its start and size in units.
    """

    values: int

    def __call__(self, fields: Sequence[int]) -> tuple[Rows, ...]:
        per, found = unit(fields), Rows()
        for run in runs_of(fields, 0):
            for at in range(run.start, run.start + run.size, self.values):
                count = min(self.values, run.start + run.size - at)
                found.append((at // per, count // per, *run[2:]))
        return (found,)


class Cut(NamedTuple):
    """How a launch goes over a flat tensor: its blocks, the table of them if it has one, and a table's unit."""

    programs: int
    blocks: Tensor | None
    unit: int


def cut(fields: Sequence[int], values: Tensor, block: int) -> Cut:
    """``values`` in blocks of at most so many, of the runs behind an op's integers where there are any."""
    if not fields:
        return Cut(-(-values.numel() // block), None, 1)
    (table,) = device_tables(Blocks(block), fields, values.device)
    return Cut(len(table), table, unit(fields))


def launch_update(kernel: Any, tile: Tile, o: Any, **arguments: Any) -> None:
    """Launch an update's ``kernel`` on its operands ``o``, with what all updates take and ``arguments`` of its own."""
    over = cut(o.runs, o.p, tile.BLOCK_N)
    launch(
        kernel, (over.programs,), tile, o, p_g=o.g.contiguous(), p_blocks=over.blocks, count=o.p.numel(),
        least=1 - o.average_decay, UNIT=over.unit, RUNS=over.blocks is not None, AVERAGE=o.average is not None,
        CLIP=o.clip is not None, **arguments,
    )  # fmt: skip


@triton.jit
def block_values(p_blocks, count, UNIT: tl.constexpr, RUNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where this program's values are, and which of them there are."""
    i = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    if RUNS:
        o = tl.load(p_blocks + i * 6) * UNIT + o_n
        m = o_n < tl.load(p_blocks + i * 6 + 1) * UNIT
    else:
        o = i * BLOCK_N + o_n
        m = o < count
    return o, m


@triton.jit
def block_field(p_blocks, COLUMN: tl.constexpr):
    """An integer of this program's run."""
    return tl.load(p_blocks + tl.program_id(0).to(tl.int64) * 6 + COLUMN)


@triton.jit
def averaged(p_average, p_updates, b_p, o, m, least):
    """Moves the average of the values at ``o`` towards ``b_p``."""
    weight = tl.maximum(9.0 / (10.0 + tl.load(p_updates)), least)
    b_e = tl.load(p_average + o, mask=m, other=0.0)
    tl.store(p_average + o, b_e + weight * (b_p - b_e), mask=m)


def of_run(tensor: Tensor, run: Run) -> Tensor:
    """The values of ``run`` in a contiguous tensor, in place."""
    return tensor.view(-1)[run.start : run.start + run.size]


def average_weight(updates: Tensor, decay: float) -> Tensor:
    """w, a scalar on the device, of the update after so many ``updates``."""
    return (9.0 / (10.0 + updates)).clamp_(min=1 - decay)


def check_runs(fields: Sequence[int], values: Tensor, clip: Tensor | None, counts: Tensor | None = None) -> None:
    """Raise InputError for runs that are not of ``values``, or whose network or count is not there."""
    for run in runs_of(fields, values.numel()) if fields else []:
        of_values = run.start >= 0 and 0 < run.size <= values.numel() - run.start
        known = [0 <= i < len(x) for i, x in ((run.network, clip), (run.counter, counts)) if x is not None]
        if not (of_values and all(known)):
            sizes = (("factors", clip), ("counts", counts))
            there = " and ".join(f"{len(x)} {name}" for name, x in sizes if x is not None)
            raise InputError(f"{run} does not fit {values.numel()} values{there and ' with '}{there}")


def check_like_values(name: str, tensor: Tensor | None, values: Tensor) -> None:
    """Raise InputError unless ``tensor`` is of the shape, dtype and device of the flat ``values``, and contiguous."""
    if tensor is not None:
        if tensor.shape != values.shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(values.shape)}")
        check_like(name, tensor, "p", values)
        check_contiguous((name, tensor))


def check_scalars(name: str, tensor: Tensor | None, dimensions: int, values: Tensor) -> None:
    """Raise InputError unless ``tensor`` has so many dimensions, and the dtype and device of ``values``."""
    if tensor is not None:
        if tensor.dim() != dimensions:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {dimensions} dimensions")
        check_like(name, tensor, "p", values)
