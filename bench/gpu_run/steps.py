"""Whole steps of tiny networks: against float64, and captured against launched one by one, bit for bit.

Records: ``step`` {method, network, ok, errors, bounds}; ``replay`` {method, network, same, twice_same, captured,
capture_error, differs_in}; either with ``error`` where it raised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.common import spoils_context, without_search
from bench.contenders import CONTENDERS, Engine, Gate, changes, fused_engine
from bench.gpu_run.context import Context
from bench.gpu_run.faults import StandInGraphs
from bench.gpu_run.launches import reason_of
from bench.gpu_run.record import Row
from bench.gpu_run.remedies import NAME, Capture, Remedies
from bench.setting import Setting, batches, make

METHODS = ("tdiv-sdiv", "kd", "teach")
COVERED = "narrow"  # of whose layers the wgmma kernels compute some, where they are proven
STEPS = 4  # so that the pair changes inside the captured graph
REFUSED = "the step could not be captured"  # how ``engine.graph`` begins its warning


@without_search()
def check_step(context: Context) -> bool:
    """Both checks for every method that this stage has not done yet; whether all is right."""
    remedies = Remedies.load(context.out / NAME)
    right = True
    for network, method in (*(("tiny", method) for method in METHODS), (COVERED, METHODS[0])):
        setting = Setting(network, method, context.sizes.tiny, context.sizes.odd.members)
        for kind, check, good in (("step", against_float64, "ok"), ("replay", replayed, "same")):
            done = kind, method, network
            earlier = (r for r in context.record.earlier() if (r["kind"], r.get("method"), r.get("network")) == done)
            row = next(earlier, None) or _recorded(context, kind, check, setting, remedies)
            right &= bool(row.get(good)) and row.get("twice_same", True)
    return right


Check = Callable[[Context, Setting, Remedies], dict[str, Any]]


def _recorded(context: Context, kind: str, check: Check, setting: Setting, remedies: Remedies) -> Row:
    own = {
        "method": setting.method,
        "network": setting.network,
        "setting": setting.describe(),
        "remedies": remedies.words,
    }
    try:
        return context.record.add(kind, **own, **check(context, setting, remedies))
    except Exception as error:
        row = context.record.add(kind, **own, error=reason_of(error))
        if spoils_context(error):
            raise
        return row


def against_float64(context: Context, setting: Setting, remedies: Remedies) -> dict[str, Any]:
    """Two steps launched from Python through the gate."""
    launched = replace(remedies, capture=Capture(on=False))
    gate = Gate(setting, context.device)
    table = remedies.dispatch_on(context.device)
    contender = replace(CONTENDERS["fused"], build=lambda problem: fused_engine(problem, table))
    with launched.in_force():
        ok, errors = gate.check(contender)
    return {"ok": ok, "errors": errors, "bounds": gate.bounds}


def replayed(context: Context, setting: Setting, remedies: Remedies) -> dict[str, Any]:
    """Four steps captured, captured again, and launched."""
    first, again = (run_steps(context, setting, remedies, capture=True) for _ in range(2))
    launched = run_steps(context, setting, remedies, capture=False)
    differs = differing(first.changes, launched.changes)
    return {
        "same": not differs, "twice_same": not differing(first.changes, again.changes), "captured": first.captured,
        "capture_error": first.error, "differs_in": differs,
    }  # fmt: skip


@torch.no_grad()
def build(
    context: Context, setting: Setting, remedies: Remedies, capture: bool, dtype: torch.dtype = torch.float32
) -> Engine:
    """The fused engine, ready for its first batch; modules of ``dtype`` float64 compute in it throughout."""
    precision = "fp32" if context.rehearse or dtype == torch.float64 else "bf16"
    problem = make(setting, context.device).copy(dtype, precision)
    engine = fused_engine(problem, remedies.dispatch_on(context.device), capture)
    engine.step.build((setting.batch, 3, setting.size, setting.size))
    if capture and context.rehearse:
        engine.step.graphs = StandInGraphs(engine.step.state, context.device)
    return engine


@dataclass
class Run:
    """What four steps changed; whether they were captured, and if not why."""

    changes: dict[str, Tensor]
    captured: bool
    error: str


def run_steps(context: Context, setting: Setting, remedies: Remedies, capture: bool) -> Run:
    """Four steps from the same start on the same batches, with the remedies in force."""
    given = batches(setting, STEPS, context.device, [(0, 1)], torch.float32)
    with remedies.in_force(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine = build(context, setting, remedies, capture)
        found = changes(engine, given)
    made = list(engine.step.graphs.made.values()) if engine.step.graphs else []
    return Run(found, bool(made) and all(one.graph is not None for one in made), refusal(warned))


def refusal(warned: list[warnings.WarningMessage]) -> str:
    """Why a capture failed, from its warning."""
    return next((str(one.message) for one in warned if str(one.message).startswith(REFUSED)), "")


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of what is not the same, bit for bit."""
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@dataclass(frozen=True)
class Place:
    """Of a launch in a step: its pass, its number there, and the weights it is run with."""

    where: str
    index: int
    weights: Any
    launch: Any

    @property
    def name(self) -> dict[str, Any]:
        return {"pass": self.where, "index": self.index, "op": self.launch.op, "node": self.launch.node}


def places(step: Any) -> dict[int, Place]:
    """All launches of a ``FusedStep`` or ``FusedTeachStep``, by identity."""
    return {
        id(launch): Place(where, i, run.weights, launch)
        for run, names in step.passes()
        for part, where in zip(run.parts, names, strict=False)  # a part has no backward part where nothing is ascended
        for i, launch in enumerate(part.launches)
    }
