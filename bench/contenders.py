"""Who is measured, and the gate: the engines and their peers, each compared with float64 before it is timed.

Adding a peer: a class taking a ``Problem`` with ``__call__(batch)`` and ``state()``, and one line in ``CONTENDERS``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.common import without_search
from bench.peers.captured import AUTOTUNED, CAPTURED, OWN_GRAPHS, CapturedStep, CapturedTeach, CompiledStep
from bench.peers.eager import EagerStep, EagerTeach, statistics
from bench.peers.grouped import GroupedStep, GroupedTeach
from bench.peers.torch_uncertainty import LibraryStep
from bench.peers.vmapped import VmapStep
from bench.setting import (
    CLASSES,
    DISTIL,
    Batch,
    Distillation,
    Problem,
    Setting,
    Teaching,
    batches,
    contiguous,
    drawn_pairs,
    make,
)
from fastensdistill.engine import proof
from fastensdistill.engine.captured import CapturedReferenceStep, CapturedTeachStep
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.reference import ReferenceStep, TeachStep
from fastensdistill.engine.teach import FusedTeachStep

ALL = (*DISTIL, "teach")


class Step(Protocol):
    def __call__(self, batch: Batch) -> object: ...
    def state(self) -> dict[str, list[Tensor]]: ...


class Engine:
    """One of the project's own steps; it draws its pairs itself, as it does in training."""

    def __init__(self, step: Any, problem: Problem):
        self.step, self.problem = step, problem

    def __call__(self, batch: Batch) -> object:
        if isinstance(self.problem, Teaching):
            return self.step([*zip(batch.images, batch.labels, strict=True)])
        return self.step(batch.images, batch.labels)

    def state(self) -> dict[str, list[Tensor]]:
        """What a step changes, by kind, in the networks' order."""
        problem = self.problem
        networks = [problem.student.module] if isinstance(problem, Distillation) else problem.modules
        changed: dict[str, list[Tensor]] = {"shared": [], "factors": [], "statistics": []}
        for network in networks:
            for name, p in network.named_parameters():
                changed["factors" if ".delta_" in name else "shared"].append(p)
            changed["statistics"] += statistics(network)
        return changed


def reference_engine(problem: Problem, capture: bool = False) -> Step:
    step: Any
    if isinstance(problem, Teaching):
        step = (CapturedTeachStep if capture else TeachStep)(problem.networks, problem.config)
    else:
        assert isinstance(problem, Distillation)
        kind = CapturedReferenceStep if capture else ReferenceStep
        step = kind(problem.student, problem.teachers, problem.config, num_classes=CLASSES)
    return Engine(step, problem)


tuned: Dispatch | None = None  # of ``bench.throughput --dispatch``
diagnosed: Dispatch | None = None  # what a diagnosis found to be right where the fused engine's kernels were not


def fused_engine(problem: Problem, implementations: Dispatch | None = None, capture: bool = True) -> Engine:
    for module in problem.modules:
        contiguous(module)
    options: dict[str, Any] = {
        "image_shape": problem.image_shape, "implementations": implementations or diagnosed, "capture": capture,
    }  # fmt: skip
    step: Any
    if isinstance(problem, Teaching):
        step = FusedTeachStep(problem.networks, problem.config, **options)
    else:
        assert isinstance(problem, Distillation)
        step = FusedStep(problem.student, problem.teachers, problem.config, **options)
    return Engine(step, problem)


def how(step: Any) -> dict[str, Any]:
    """How a step that has run is executed: ``captured``, and the same in words with the reason where it is not."""
    inner = getattr(step, "step", step)
    replay = getattr(inner, "run", None)
    captured = inner.captured if hasattr(inner, "captured") else getattr(replay, "graph", None) is not None
    reason = getattr(inner, "capture_error", None)
    words = "one CUDA graph" if captured else "launched from Python" + (f" ({reason})" if reason else "")
    return {"captured": bool(captured), "how": words}


def jax_step(problem: Problem) -> Step:
    from bench.peers.jax_step import JaxStep

    return JaxStep(problem)


@dataclass(frozen=True)
class Contender:
    """``needs`` is a module that must be installed; ``precision`` is asked for on a GPU, on a CPU all use float32.

    ``slack`` times the allowed error in bf16: a compiler of its own may round in more places than PyTorch. ``apart``:
    it may run out of time or memory, so it is built when everybody else has been timed, and timed beside ours alone.
    """

    name: str
    title: str
    build: Callable[[Problem], Step]
    methods: tuple[str, ...] = ALL
    devices: tuple[str, ...] = ("cpu", "cuda")
    precision: str = "bf16"
    needs: str = ""
    slack: float = 1.0
    apart: bool = False

    def absent(self, method: str, device: str) -> str | None:
        """Why it cannot take part."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.name == "tuned" and tuned is None:
            return "needs --dispatch FILE"
        if method not in self.methods:
            return "does not have this method"
        if self.name == "fused-triton" and proof.trouble(torch.device(device)) is not None and device == "cuda":
            return "the fused engine's own are Triton's here"
        return None if device in self.devices else f"not on {device}"


def _teach(step: Callable[..., Step], teach: Callable[..., Step], *rest: Any) -> Callable[[Problem], Step]:
    return lambda problem: (teach if isinstance(problem, Teaching) else step)(problem, *rest)


# In the order in which they are built: where time runs out, the last are left out.
CONTENDERS = {
    c.name: c
    for c in (
        Contender("fused", "fused engine", fused_engine, devices=("cuda",)),
        Contender("fused-triton", "fused engine, Triton's convolutions",
                  lambda p: fused_engine(p, Dispatch(diagnosed.table if diagnosed else ())), devices=("cuda",)),
        Contender("tuned", "fused engine, other table", lambda p: fused_engine(p, tuned), devices=("cuda",)),
        Contender("fused-launched", "fused engine, launched from Python",
                  lambda p: fused_engine(p, capture=False), devices=("cuda",)),
        Contender("reference", "reference engine", reference_engine),
        Contender("reference-captured", "reference engine, captured", lambda p: reference_engine(p, capture=True),
                  devices=("cuda",)),
        Contender("eager", "least work, eager", _teach(EagerStep, EagerTeach)),
        Contender("captured", "least work, eager, one CUDA graph", _teach(CapturedStep, CapturedTeach),
                  devices=("cuda",)),
        Contender("compiled", "torch.compile, one CUDA graph", _teach(CapturedStep, CapturedTeach, CAPTURED),
                  devices=("cuda",), apart=True),
        Contender("max-autotune", "torch.compile with its search, one CUDA graph",
                  _teach(CapturedStep, CapturedTeach, AUTOTUNED), devices=("cuda",), apart=True),
        Contender("as-written", "as the authors run it, eager", lambda p: EagerStep(p, as_written=True),
                  methods=DISTIL, precision="tf32"),
        Contender("vmap", "teachers by vmap", VmapStep, methods=DISTIL),
        Contender("grouped", "convolutions with groups=", _teach(GroupedStep, GroupedTeach)),
        Contender("compiled-own", "torch.compile with its own graphs", lambda p: CompiledStep(p, OWN_GRAPHS),
                  methods=DISTIL, devices=("cuda",), apart=True),
        Contender("torch-uncertainty", "layers of torch-uncertainty", LibraryStep, methods=("latentbe", "tdiv-sdiv"),
                  needs="torch_uncertainty"),
        Contender("jax", "JAX under jit", jax_step, methods=DISTIL, needs="jax", slack=2.0, apart=True),
    )
}  # fmt: skip

# Against float64 in float64 and float32; in bf16 and tf32 the bound is measured, see ``Gate``.
BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-3}
# FLOPs of a step from which "exact" is float32 without tf32: a thousandth of bf16's error, and it fits and is quick
LARGE = 1e12
GATE_STEPS = 2  # the second is a captured graph's replay, with another pair


def changes(step: Step, given: list[Batch]) -> dict[str, Tensor]:
    """What the steps over ``given`` change, by kind, flat."""
    before = {kind: [t.detach().clone() for t in tensors] for kind, tensors in step.state().items()}
    for batch in given:
        step(batch)
    return {
        kind: torch.cat(
            [(t.detach() - b.to(t.device)).double().flatten().cpu() for t, b in zip(tensors, before[kind], strict=True)]
        )
        for kind, tensors in step.state().items()
        if tensors
    }


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Root-mean-square difference relative to the exact change, by kind; inf where anything is not finite."""
    if actual.keys() != exact.keys():
        raise ValueError(f"state of {sorted(actual)}, expected {sorted(exact)}")
    found = {kind: float((actual[kind] - e).norm() / e.norm().clamp_min(1e-30)) for kind, e in exact.items()}
    return {kind: error if error == error else float("inf") for kind, error in found.items()}


class Gate:
    """Lets through who computes the step: two steps against the reference engine's in float64.

    On a GPU in the setting that is timed (above ``LARGE`` against float32) and in the precision that is timed: every
    kind of change may err at most twice as much as PyTorch's own bf16 (the worse of the eager peer and the reference
    engine). On a CPU, where float32 is timed, in float64 on a tiny network. ``at_size`` overrides which of the two.
    """

    @without_search()  # of steps that are run twice and thrown away
    def __init__(self, setting: Setting, device: torch.device, at_size: bool | None = None):
        self.device, self.at_size = device, device.type == "cuda" if at_size is None else at_size
        if not self.at_size:
            small = "tiny-resnet" if "resnet32" in setting.network or "tiny-resnet" in setting.network else "tiny"
            setting = Setting(small, setting.method, 3, 2)
        self.setting, self.dtype = setting, torch.float32 if self.at_size else torch.float64
        self.problem = make(setting, device)
        pairs = drawn_pairs(setting, self.problem.config.seed, GATE_STEPS)
        self.batches = batches(setting, GATE_STEPS, device, pairs, torch.float64)
        self.exact = self._exact()
        self.bounds = dict.fromkeys(self.exact, BOUNDS[torch.float64])
        if self.at_size:
            # two ways to write it, which round r and s at different places: one alone may be lucky
            own = [self._errors_in_bf16(CONTENDERS[name]) for name in ("eager", "reference")]
            self.bounds = {kind: 2 * max(found[kind] for found in own) for kind in self.exact}
        self._free()

    def _errors_in_bf16(self, contender: Contender) -> dict[str, float]:
        step = contender.build(self.problem.copy(torch.float32, "bf16"))
        return errors(self._changes(step, torch.float32), self.exact)

    def _exact(self) -> dict[str, Tensor]:
        if self.setting.flops < LARGE:
            return self._changes(reference_engine(self.problem.copy(torch.float64, "fp32")), torch.float64)
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        try:
            return self._changes(reference_engine(self.problem.copy(torch.float32, "fp32")), torch.float32)
        finally:
            torch.backends.cudnn.allow_tf32 = before[0]
            torch.set_float32_matmul_precision(before[1])

    def _changes(self, step: Step, dtype: torch.dtype) -> dict[str, Tensor]:
        return changes(step, [self._cast(batch, dtype) for batch in self.batches])

    @staticmethod
    def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
        images = [x.to(dtype) for x in batch.images] if isinstance(batch.images, list) else batch.images.to(dtype)
        return Batch(images, batch.labels, batch.pair)

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check(self, contender: Contender, step: Step | None = None) -> tuple[bool, dict[str, float]]:
        """Whether it may be timed, and its errors. ``step`` is one built in the timed setting, on a GPU; a CPU's is
        built here."""
        if step is None:
            step = contender.build(self.problem.copy(self.dtype, contender.precision if self.at_size else "fp32"))
        found = errors(self._changes(step, self.dtype), self.exact)
        slack = contender.slack if self.at_size else 1.0
        return all(error <= slack * self.bounds[kind] for kind, error in found.items()), found
