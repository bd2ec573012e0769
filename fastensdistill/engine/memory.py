"""What a fused step keeps in memory, before it is run and without a GPU: launches, buffers, peak.

    python -m fastensdistill.engine.memory wrn28_4 --teachers 4 --branches 4 --batch 128 1024 [--launches]

The step runs on PyTorch's meta device, where nothing is computed or stored, and every storage is counted from when it
is made until it is freed: buffers, and the partial sums that the kernels' tiles ask for. Beside that peak stands what
the step keeps for the whole run. Not counted: CUDA's context, the training set, gaps of the allocator (a few per cent).
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastensdistill.engine.common import precision_on
from fastensdistill.engine.fused import FusedStep
from fastensdistill.engine.meta import AsOnGPU, meta_step
from fastensdistill.engine.module_pass import ModuleWeights
from fastensdistill.engine.parallel import alone
from fastensdistill.engine.part_run import Buffers
from fastensdistill.engine.seeds import SeedsStep
from fastensdistill.engine.teach import FusedTeachStep
from fastensdistill.errors import InputError
from fastensdistill.kernels.tiles import assume_arch, device_arch
from fastensdistill.method.copying import copy_network
from fastensdistill.network.launch import Launch, Part

AnyFused = FusedStep | FusedTeachStep | SeedsStep
JOINT = "distillation, forward"  # of what trains, and of the teachers that run with it
ARCH = 90  # compute capability whose tiles count, where there is no GPU


@dataclass
class PassMemory:
    """One pass over networks: its launches, all of its buffers together, and the most that lives at once, in bytes."""

    name: str
    launches: int = 0
    buffers: int = 0
    total: int = 0
    peak: int = 0
    at: str = ""
    rows: list[tuple[str, str, int]] = field(default_factory=list)  # op, layer, live bytes

    def note(self, op: str, layer: str, live: int) -> None:
        if live > self.peak:
            self.peak, self.at = live, f"{op} {layer}".rstrip()


@dataclass
class Estimate:
    """Bytes that stay for the whole run, by what they are, and the passes of a step.

    ``uncounted`` says of which modules only the logits count: they do not run on the meta device, and why. ``parts``
    are all that is planned.
    """

    fixed: dict[str, int]
    passes: list[PassMemory]
    uncounted: list[str] = field(default_factory=list)
    parts: tuple[Part, ...] = ()

    @property
    def peak(self) -> int:
        return sum(self.fixed.values()) + max(one.peak for one in self.passes)


class Storages:
    """Counts the bytes of storages that it is shown and that are alive; ``peak`` is their most since ``take_peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def count(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def take_peak(self) -> int:
        peak, self.peak = max(self.peak, self.live), 0
        return peak


class Live(Storages, AsOnGPU):
    """Those that are made within, on the meta device."""

    def on_pytorch(self, op: Any, result: Any) -> None:
        if not op.is_view and not op._schema.is_mutable:  # whose results are in memory that was there
            self.count(result)

    def on_extension(self, name: str, result: Any) -> None:
        self.count(result)


class LiveHere(Storages, TorchDispatchMode):
    """Those that are made within, on whatever device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            self.count(result)
        return result


def on_meta(step: AnyFused) -> AnyFused:
    """A twin of ``step`` on the meta device, not built. Raises InputError for a step that knows no image's shape."""
    config: Any = replace(step.config, precision=precision_on(step.config, step.device))
    if isinstance(step, FusedTeachStep):
        networks = [copy_network(network, meta=True) for network in step.networks]
        return FusedTeachStep(networks, config, image_shape=step.image_shape, implementations=step.implementations)
    if isinstance(step, SeedsStep):
        students = [copy_network(student, meta=True) for student in step.students]
        return SeedsStep(
            students, copy_network(step.teachers, meta=True), config, step.numbers, image_shape=step.image_shape,
            implementations=step.implementations, networks=step.networks,
        )  # fmt: skip
    step.check_traced()
    twin = FusedStep(
        copy_network(step.student, meta=True), copy_network(step.teachers, meta=True), config,
        implementations=step.implementations,
    )  # fmt: skip
    twin.train_as(step.networks)
    return twin


def estimate(step: AnyFused, batch: int) -> Estimate:
    """Memory of ``step``, wherever it is, on ``batch`` images of this process; it is left as it is."""
    found: dict[str, PassMemory] = {}
    seen: set[tuple[int, str]] = set()  # launches, buffers of a part: micro-batches come again

    def watch(launch: Launch, buffers: Buffers) -> None:
        name, part = places[id(launch)]
        one, most = found.setdefault(name, PassMemory(name)), live.take_peak()
        one.note(launch.op, launch.node, most)
        if (id(launch), "") not in seen and id(launch) not in other_sides:
            one.launches += 1
            one.rows.append((launch.op, launch.node, most))
        for written in launch.writes:
            if written in buffers and (part, written) not in seen:
                one.buffers += 1
                one.total += sum(tensor.nbytes for tensor in tree_leaves(buffers[written]) if tensor is not None)
                seen.add((part, written))
        seen.add((id(launch), ""))

    with alone(), torch.no_grad(), assume_arch(device_arch(step.rate) or ARCH):
        twin = on_meta(step)
        twin.build((batch, *step.image_shape))
        joint = twin.joint
        places = {
            id(launch): (JOINT if joint and one in (joint.evaluation, joint.training) and i == 0 else name, id(part))
            for one, names in twin.passes()
            for i, (name, part) in enumerate(zip(names, one.parts, strict=False))  # some have no backward part
            for launch in part.launches
        }
        # A joint launch counts once: as its training side
        other_sides = {id(turn.evaluation) for turn in joint.turns if turn.joint} if joint else set()
        twin.execution.watch = watch
        with Live() as live:
            for _ in twin.variants():
                twin.body()
    last = PassMemory("un-fold and update", launches=1)
    last.note("un-fold", "", live.take_peak())
    parts = tuple(part for one, _ in twin.passes() for part in one.parts)
    return Estimate(stays(twin), [*found.values(), last], uncounted(twin), parts)


def uncounted(step: AnyFused) -> list[str]:
    """What modules of ``step``, which has run on the meta device, have raised there."""
    weights = step.targets.weights.values() if isinstance(step, FusedStep) else ()
    return [one.uncounted for one in weights if isinstance(one, ModuleWeights) and one.uncounted]


def stays(step: AnyFused) -> dict[str, int]:
    """Bytes that ``step`` keeps for the whole run, by what they are; every storage counts where it is found first."""
    seen: set[int] = set()
    owners = {
        "teachers: as modules": getattr(step, "teachers", None),
        "weights, moments, gradients": [step.parameters, step.rule],
        "gradients as the kernels leave them": step.trained.layer_gradients,
        "packed for training": step.trained,
        "packed for evaluation": [getattr(step, name, None) for name in ("perturbers", "targets")],
        "images, labels, what is drawn": step,
    }
    return {what: sum(storages(owner, seen)) for what, owner in owners.items()}


def storages(owner: Any, seen: set[int]) -> Iterator[int]:
    """The sizes of the storages that ``owner`` refers to and that are not ``seen``."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, Tensor):
        storage = owner.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            yield storage.nbytes()
    members = owner.values() if isinstance(owner, dict) else owner if isinstance(owner, list | tuple) else ()
    for member in (*members, *getattr(owner, "__dict__", {}).values()):
        yield from storages(member, seen)


def report(title: str, found: Estimate, launches: bool = False) -> list[str]:
    """The estimate as lines of text."""
    lines = [title]
    for what, size in found.fixed.items():
        lines += [f"  {what:42} {size / 2**20:9.1f} MiB"] if size else []
    lines.append(f"  {'pass':30} {'launches':>8} {'buffers':>8} {'all, MiB':>9} {'at once':>9}  at")
    for p in found.passes:
        one = f"  {p.name:30} {p.launches:8} {p.buffers:8} {p.total / 2**20:9.1f} {p.peak / 2**20:9.1f}  {p.at}"
        lines.append(one)
        lines += [f"    {op:22} {layer:30} {live / 2**20:9.1f} MiB live" for op, layer, live in p.rows if launches]
    lines += [f"  not counted but for its logits: {why}" for why in found.uncounted]
    stay, most = sum(found.fixed.values()), max(p.peak for p in found.passes)
    count = sum(p.launches for p in found.passes)
    lines.append(f"  {count} launches; {stay / 2**20:.0f} MiB stay + {most / 2**20:.0f} MiB at most = "
                 f"peak {found.peak / 2**30:.2f} GiB")  # fmt: skip
    return lines


def print_memory(
    model: str, teachers: int = 4, branches: int = 4, batches: Sequence[int] = (128,), size: int | None = None,
    perturbation: str = "tdiv-sdiv", launches: bool = False, micro_batches: int = 1,
) -> None:  # fmt: skip
    """Print the estimate for ``model`` as teacher and student, 100 classes, bf16, one per batch size.

    ``size`` of the square images defaults to 32, for torchvision's networks to 224. Raises InputError for an unknown
    model or perturbation, and for a network that cannot be planned.
    """
    for batch in batches:
        if batch < 1 or micro_batches < 1 or batch % micro_batches:
            raise InputError(f"batch={batch} in {micro_batches} parts: expected at least 1 image, and equal parts")
    settings: dict[str, Any] = {
        "perturbation": perturbation,
        "micro_batches": micro_batches,
        "batch_size": micro_batches,
    }
    step = meta_step(model, teachers, branches, size, **settings)
    for batch in batches:
        size_of_batch = f"batch {batch}" + (f" in {micro_batches} parts" if micro_batches > 1 else "")
        title = f"{model}, {teachers} teachers, {branches} branches, {size_of_batch}, {perturbation}, bf16"
        print("\n".join(report(title, estimate(step, batch), launches)))


def main(argv: list[str] | None = None) -> None:
    """The command line of this module: a table of estimates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--teachers", type=int, default=4)
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--size", type=int, help="height and width of the images")
    parser.add_argument("--perturbation", default="tdiv-sdiv")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--launches", action="store_true", help="also every launch with what is live at it")
    a = parser.parse_args(argv)
    print_memory(a.model, a.teachers, a.branches, a.batch, a.size, a.perturbation, a.launches, a.micro_batches)


if __name__ == "__main__":
    main()
