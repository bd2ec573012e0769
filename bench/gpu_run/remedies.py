"""What a diagnosis found to help, in a file that later stages obey: so a step with a wrong launch can still be timed.

    remedies = Remedies.load(context.out / NAME)
    with remedies.in_force():
        FusedStep(..., implementations=remedies.dispatch_on(device))

Other warps or stages for a compiled kernel, half the columns for a shape, cuDNN's or Triton's convolution, another
layout of the wgmma kernels' tiles, an op's reference, and other ways to capture the step. Of several ``in_force``
inside one another the innermost counts, so that a diagnosis may try others within those of its stage; only ops that an
outer one keeps to their references stay there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_run.record import plain
from fastensdistill.engine import dispatch, graph
from fastensdistill.engine.dispatch import Choice, Dispatch
from fastensdistill.engine.graph import Captured
from fastensdistill.engine.part_run import Execution
from fastensdistill.kernels import wgmma
from fastensdistill.kernels.launch import KernelLaunch, around_launches, references_only
from fastensdistill.kernels.tiles import Tile, changed_tiles

NAME = "remedies.json"
TITLES = {"cudnn": "cuDNN", "triton": "Triton", "cuda": "the halo kernel", "wgmma": "wgmma"}
Match = dict[str, Any]
LEAST_COLUMNS = 16  # of a Triton matrix product
ROWS = ("BLOCK_R", "BLOCK_B")  # constants that follow the batch
_in_force: list[object] = []  # a token for each ``Remedies.in_force``, the innermost last


def match_of(launch: KernelLaunch) -> Match:
    """What a kernel is compiled for, whatever the batch: its constants, its tensors' dtypes, its absent operands."""
    kinds = getattr(launch.kernel, "fn", launch.kernel).__annotations__
    found: Match = {}
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            found[name] = str(value.dtype).removeprefix("torch.")
        elif name not in ROWS and (value is None or "constexpr" in str(kinds.get(name, ""))):
            found[name] = plain(value)
    return found


@dataclass(frozen=True)
class Varied:
    """A kernel, as compiled for ``match``, with other warps or stages, and without a limit of its registers."""

    kernel: str
    match: Match
    warps: int | None = None
    stages: int | None = None

    def fits(self, launch: KernelLaunch) -> bool:
        return self.kernel == launch.kernel.__name__ and self.match == match_of(launch)

    def vary(self, launch: KernelLaunch) -> KernelLaunch:
        return launch._replace(
            num_warps=self.warps or launch.num_warps,
            num_stages=self.stages or launch.num_stages,
            maxnreg=None,  # other warps need other registers, and the limit itself may be the fault
        )

    @property
    def words(self) -> str:
        own = [f"{n} {unit}" for n, unit in ((self.warps, "warps"), (self.stages, "stages")) if n]
        return " ".join([self.kernel, *(own or ["without a register limit"])]).replace(" 1 stages", " 1 stage")


@dataclass(frozen=True)
class Halved:
    """Half the columns of a matrix product's tile; ``kind`` and ``shape`` as ``kernels.tiles`` names them."""

    kind: str
    shape: tuple[int, ...]

    @property
    def words(self) -> str:
        return f"half the columns of {self.kind} {self.shape[0]} → {self.shape[1]}"


@dataclass(frozen=True)
class Capture:
    """How a step is captured: ``on`` False launches it from Python; ``warm_up`` runs before the capture; every graph
    with a pool of its own; no buffer freed before the same launch writes it again."""

    on: bool = True
    keep_buffers: bool = False
    warm_up: int | None = None
    pool_per_graph: bool = False

    @property
    def words(self) -> list[str]:
        if not self.on:
            return ["not captured"]
        warm_up = [f"{self.warm_up} warm-ups"] if self.warm_up else []
        return ["buffers kept"] * self.keep_buffers + warm_up + ["a pool per graph"] * self.pool_per_graph


@dataclass(frozen=True)
class Remedies:
    launches: tuple[Varied, ...] = ()
    halved: tuple[Halved, ...] = ()
    rows: tuple[Choice, ...] = ()
    references: tuple[str, ...] = ()
    capture: Capture = field(default_factory=Capture)
    copies: bool = False  # of tiles, by the wgmma kernels
    wgmma: bool = False  # what is predicted to be faster by those kernels is computed by them, proven or not

    @staticmethod
    def load(path: Path) -> Remedies:
        """Those in a file; none where there is no file."""
        if not path.exists():
            return Remedies()
        given = json.loads(path.read_text())
        return Remedies(
            tuple(Varied(**one) for one in given["launches"]),
            tuple(Halved(one["kind"], tuple(one["shape"])) for one in given["halved"]),
            tuple(map(Choice.read, given["rows"])),
            tuple(given["references"]),
            Capture(**given["capture"]),
            given.get("copies", False),
        )

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
        fresh.replace(path)

    @staticmethod
    def extend(path: Path, more: Remedies) -> Remedies:
        """Add ``more`` to the file, which other processes may be doing at the same time; all that it has now."""
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            every = Remedies.load(path).plus(more)
            every.save(path)
        return every

    def plus(self, more: Remedies) -> Remedies:
        """Both; of two for the same thing ``more`` has the last word."""
        same = lambda one: [new for new in more.launches if (new.kernel, new.match) == (one.kernel, one.match)]  # noqa: E731
        kept = tuple(one for one in self.launches if not same(one))
        capture = more.capture if more.capture != Capture() else self.capture
        return Remedies(
            kept + more.launches,
            tuple(dict.fromkeys(self.halved + more.halved)),
            tuple(dict.fromkeys(more.rows + self.rows)),  # the first row that matches counts
            tuple(dict.fromkeys(self.references + more.references)),
            capture,
            self.copies or more.copies,
            self.wgmma or more.wgmma,
        )

    @property
    def dispatch(self) -> Dispatch | None:
        """The table for launches one by one; None where they are the ops' own."""
        predicted = dispatch.PREDICTED if self.wgmma else ()
        return Dispatch(self.rows, predicted) if self.rows or self.wgmma else None

    def dispatch_on(self, device: torch.device) -> Dispatch | None:
        """The table for ``implementations=`` of a step, which uses what is proven; None where it may keep its own."""
        return Dispatch.on(device, self.rows) if self.rows else None

    @property
    def words(self) -> str:
        """All in one line, for a row of results; empty where there are none."""
        rows = [
            f"{row.op} {describe(row)} by {TITLES.get(row.implementation, row.implementation)}" for row in self.rows
        ]
        references = [f"{op} by its reference" for op in self.references]
        launches = [*(one.words for one in self.launches), *(one.words for one in self.halved)]
        every = [*launches, *rows, *references, *["copies of tiles"] * self.copies, *self.capture.words]
        return "; ".join(f"{one} ({every.count(one)} times)" if every.count(one) > 1 else one
                         for one in dict.fromkeys(every))  # fmt: skip

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Within, every launch and capture of this process obeys them, but for ``dispatch``, which a step is given."""
        with contextlib.ExitStack() as stack:
            token = object()
            _in_force.append(token)
            stack.callback(_in_force.pop)

            def vary(launch: KernelLaunch, do: Callable[[KernelLaunch], None]) -> None:
                do(self.varied(launch) if _in_force[-1] is token else launch)

            def change(kind: str, shape: tuple[int, ...], tile: Tile) -> Tile:
                return self.changed(kind, shape, tile) if _in_force[-1] is token else tile

            stack.enter_context(around_launches(vary))
            stack.enter_context(changed_tiles(change))
            if self.references:  # no name at all would mean every op
                stack.enter_context(references_only(*self.references))
            stack.enter_context(wgmma.in_copies(self.copies or wgmma.copies()))
            for owner, name, value in capturing(self.capture):
                stack.enter_context(replaced(owner, name, value))
            yield

    def varied(self, launch: KernelLaunch) -> KernelLaunch:
        """The launch with the warps and stages that it is to have."""
        return next((one.vary(launch) for one in self.launches if one.fits(launch)), launch)

    def changed(self, kind: str, shape: tuple[int, ...], tile: Tile) -> Tile:
        """The tile with the columns that it is to have."""
        return halve(tile) if Halved(kind, tuple(shape)) in self.halved else tile


def describe(row: Choice) -> str:
    if row.shape is None:
        return row.layer or "everywhere"
    k, stride, Ci, Co, *_ = row.shape
    return f"{k}x{k} {Ci} → {Co}" + (f" every {stride}" if stride > 1 else "")


def halve(tile: Tile) -> Tile:
    """With half the columns, where a matrix product can have them."""
    return tile._replace(BLOCK_N=max(LEAST_COLUMNS, tile.BLOCK_N // 2))


class Keeper:
    """An ``Execution.watch`` that keeps what a launch saw until it runs again: nothing is freed between."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}

    def __call__(self, launch: Any, buffers: dict[str, Any]) -> None:
        self.kept[id(launch)] = launch, dict(buffers)


_prepare, _warm_up = Captured.prepare, graph.WARM_UP


def _in_own_pool(self: Captured) -> None:
    if self.graph is None and not self.failed:
        self.pool = None  # it then asks for a new one
    _prepare(self)


def capturing(capture: Capture) -> Sequence[tuple[Any, str, Any]]:
    """What is set, and to what, for steps to be captured that way."""
    prepare = Captured.give_up if not capture.on else _in_own_pool if capture.pool_per_graph else _prepare
    return (
        (Captured, "prepare", prepare),
        (graph, "WARM_UP", capture.warm_up or _warm_up),
        (Execution, "watch", Keeper() if capture.keep_buffers else None),
    )


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
