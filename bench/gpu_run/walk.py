"""Launches right, step wrong: a step run launch by launch beside float64, naming the first buffer that parts from it.

Three steps from one state, on one batch and pair: as it is, by the ops' references in the same precision, and in
float64. Everything is compared in the order in which it comes to be: the weights a pass is given, what stands in the
buffers without a launch having written it (images, the gradient of the logits), what each launch writes, and after the
passes the gradients, the update and the losses. A first step, after which all weights change by a quarter, is not
compared: it leaves behind it what a later step must not find, weights that are packed already, and momentum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.common import without_search
from bench.contenders import Engine
from bench.gpu_run.context import Context
from bench.gpu_run.record import Row
from bench.gpu_run.remedies import NAME, Capture, Remedies
from bench.gpu_run.steps import build, places
from bench.launches import distance, named
from bench.setting import Setting, batches, drawn_pairs
from fastensdistill.kernels.launch import references_only
from fastensdistill.network.launch import INPUT, Launch, is_sums

CHANGE = 0.25  # of every weight between the two steps
FLOOR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative errors below it are those of rounding
MASKS = 10  # times the floor: bits of values about zero are anybody's
Key = tuple[str, int, str, str, str]  # pass, index, op, node, buffer
Sink = Callable[[Key, Tensor], None]


@without_search()
@torch.no_grad()
def walk(context: Context, setting: Setting) -> Row:
    """Compare a step of ``setting``; the record of the first wrong buffer, ``nothing found`` where there is none."""
    remedies = Remedies.load(context.out / NAME)
    right: list[tuple[Key, Tensor]] = []
    with references_only():
        exact = build(context, setting, Remedies(), capture=False, dtype=torch.float64)
        run_step(exact, context, 0)
        start = changed(exact.step.parameters)
        second_step(exact, start, context, lambda key, value: right.append((key, value)))
        peer = build(context, setting, Remedies(), capture=False)
        run_step(peer, context, 0)
        own = errors_beside(right, peer, start, context)
    with replace(remedies, capture=Capture()).in_force():
        step = build(context, setting, remedies, capture=False)
        run_step(step, context, 0)
        found = errors_beside(right, step, start, context)
    allowed = [limit(key, error, context.dtype) for (key, _), error in zip(right, own, strict=True)]
    wrong = [i for i, (error, most) in enumerate(zip(found, allowed, strict=True)) if error > most]
    row: dict[str, Any] = {"setting": setting.describe(), "remedies": remedies.words, "buffers": len(right)}
    if not wrong:
        return context.record.add("walk", first_wrong="nothing found", **row)
    i = wrong[0]
    return context.record.add(
        "walk", first_wrong=words(right[i][0]), error=found[i], allowed=allowed[i],
        before=words(right[i - 1][0]) if i else None, exceeded=len(wrong), **row,
    )  # fmt: skip


def words(key: Key) -> dict[str, Any]:
    return dict(zip(("pass", "index", "op", "node", "buffer"), key, strict=True))


def limit(key: Key, own: float, dtype: torch.dtype) -> float:
    """Twice what PyTorch errs in the same precision, or the floor."""
    return max(2 * own, FLOOR[dtype] * (MASKS if key[4].endswith("mask") else 1))


def run_step(engine: Engine, context: Context, i: int) -> Any:
    """Its results on the ``i``-th batch, the same for all."""
    setting = engine.problem.setting
    pairs = drawn_pairs(setting, engine.problem.config.seed, 2)
    return engine(batches(setting, 2, context.device, pairs, engine.step.parameters.dtype)[i])


def second_step(engine: Engine, start: list[Tensor], context: Context, sink: Sink) -> None:
    """From the state ``start``; ``sink`` is told everything."""
    for mine, value in zip(engine.step.parameters.state(), start, strict=True):
        mine.copy_(value)
    with watched(engine.step, sink):
        results = run_step(engine, context, 1)
    for name, value in results.items():
        sink(("results", 0, "", "", name), value)


def errors_beside(
    right: list[tuple[Key, Tensor]], engine: Engine, start: list[Tensor], context: Context
) -> list[float]:
    """The errors of the second step of ``engine``, in the order of ``right``."""
    found: list[float] = []

    def compare(key: Key, value: Tensor) -> None:
        other, e = right[len(found)]
        assert key == other, f"{key}, expected {other}: the steps are not the same launches"
        found.append(distance(value, e.double()))

    second_step(engine, start, context, compare)
    return found


def changed(parameters: Any) -> list[Tensor]:
    """The state with every weight a quarter larger or smaller, at random: no activation grows by it."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for tensor in parameters.state():
        value = tensor.clone()
        if tensor is parameters.values or tensor is parameters.deviations:
            signs = torch.randint(2, tensor.shape, generator=generator).mul_(2).sub_(1).to(tensor)
            value *= 1 + CHANGE * signs
        found.append(value)
    return found


@contextlib.contextmanager
def watched(step: Any, sink: Sink) -> Iterator[None]:
    """Within, ``sink(key, tensor)`` is told of everything as it comes to be; tensors that are overwritten as copies."""
    watch = Watch(step, sink)
    step.execution.watch, finish, update = watch, step.trained.finish, step.update
    step.trained.finish, step.update = watch.after_finish(finish), watch.around_update(update)
    try:
        yield
    finally:
        del step.execution.watch, step.trained.finish, step.update


class Watch:
    def __init__(self, step: Any, sink: Sink):
        self.step, self.sink, self.places = step, sink, places(step)
        self.seen: list[tuple[dict[str, Any], set[str]]] = []  # buffers of a run, and which have been told

    def __call__(self, launch: Launch, buffers: dict[str, Any]) -> None:
        place = self.places[id(launch)]
        if place.index == 0:
            self._weights(place.where, place.weights)
        told = next((told for known, told in self.seen if known is buffers), None)
        if told is None:
            told = set()
            self.seen.append((buffers, told))
        given = [name for name in launch.reads if name not in told]
        gradients = self.step.trained.gradients  # where parameters' gradients are written, in the place of buffers
        for kind, names in (("given", given), (launch.op, launch.writes)):
            for name in names:
                told.add(name)
                value = buffers[name] if name in buffers else gradients[name].clone()
                self._buffer((place.where, place.index, kind, launch.node), name, value)
        if launch.op == "norm statistics":
            norm = place.weights.norms[launch.node]
            for name in ("running_mean", "running_var"):
                self.sink((place.where, place.index, launch.op, launch.node, name), getattr(norm, name).clone())

    def _buffer(self, at: tuple[str, int, str, str], name: str, value: Any) -> None:
        if name == INPUT and at[0].startswith("distillation"):
            # of images that are hardly changed only the change tells
            name, value = "perturbation of the images", value - self.step.images
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            bits = torch.arange(8, dtype=torch.uint8, device=value.device)
            value = ((value[..., None] >> bits) & 1).float()
        for part, tensor in named(value, name).items():
            self.sink((*at, part), tensor.sum(1) if is_sums(part) else tensor)

    def _weights(self, where: str, weights: Any) -> None:
        for node, layer in weights.layers.items():
            for name in ("forward", "gradient", "bias"):
                if getattr(layer, name) is not None:
                    self.sink((where, 0, "weights", node, name), getattr(layer, name).clone())
        for node, rows in weights.scale_shift.items():
            for name, value in zip(("scale", "shift"), rows, strict=True):
                self.sink((where, 0, "weights", node, name), value.clone())

    def after_finish(self, finish: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            finish()
            trained = self.step.trained
            self._between("gradients", "gradient", trained.parameters.gradient)
            if trained.factor_gradients is not None:
                self._between("gradients", "factor_gradients", trained.factor_gradients)

        return run

    def around_update(self, update: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            parameters = self.step.parameters
            trained = {
                "parameters": parameters.values, "momentum": parameters.momentum,
                "deviations": parameters.deviations, "deviation_momentum": parameters.deviation_momentum,
            }  # fmt: skip
            before = [tensor.clone() for tensor in trained.values()]
            update(*arguments)
            for (name, tensor), value in zip(trained.items(), before, strict=True):
                self._between("update", name, tensor - value)

        return run

    def _between(self, where: str, name: str, value: Tensor) -> None:
        if value.numel():
            self.sink((where, 0, "", "", name), value.clone())
