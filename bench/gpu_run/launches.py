"""Every distinct launch of a plan against float64, each on its own; a wrong one is tried in other ways at once.

Before a launch runs, what it is lies on disk: where the process dies in it or hangs, the parent starts the stage again,
which passes over what is done and goes on behind the culprit. Records, all with ``check`` (which check) and ``index``:

    launch about to run   launch, where, op, node, variant, kernels
    launch                launch, variant, ok, output, error, allowed, moving; where it raised or died reason, crashed
    remedy, no remedy     launch, variant
    unjudged              reason: what it should be could not be computed
    launches              the totals, at the end
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.common import spoils_context, without_search
from bench.gpu_run.context import Context
from bench.gpu_run.record import Row as Recorded
from bench.gpu_run.remedies import NAME, Halved, Remedies, Varied, halve, match_of
from bench.launches import Expected, Prepared, errors, expected, prepare, written
from bench.setting import Setting
from fastensdistill.engine.dispatch import OPS, Choice, Dispatch, shape_of
from fastensdistill.kernels.launch import HAS_TRITON, KernelLaunch, record_launches, use_kernels
from fastensdistill.kernels.tiles import Tile, changed_tiles, device_arch

OWN, JUDGING = "own", "float64"
PATIENCE = 4  # crashes of one check, each a restart, after which a wrong launch is given its last variant at once


def computed_by(context: Context) -> str:
    """What computes the ops: the kernels, on a CPU Triton's interpreter where it works, else their references."""
    if not context.rehearse:
        return "kernels"
    works = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
    return "interpreter" if works and tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4) else "references"


def in_kernels(context: Context) -> contextlib.AbstractContextManager[None]:
    return use_kernels() if computed_by(context) == "interpreter" else contextlib.nullcontext()


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


@without_search()
@torch.no_grad()
def check_launches(context: Context, setting: Setting, warps: int | None = None, by_wgmma: bool = False) -> Recorded:
    """Check all distinct launches of ``setting`` that this stage has not done yet; the record of the totals.

    With ``warps`` every kernel is launched with so many, and wrong ones are told but not cured: no step runs them.
    ``by_wgmma`` are the convolutions that those kernels are predicted to compute faster, by those kernels.
    An error of the device is recorded and raised: restart the stage.
    """
    check = Check(context, setting, warps, by_wgmma)
    if check.finished:
        return check.finished
    dtype = torch.bfloat16 if by_wgmma else context.dtype
    with contextlib.nullcontext() if by_wgmma else in_kernels(context):
        for index, (prepared, _) in enumerate(prepare(setting, context.device, dtype, by_references=True)):
            if not by_wgmma or implementation(prepared, check.remedies) == "wgmma":
                check.launch(index, prepared)
    return check.finish()


class Check:
    """One check with what its earlier processes have recorded."""

    def __init__(self, context: Context, setting: Setting, warps: int | None, by_wgmma: bool = False):
        self.context, self.setting, self.warps, self.own = context, setting, warps, Remedies(wgmma=by_wgmma)
        own = f"{setting.network}, {setting.method}, {setting.batch} images, M = {setting.members}, K = {setting.k}"
        self.name = own + (f", {warps} warps" if warps else "") + (", wgmma" if by_wgmma else "")
        self.path = context.out / NAME
        self.remedies = Remedies.load(self.path).plus(self.own)
        self.rows = [row for row in context.record.earlier() if row.get("check") == self.name]
        self.finished = next((row for row in self.rows if row["kind"] == "launches"), None)
        self._settle_crashes()

    def add(self, kind: str, **values: Any) -> Recorded:
        row = self.context.record.add(kind, check=self.name, **values)
        self.rows.append(row)
        return row

    def _settle_crashes(self) -> None:
        """A launch that was about to run, with nothing after it, ended the process."""
        if not self.rows or self.rows[-1]["kind"] != "launch about to run":
            return
        last = self.rows[-1]
        if last["variant"] == JUDGING:
            self.add("unjudged", index=last["index"], reason="the process died")
        else:
            self._failed(last["index"], last["launch"], last["variant"], "the process died or hung", crashed=True)

    def _failed(self, index: int, launch: str, variant: str, reason: str, crashed: bool = False) -> None:
        self.add("launch", index=index, launch=launch, variant=variant, ok=False, output="", error=None, allowed=None,
                 moving=False, crashed=crashed, reason=reason)  # fmt: skip

    def of(self, index: int, kind: str = "launch") -> list[Recorded]:
        return [row for row in self.rows if row["kind"] == kind and row["index"] == index]

    def launch(self, index: int, prepared: Prepared) -> None:
        """Judge it; where it is wrong, try its variants in their order."""
        if self._done(index):
            return
        about = {"index": index, "launch": title(prepared), "where": prepared.where, "op": prepared.launch.op}
        about["node"] = prepared.launch.node
        self.add("launch about to run", variant=JUDGING, kernels=[], **about)
        try:
            right = expected(prepared)
            synchronise(self.context)
            every = variants(prepared, self.remedies, self.warps)
        except Exception as error:
            self.add("unjudged", index=index, reason=reason_of(error))
            if spoils_context(error):
                raise
            return
        tried = {row["variant"] for row in self.of(index) if not row["ok"]}
        for name, more in list(every.items()):
            last = list(every)[-1]
            if name in tried or (self._impatient() and name not in (OWN, last)):
                continue
            trial = self.remedies.plus(more)
            self.add("launch about to run", variant=name, kernels=kernels(prepared, trial), **about)
            if self._judge(index, name, prepared, trial, right):
                if name != OWN and not self.warps:
                    self.remedies = Remedies.extend(self.path, more).plus(self.own)
                    self.add("remedy", index=index, launch=title(prepared), variant=name)
                return
        if not self.warps:
            self.add("no remedy", index=index, launch=title(prepared), tried=list(every))

    def _done(self, index: int) -> bool:
        if self.of(index, "unjudged") or self.of(index, "remedy") or self.of(index, "no remedy"):
            return True
        return any((row["ok"] and row["variant"] == OWN) or self.warps for row in self.of(index))

    def _impatient(self) -> bool:
        return sum(row.get("crashed", False) for row in self.rows if row["kind"] == "launch") >= PATIENCE

    def _judge(self, index: int, name: str, prepared: Prepared, trial: Remedies, right: Expected) -> bool:
        """Run it twice in memory that starts as NaN, and record the worst of what it writes."""
        try:
            with trial.in_force(), poisoned():
                first = written(prepared, trial.dispatch or Dispatch())
                synchronise(self.context)
                second = written(prepared, trial.dispatch or Dispatch())
                synchronise(self.context)
            found = list(errors(first, right, prepared.weights.dtype))
        except Exception as raised:
            self._failed(index, title(prepared), name, reason_of(raised), crashed=spoils_context(raised))
            if spoils_context(raised):
                raise
            return False
        output, error, allowed = max(found, key=lambda one: one[1] / one[2], default=("", 0.0, 1.0))
        moving = [key for key, value in first.items() if not torch.equal(value, second[key])]
        ok = error <= allowed and not moving
        self.add("launch", index=index, launch=title(prepared), variant=name, ok=ok, output=output, error=error,
                 allowed=allowed, moving=bool(moving))  # fmt: skip
        return ok

    @property
    def by(self) -> str:
        if not self.own.wgmma:
            return computed_by(self.context)
        return "references" if self.context.rehearse else "wgmma"

    def finish(self) -> Recorded:
        launches = [row for row in self.rows if row["kind"] == "launch"]
        first: dict[int, bool] = {}
        for row in launches:
            first.setdefault(row["index"], row["ok"])
        counts = {kind: sum(row["kind"] == kind for row in self.rows) for kind in ("remedy", "no remedy", "unjudged")}
        return self.add(
            "launches", setting=self.setting.describe(), warps=self.warps, by=self.by,
            checked=len(first), wrong=sum(not ok for ok in first.values()),
            crashed=len({row["index"] for row in launches if row.get("crashed")}), remedied=counts["remedy"],
            no_remedy=counts["no remedy"], unjudged=counts["unjudged"], remedies=self.remedies.words,
            seconds=round(time.time() - self.rows[0]["at"], 1) if self.rows else 0.0,
        )  # fmt: skip


def implementation(prepared: Prepared, remedies: Remedies) -> str:
    """What computes a launch with ``remedies``."""
    arch = device_arch(prepared.weight_index)
    return (remedies.dispatch or Dispatch()).implementation(prepared.part, prepared.launch, arch)


def title(prepared: Prepared) -> str:
    return f"{prepared.where}: {prepared.title}"


def synchronise(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory starts as NaN, so that what a kernel leaves unwritten is an error."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Ops(TorchDispatchMode):
    """Collects the names of the package's ops that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "fastensdistill" and name not in self.names:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def recorded(prepared: Prepared, remedies: Remedies) -> tuple[list[KernelLaunch], list[Halved], list[str]]:
    """Its kernels' launches without launching them, the tiles that have columns to halve, and its ops."""
    tiles: dict[Halved, Tile] = {}

    def spy(kind: str, shape: tuple[int, ...], tile: Tile) -> Tile:
        tiles[Halved(kind, tuple(shape))] = tile
        return tile

    with remedies.in_force(), record_launches() as launches, changed_tiles(spy), Ops() as ops:
        written(prepared, remedies.dispatch or Dispatch())
    return launches, [one for one, tile in tiles.items() if halve(tile) != tile], ops.names


def kernels(prepared: Prepared, remedies: Remedies) -> list[dict[str, Any]]:
    """What is launched with ``remedies``, for a record; nothing where that cannot be found out."""
    try:
        launches = recorded(prepared, remedies)[0]
    except Exception:  # the launch itself is about to tell
        return []
    return [
        {
            "kernel": one.kernel.__name__, "grid": one.grid, "warps": one.num_warps, "stages": one.num_stages,
            "registers": one.maxnreg,
            "tile": [one.arguments[b] for b in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if b in one.arguments],
        }
        for one in map(remedies.varied, launches)
    ]  # fmt: skip


def variants(prepared: Prepared, remedies: Remedies, warps: int | None) -> dict[str, Remedies]:
    """What to add to ``remedies`` for each variant that changes anything, in the order in which they are tried."""
    launch = prepared.launch
    if remedies.wgmma:
        row = Choice(launch.op, "triton", f"{title(prepared)} is wrong by wgmma", shape=shape_of(prepared.part, launch))
        other = {} if remedies.copies else {"copies": Remedies(copies=True)}
        return {OWN: Remedies(), **other, "triton": Remedies(rows=(row,))}
    launches, halved, ops = recorded(prepared, remedies)
    own = [remedies.varied(launch) for launch in launches]

    def each(**what: int) -> Remedies:
        return Remedies(tuple(Varied(one.kernel.__name__, match_of(one), **what) for one in launches))

    if warps:
        return {f"{warps} warps": each(warps=warps)}
    found = {OWN: Remedies()}
    if any(one.maxnreg for one in own):
        found["no register limit"] = each()
    if any(one.num_stages > 1 for one in own):
        found["one stage"] = each(stages=1)
    for count in (4, 8):
        if any(one.num_warps != count for one in own):
            found[f"{count} warps"] = each(warps=count)
    if launch.op in OPS:
        if halved:
            found["half the columns"] = Remedies(halved=tuple(halved))
        row = Choice(launch.op, "cudnn", f"{title(prepared)} is wrong otherwise", shape=shape_of(prepared.part, launch))
        found["cudnn"] = Remedies(rows=(row,))
    elif ops:
        found["reference"] = Remedies(references=tuple(ops))
    return found
