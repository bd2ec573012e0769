"""What a fused step keeps in memory, before it is run and without a GPU: launches, buffers, peak.

    python -m fastensdistill.engine.memory wrn28_4 --teachers 4 --branches 4 --batch 128 1024 [--launches]

The plan says which launch writes and reads which buffer; the engine frees a buffer after its last reader, so the peak
is the largest sum of live buffers over the launches, beside what stays for the whole run. Counted too: partial sums of
BatchNorm and of weight gradients, by the kernels' own tiles. Not counted: CUDA's context, the training set, gaps of the
allocator (a few per cent).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from fastensdistill.engine.passes import dead_after
from fastensdistill.errors import InputError
from fastensdistill.kernels.tiles import conv_tile, weight_gradient_split
from fastensdistill.method.perturbation import PERTURBATIONS
from fastensdistill.models import create_model, image_size
from fastensdistill.network.launch import INPUT, Launch, Part, grad, is_running, is_sums, owner
from fastensdistill.network.nodes import Layer, Network
from fastensdistill.network.plan import Plan, plan, plan_step, teach_groups
from fastensdistill.network.trace import trace

Dead = Sequence[tuple[str, ...]]
FLOAT = 4


@dataclass
class Pass:
    """One pass over the networks: its launches, all of its buffers together, and the most that live at once."""

    name: str
    launches: int = 0
    buffers: int = 0
    total: float = 0.0
    peak: float = 0.0
    at: str = ""
    rows: list[tuple[str, str, float]] = field(default_factory=list)  # op, layer, live bytes


@dataclass
class Estimate:
    """Bytes that stay for the whole run, by what they are, and the passes of a step."""

    fixed: dict[str, float]
    passes: list[Pass]

    @property
    def peak(self) -> float:
        return sum(self.fixed.values()) + max(p.peak for p in self.passes)


class Timeline:
    """Adds up live buffers, launch by launch."""

    def __init__(self, itemsize: int, arch: int):
        self.itemsize, self.arch = itemsize, arch
        self.live: dict[tuple[str, str], float] = {}
        self.passes: list[Pass] = []

    def run(self, name: str, part: Part, dead: Dead, space: str, taken: frozenset[str] = frozenset()) -> None:
        """The launches of ``part``; ``space`` keeps its names apart; ``taken`` are written into memory that stays."""
        current = Pass(name)
        self.passes.append(current)
        for launch, names in zip(part.launches, dead, strict=True):
            for written in launch.writes:
                if is_running(written) or written in taken or (space, written) in self.live:
                    continue  # running statistics are FlatParameters'
                size = self.size(part, written)
                self.live[space, written] = size
                current.buffers += 1
                current.total += size
            self.note(current, launch.op, launch.node, self.scratch(part, launch))
            for gone in names:
                self.live.pop((space, gone), None)
        current.launches = len(part.launches)

    def note(self, current: Pass, op: str, layer: str, scratch: float) -> None:
        bytes_now = sum(self.live.values()) + scratch
        current.rows.append((op, layer, bytes_now))
        if bytes_now > current.peak:
            current.peak, current.at = bytes_now, f"{op} {layer}"

    def size(self, part: Part, name: str) -> float:
        buffer = part.buffers[name]
        if is_sums(name):  # a row of partial sums per program
            node = part.network.by_name[owner(name)]
            C, H, W = node.shape
            return buffer.nbytes * -(-part.batch * H * W // conv_tile(self.arch, C, C, self.itemsize).BLOCK_M)
        return buffer.nbytes * (self.itemsize / 2 if buffer.bits == 16 else 1)

    def scratch(self, part: Part, launch: Launch) -> float:
        """What a weight gradient needs beside its result: the partial sums of its programs."""
        node = part.network.by_name[launch.node]
        if launch.op != "weight gradient" or not isinstance(node, Layer):
            return 0.0
        Co, H, W = node.shape
        taps, Ci, G = node.taps, node.in_channels, len(part.groups)
        splits = weight_gradient_split(self.arch, G, part.batch * H * W, taps, Ci, Co, self.itemsize).splits
        return FLOAT * G * taps * Ci * Co * splits if splits > 1 else 0.0


def weight_count(network: Network) -> tuple[int, int, int]:
    """Values in the layers' weights, in everything that is trained, and in BatchNorm's scales."""
    weights = sum(prod(layer.weight_shape) for layer in network.layers)
    biases = sum(layer.shape[0] for layer in network.layers if layer.bias)
    norms = sum(norm.shape[0] for norm in network.norms)
    return weights, weights + biases + 2 * norms, norms


def estimate(
    teacher: Network,
    student: Network,
    teachers: int,
    branches: int,
    batch: int,
    perturbation: str = "tdiv-sdiv",
    itemsize: int = 2,
    arch: int = 90,
    parts: int = 1,
) -> Estimate:
    """Memory of a LatentBE step on images of the size the networks were traced with.

    ``itemsize`` is that of activations and packed weights, 2 bytes for bf16; ``arch`` the compute capability whose
    tiles count; ``parts`` the micro-batches. With ``branches`` = 1 the student is a plain network, without factors.
    """
    plans = plan_step(teacher, student, teachers, branches, batch // parts, perturbation)
    own, trained, norms = weight_count(student)
    frozen, whole, _ = weight_count(teacher)
    C, H, W = student.nodes[0].shape
    images = FLOAT * batch * C * H * W
    factors = sum(layer.shape[0] + layer.in_shape[0] for layer in student.layers)
    ranked = branches > 1
    perturbed = branches if PERTURBATIONS[perturbation].evaluates("S") else 0
    fixed = {
        "student: weights, momentum, gradients": FLOAT * 3.0 * trained + FLOAT * 2.0 * norms,
        "student: gradients of the branches": FLOAT * branches * own,
        "student: factors and their momentum": FLOAT * 2.0 * branches * factors if ranked else 0.0,
        "student: packed for training": 2.0 * itemsize * branches * own,
        "student: packed for evaluation": 2.0 * itemsize * perturbed * own,
        "teachers: packed": 2.0 * itemsize * teachers * frozen,
        "teachers: as modules": FLOAT * teachers * whole,
        "images and perturbed images": 2.0 * images,
    }
    line = Timeline(itemsize, arch)
    perturb(line, plans)
    distil(line, plans, branches * factors * FLOAT if ranked else 0.0)
    return Estimate(fixed, line.passes)


def estimate_teaching(
    network: Network, members: int, batch: int, itemsize: int = 2, arch: int = 90, parts: int = 1
) -> Estimate:
    """Memory of a step that trains ``members`` networks side by side, each on a batch of its own."""
    groups = teach_groups(members)
    plans = {f"distillation, {way}": plan([network], *groups[way], batch // parts) for way in groups}
    own, trained, norms = weight_count(network)
    C, H, W = network.nodes[0].shape
    fixed = {
        "weights, momentum, gradients": FLOAT * members * (3.0 * trained + 2.0 * norms),
        "gradients as the kernels leave them": FLOAT * 1.0 * members * own,
        "packed for training": 2.0 * itemsize * members * own,
        "images": FLOAT * 1.0 * members * batch * C * H * W,
    }
    line = Timeline(itemsize, arch)
    distil(line, plans, 0.0)
    return Estimate(fixed, line.passes)


def perturb(line: Timeline, plans: dict[str, Plan]) -> None:
    """The perturbation's passes: every part forward, then every part backward; only the images survive."""
    if "perturbation, forward" not in plans:
        return
    firsts, seconds = (plans[f"perturbation, {way}"].parts for way in ("forward", "input gradient"))
    dead = []
    for first, second in zip(firsts, seconds, strict=True):
        output = first.network.output
        dead.append(dead_after([first, second], [INPUT, output, grad(output), grad(INPUT)]))
    for i, first in enumerate(firsts):
        line.run("perturbation, forward", first, dead[i][0], f"p{i}")
    for i, second in enumerate(seconds):
        logits = grad(second.network.output)
        line.live[f"p{i}", logits] = line.size(second, logits)
        line.run("perturbation, input gradient", second, dead[i][1], f"p{i}")
    line.live.clear()


def distil(line: Timeline, plans: dict[str, Plan], unfolded: float) -> None:
    """Teachers, branches forward, branches backward, un-fold."""
    (backward,) = plans["distillation, backward"].parts
    for i, part in enumerate(plans["distillation, forward"].parts):
        output = part.network.output
        if part.training:
            sinks = [grad(name) for node in part.network.nodes for name in node.parameters]
            dead = dead_after([part, backward], [INPUT, output, grad(output), *sinks])
            line.run("distillation, branches", part, dead[0], "s")
        else:
            line.run("distillation, teachers", part, dead_after([part], [INPUT, output])[0], f"t{i}")
    logits = grad(backward.network.output)
    line.live["s", logits] = line.size(backward, logits)
    line.run("distillation, backward", backward, dead[1], "s", frozenset(sinks))
    last = Pass("un-fold and update", launches=1, buffers=1, total=unfolded)
    line.live.clear()
    line.note(last, "un-fold", "", unfolded)
    line.passes.append(last)


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
    stays, most = sum(found.fixed.values()), max(p.peak for p in found.passes)
    count = sum(p.launches for p in found.passes)
    lines.append(f"  {count} launches; {stays / 2**20:.0f} MiB stay + {most / 2**20:.0f} MiB at most = "
                 f"peak {found.peak / 2**30:.2f} GiB")  # fmt: skip
    return lines


def print_memory(
    model: str, teachers: int = 4, branches: int = 4, batches: Sequence[int] = (128,), size: int | None = None,
    perturbation: str = "tdiv-sdiv", launches: bool = False, parts: int = 1,
) -> None:  # fmt: skip
    """Print the estimate for ``model`` as teacher and student, 100 classes, bf16, one per batch size.

    ``parts`` are the micro-batches; ``size`` of the square images defaults to 32, for torchvision's networks to 224.
    Raises InputError for an unknown model or perturbation, and for a network that cannot be planned.
    """
    size = size or image_size(model)
    with torch.device("meta"):
        network = trace(create_model(model, 100), (3, size, size))
    for batch in batches:
        if batch < 1 or parts < 1 or batch % parts:
            raise InputError(f"batch={batch} in {parts} parts: expected at least 1 image, and equal parts")
        found = estimate(network, network, teachers, branches, batch, perturbation, parts=parts)
        size_of_batch = f"batch {batch}" + (f" in {parts} parts" if parts > 1 else "")
        title = f"{model}, {teachers} teachers, {branches} branches, {size_of_batch}, {perturbation}, bf16"
        print("\n".join(report(title, found, launches)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--teachers", type=int, default=4)
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--size", type=int, help="height and width of the images")
    parser.add_argument("--perturbation", default="tdiv-sdiv")
    parser.add_argument("--micro-batches", type=int, default=1, dest="parts")
    parser.add_argument("--launches", action="store_true", help="also every launch with what is live at it")
    a = parser.parse_args(argv)
    print_memory(a.model, a.teachers, a.branches, a.batch, a.size, a.perturbation, a.launches, a.parts)


if __name__ == "__main__":
    main()
