"""Every distinct launch of a step's plan, ready to be run alone: its op, its weights, and what it reads.

A pass is run once as the engine runs it; each launch of it then finds its inputs in the buffers. FLOPs and bytes are
the launch's own, from the plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.setting import METHODS, Setting
from fastensdistill.engine.dispatch import OPS
from fastensdistill.engine.packed import PackedWeights
from fastensdistill.engine.part_run import Execution, Implement, PartRun, kernels_themselves
from fastensdistill.engine.passes import run_part
from fastensdistill.kernels.launch import references_only
from fastensdistill.kernels.vendor_conv import VENDOR
from fastensdistill.network.launch import INPUT, Launch, Part, grad, is_sums
from fastensdistill.network.plan import Plan, plan_step
from fastensdistill.network.trace import trace


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors inside of tuples, lists and dicts, in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(v, dtype) for v in value))
    if isinstance(value, dict):
        return {k: cast(v, dtype) for k, v in value.items()}
    return [cast(v, dtype) for v in value] if isinstance(value, list | tuple) else value


class Exact(dict):
    """Buffers that are handed out in ``dtype``: a whole pass's activations in it would not fit beside the pass."""

    def __init__(self, buffers: dict[str, Any], dtype: torch.dtype | None = None):
        super().__init__(buffers)
        self.dtype: torch.dtype = dtype or (buffers.dtype if isinstance(buffers, Exact) else torch.float64)

    def __getitem__(self, name: str) -> Any:
        return cast(super().__getitem__(name), self.dtype)


@dataclass
class Prepared:
    """One launch of ``part`` with everything it needs; ``where`` names its pass."""

    where: str
    launch: Launch
    part: Part
    weights: PackedWeights
    weight_index: Tensor
    buffers: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.launch.op} {self.launch.node}"

    def run(self, implement: Implement = kernels_themselves) -> dict[str, Any]:
        """What the launch writes, under the plan's names."""
        buffers = type(self.buffers)(self.buffers)
        one = replace(self.part, launches=[self.launch])
        run_part(PartRun(one, self.weights, self.weight_index, buffers, Execution(implement=implement)))
        return {name: value for name, value in buffers.items() if value is not self.buffers.get(name)}

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The convolution that the launch calls: op, arguments, keyword arguments."""
        found: list[Any] = []

        def spy(part: Part, launch: Launch, op: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                found.append((op, args, kwargs))
                return op(*args, **kwargs)

            return record

        self.run(spy)
        return found[0]

    def exact(self, dtype: torch.dtype = torch.float64) -> Prepared:
        """The same in float64: the same rounded inputs, computed without rounding by the references."""
        count = len(next(iter(self.weights.layers.values())).forward)
        weights = PackedWeights(self.weights.part, count, dtype, self.weight_index.device)
        for name, layer in self.weights.layers.items():
            for key in ("forward", "gradient", "bias"):
                if getattr(layer, key) is not None:
                    getattr(weights.layers[name], key).copy_(getattr(layer, key))
        for name, rows in self.weights.scale_shift.items():
            for mine, theirs in zip(weights.scale_shift[name], rows, strict=True):
                mine.copy_(theirs)
        for name, norm in self.weights.norms.items():
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(weights.norms[name], key).copy_(getattr(norm, key))
        return replace(self, weights=weights, buffers=Exact(self.buffers, dtype))


def plans(setting: Setting) -> dict[str, Plan]:
    network = trace(setting.build(), (3, setting.size, setting.size))
    perturbation = METHODS[setting.method][1]
    assert perturbation is not None
    return plan_step(network, network, setting.members, setting.k, setting.batch, perturbation)


def key(launch: Launch, part: Part) -> tuple[Any, ...]:
    """Equal for launches that do the same work: op, shapes and what is fused, but for the names."""
    node = part.network.by_name[launch.node]
    geometry = (node.shape, getattr(node, "in_shape", None), getattr(node, "kernel", 0), getattr(node, "stride", 0))
    steps = tuple((s.kind, s.stride) for s in (*launch.prologue, *launch.epilogue))
    return launch.op, len(part.groups), part.training, bool(launch.folded), geometry, steps, launch.nbytes


@torch.no_grad()
def prepare(
    setting: Setting, device: torch.device, dtype: torch.dtype, by_references: bool = False
) -> Iterator[tuple[Prepared, int]]:
    """The distinct launches of a step, each with how often a step has it. Buffers live until the next pass.

    ``by_references``: what the launches read is made by the ops' references, so that a wrong kernel spoils its own
    launch alone.
    """
    torch.manual_seed(0)
    with device:
        states = [setting.build().state_dict() for _ in range(max(4, setting.members, setting.k))]
    for state in states:
        for name, value in state.items():
            if name.endswith(("running_var", "bn.weight")):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
    every = plans(setting)
    counts: dict[tuple[Any, ...], int] = {}
    for plan in every.values():
        for part in plan.parts:
            for launch in part.launches:
                counts[key(launch, part)] = counts.get(key(launch, part), 0) + 1
    left: dict[bool, tuple[PackedWeights, dict[str, Any]]] = {}
    seen: set[tuple[Any, ...]] = set()
    images = torch.rand(1, setting.batch, setting.size, setting.size, 3, device=device)
    # what trains comes first: most of a step's time, and what is left over where the time for measuring it runs out
    for where, plan in sorted(every.items(), key=lambda item: item[0].startswith("perturbation")):
        for part in plan.parts:
            G = len(part.groups)
            weight_index = torch.arange(G, dtype=torch.int32, device=device)
            if part.launches[0].op == "conv":
                weights = PackedWeights(part, G, dtype, device)
                for slot in range(G):
                    weights.write(slot, {name: v.to(device) for name, v in states[slot].items()})
                buffers: dict[str, Any] = {INPUT: images.to(torch.float64 if dtype == torch.float64 else torch.float32)}
                left[part.training] = weights, buffers
            else:
                weights, buffers = left.pop(part.training)
                logits = buffers[part.network.output][:G]
                buffers[grad(part.network.output)] = torch.randn_like(logits) / setting.batch
            with references_only() if by_references else contextlib.nullcontext():
                run_part(PartRun(part, weights, weight_index, buffers))
            for launch in part.launches:
                if key(launch, part) not in seen:
                    seen.add(key(launch, part))
                    yield Prepared(where, launch, part, weights, weight_index, buffers), counts[key(launch, part)]


# FLOPs of a convolution from which "exact" is float32 without tf32: a thousandth of bf16's error. In float64 cuDNN has
# no kernels to speak of, and those of a batch of 512 would take most of a minute.
LARGE = 1e10


@dataclass
class Expected:
    """What a launch should write: exactly, and by PyTorch's convolution where it is one, in the launch's dtype."""

    exact: dict[str, Tensor]
    peer: dict[str, Tensor]


def by_vendor(part: Part, launch: Launch, op: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's convolution in the place of a kernel."""
    return VENDOR[op]


def expected(prepared: Prepared) -> Expected:
    peer = written(prepared, by_vendor) if prepared.launch.op in OPS else {}
    return Expected(exactly(prepared, prepared.weight_index.device.type == "cuda"), peer)


def exactly(prepared: Prepared, on_gpu: bool) -> dict[str, Tensor]:
    """In float64 by the references. On a GPU convolutions go group by group, as cuDNN's kernels for groups are slow
    ones in wide types, and large ones in float32 (``LARGE``)."""
    convolution = on_gpu and prepared.launch.op in OPS
    narrow = convolution and prepared.launch.flops >= LARGE
    # without a search, which would take seconds a shape in such types
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return written(prepared.exact(torch.float32 if narrow else torch.float64), by_vendor if convolution else None)


def compare(prepared: Prepared, right: Expected | None = None) -> Iterator[tuple[str, float, float]]:
    """(name, error, allowed) of everything that the launch writes: root-mean-square errors against ``right``, relative.

    Allowed is twice the error of PyTorch in the same precision: of its own convolution with the rest as separate
    operations, elsewhere of the exact result rounded. Sums of rounded values, in float32, may err by half a percent.
    """
    right = right or expected(prepared)
    yield from errors(written(prepared), right, prepared.weights.dtype)


def errors(actual: dict[str, Tensor], right: Expected, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """As ``compare``, of what a launch with weights of ``dtype`` has written."""
    for name, value in actual.items():
        e = right.exact[name].double()
        own = distance(right.exact[name].to(value.dtype), e)
        if name in right.peer:
            own = max(own, distance(right.peer[name], e))
        least = 1e-6 if value.dtype == dtype else 5e-3
        yield name, distance(value, e), max(2 * own if own < float("inf") else 0.0, least)


def distance(value: Tensor, exact: Tensor) -> float:
    """Root-mean-square difference relative to ``exact``; inf where anything is not finite."""
    found = float((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    return found if found == found else float("inf")


def written(prepared: Prepared, implement: Implement | None = None) -> dict[str, Tensor]:
    """What the launch writes, floating tensors by name, and the running estimates it moves, which are put back.

    Rows of partial sums are added up: how many there are is the implementation's own affair.
    """
    norm = prepared.weights.norms.get(prepared.launch.node) if prepared.launch.op == "norm statistics" else None
    before = [] if norm is None else [norm.running_mean.clone(), norm.running_var.clone()]
    try:
        found = named(prepared.run(implement) if implement else prepared.run())
        if norm is not None:
            found |= {f"{prepared.launch.node}.running_mean": norm.running_mean.clone()}
            found |= {f"{prepared.launch.node}.running_var": norm.running_var.clone()}
    finally:
        if norm is not None:
            norm.running_mean.copy_(before[0])
            norm.running_var.copy_(before[1])
    return {name: value.sum(1) if is_sums(name) else value for name, value in found.items()}


def named(written: Any, name: str = "") -> dict[str, Tensor]:
    """The floating tensors of what a launch wrote, by name."""
    if isinstance(written, Tensor):
        return {name: written} if written.is_floating_point() else {}
    if isinstance(written, dict):
        items = list(written.items())
    elif hasattr(written, "_fields"):
        items = [(f"{name}.{field}", value) for field, value in zip(written._fields, written, strict=True)]
    else:
        items = [(f"{name}.{i}", value) for i, value in enumerate(written or ())]
    return {k: v for key, value in items for k, v in named(value, key).items()}
