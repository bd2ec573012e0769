"""Captured differs from launched, or cannot be captured: what helps, in which part of the step, from which launch on.

First ways to capture the whole step: no buffer freed, more warm-ups, a pool per graph; the first that makes four steps
equal those launched, bit for bit, is the remedy, and without one the step is launched from Python. Then the parts of a
step, each captured apart behind launched ones. Then ever shorter beginnings of the part that differs, by halving.
Records: ``capture about to run`` and ``capture tried`` per way, ``capture remedy``, and ``capture`` at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.common import spoils_context, without_search
from bench.gpu_run.context import Context
from bench.gpu_run.launches import reason_of
from bench.gpu_run.record import Row
from bench.gpu_run.remedies import NAME, Capture, Remedies, replaced
from bench.gpu_run.steps import build, differing, places, refusal, run_steps
from bench.launches import named
from bench.setting import Setting, Teaching, batches, drawn_pairs
from fastensdistill.network.launch import Launch

WAYS = (Capture(keep_buffers=True), Capture(warm_up=6), Capture(pool_per_graph=True))
WHOLE = "the whole step"
STATE = (  # of ``FlatParameters.state``, in its order
    "parameters", "momentum", "deviations", "deviations' momentum", "running means", "running variances", "batches",
)  # fmt: skip
Tensors = dict[str, Tensor]


@without_search()
def diagnose_capture(context: Context, setting: Setting) -> Row:
    """Find what helps and where it differs; the record, with ``differs_in`` empty where nothing does."""
    remedies = replace(Remedies.load(context.out / NAME), capture=Capture())
    own = {"setting": setting.describe()}
    launched = run_steps(context, setting, remedies, capture=False).changes
    again = run_steps(context, setting, remedies, capture=False).changes
    if moving := differing(again, launched):
        return context.record.add("capture", differs_in="two launched runs", launch=None, how=moving, remedy="", **own)
    if tried(context, setting, remedies, launched):
        return context.record.add("capture", differs_in="", launch=None, remedy="", **own)
    ways = (way for way in WAYS if tried(context, setting, replace(remedies, capture=way), launched))
    remedy = Remedies(capture=next(ways, Capture(on=False)))
    Remedies.extend(context.out / NAME, remedy)
    context.record.add("capture remedy", remedy=remedy.words, **own)
    try:
        with remedies.in_force():
            found = localise(Parts(context, setting, remedies))
    except Exception as error:
        if spoils_context(error):
            raise
        found = {"differs_in": "not found", "launch": None, "reason": reason_of(error)}
    return context.record.add("capture", **found, remedy=remedy.words, **own)


def tried(context: Context, setting: Setting, remedies: Remedies, launched: Tensors) -> bool:
    """Whether four steps captured this way are those ``launched``; not where an earlier process died of it."""
    way = ", ".join(remedies.capture.words) or "as it is"
    own = {"setting": setting.describe(), "way": way}
    earlier = [r for r in context.record.earlier() if r.get("way") == way and r["setting"] == own["setting"]]
    if earlier:
        return bool(earlier[-1].get("same"))
    context.record.add("capture about to run", **own)
    try:
        run = run_steps(context, setting, remedies, capture=True)
    except Exception as error:
        context.record.add("capture tried", same=False, captured=False, capture_error=reason_of(error), **own)
        if spoils_context(error):
            raise
        return False
    differs = differing(run.changes, launched)
    context.record.add("capture tried", same=run.captured and not differs, captured=run.captured,
                       capture_error=run.error, differs_in=differs, **own)  # fmt: skip
    return run.captured and not differs


def localise(parts: Parts) -> dict[str, Any]:
    """The first part that differs when it is captured apart, else the whole step, and in it the first launch."""
    for name in (*parts.order, WHOLE):
        parts.begin(name)
        verdict = parts.verdict(name)
        if verdict:
            return {"differs_in": name, "launch": halved(parts, name), "how": verdict}
        parts.go_on(name)
    return {"differs_in": "no part by itself", "launch": None}


def halved(parts: Parts, name: str) -> dict[str, Any] | None:
    """The first launch after which the part differs; None where that is behind its last launch."""
    same, differs = 0, parts.count(name)
    if not differs or not parts.verdict(name, differs):
        return None
    while differs - same > 1:
        middle = (same + differs) // 2
        if parts.verdict(name, middle):
            differs = middle
        else:
            same = middle
    return parts.last(name, differs)


class Stopped(Exception):
    """The beginning of a part is done."""


class Beginning:
    """An ``Execution.watch`` that stops behind so many launches; without a number it counts them."""

    def __init__(self, most: int | None = None):
        self.most, self.count = most, 0
        self.launch: Launch | None = None
        self.buffers: dict[str, Any] = {}

    def __call__(self, launch: Launch, buffers: dict[str, Any]) -> None:
        self.count, self.launch = self.count + 1, launch
        if self.count == self.most:
            self.buffers = dict(buffers)
            raise Stopped


class Parts:
    """The parts of a step, each to be run launched or captured from the same state, whole or its beginning alone."""

    def __init__(self, context: Context, setting: Setting, remedies: Remedies):
        self.context = context
        engine = build(context, setting, remedies, capture=True)
        self.step: Any = engine.step
        self.graphs, self.step.graphs = type(self.step.graphs), None
        seed = engine.problem.config.seed
        engine(batches(setting, 1, context.device, drawn_pairs(setting, seed, 1), torch.float32)[0])
        self.teach = isinstance(engine.problem, Teaching)
        self.bodies: dict[str, Callable[[], Tensors]] = {
            **({} if self.teach else {"perturbation": self.perturbation}),
            "forward": self.forward, "backward": self.backward, "un-fold and update": self.update, WHOLE: self.whole,
        }  # fmt: skip
        self.order = [name for name in self.bodies if name != WHOLE]
        self.images = self.step.images
        self.start = self.state()

    def perturbation(self) -> Tensors:
        (images,), found = self.step._perturb(self.step.images)
        self.images = images
        return {"perturbed images": images, **found}

    def forward(self) -> Tensors:
        trained = self.step.trained
        trained.refresh()
        with replaced(trained, "backward", self._take):
            losses = list(self.step._gradients(self.images, self.step.labels, False))
        self.buffers = dict(trained.buffers)
        return named(losses, "losses") | {"gradient of the logits": self.seed} | named(self.buffers)

    def _take(self, seed: Tensor, add: bool = False) -> None:
        self.seed = seed

    def backward(self) -> Tensors:
        self.step.trained.buffers = dict(self.buffers)
        self.step.trained.backward(self.seed, False)
        return {}

    def update(self) -> Tensors:
        self.step.trained.finish()
        self.step.update()
        return {}

    def whole(self) -> Tensors:
        return self.step.body()

    def state(self) -> list[Tensor]:
        """Copies of all that outlives a part."""
        return [tensor.clone() for tensor in self.kept().values()]

    def kept(self) -> Tensors:
        trained, parameters = self.step.trained, self.step.parameters
        state = dict(zip(STATE, parameters.state(), strict=True))
        return state | {"the layers' gradients": trained.layer_gradients, "the gradient": parameters.gradient}

    def put_back(self, state: list[Tensor]) -> None:
        for tensor, value in zip(self.kept().values(), state, strict=True):
            tensor.copy_(value)

    def begin(self, name: str) -> None:
        if name == WHOLE:
            self.put_back(self.start)

    def go_on(self, name: str) -> None:
        """Launch the part, so that the next finds what it reads."""
        self.run(name, Beginning())

    @torch.no_grad()
    def run(self, name: str, beginning: Beginning) -> Tensors:
        """What the part leaves behind, alive at its end or where ``beginning`` stops."""
        self.step.execution.watch = beginning
        try:
            found = self.bodies[name]()
        except Stopped:
            found = named(beginning.buffers)
        finally:
            del self.step.execution.watch
        return found | self.kept()

    def count(self, name: str) -> int:
        """Its launches."""
        before, beginning = self.state(), Beginning()
        self.run(name, beginning)
        self.put_back(before)
        return beginning.count

    def last(self, name: str, most: int) -> dict[str, Any]:
        """The name of the last of its first ``most`` launches."""
        before, beginning = self.state(), Beginning(most)
        self.run(name, beginning)
        self.put_back(before)
        return places(self.step)[id(beginning.launch)].name

    @torch.no_grad()
    def verdict(self, name: str, most: int | None = None) -> str:
        """How the part, or its first ``most`` launches, differs when it is captured; empty where it does not."""
        before = self.state()
        launched = {key: value.clone() for key, value in self.run(name, Beginning(most)).items()}
        self.put_back(before)
        held: Tensors = {}

        def body() -> Tensors:
            held.clear()
            held.update(self.run(name, Beginning(most)))
            return {"done": self.step.parameters.values[0]}

        graphs = self.graphs(self.step.parameters.state, self.context.device)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            graphs.prepare(name, body, self.step.generators)()
        replayed = {key: value.clone() for key, value in held.items()}
        self.put_back(before)
        if error := refusal(warned):
            return error
        return ", ".join(differing(launched, replayed))
