"""What a plan's launches do on the device, read off the engine itself, and what each kernel should take: a model.

The ops are run on the meta device with their kernels recorded instead of launched, for sm_90: grids, tiles, splits and
the number of nodes are the engine's own, so that a change of theirs moves the model. Arithmetic and traffic are the
plan's; what the plan leaves out (partial sums, coefficients) is counted by the tensors that are passed. The programs
that fit a multiprocessor are those that the tile states, else those of ``bench/results/kernel_report.json``.

A kernel takes the larger of its product and its traffic through memory. A product takes the largest of its arithmetic,
of what its programs load through L2 and of its steps, and longer where programs do not fill the multiprocessors. The
rates of the arithmetic and of the memory are ``network.gpu``'s; all that is assumed stands below and is no measurement.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import kernel_report
from bench.common import RESULTS
from bench.setting import METHODS, Setting
from fastensdistill.engine.graph_nodes import GraphNodes, count_step
from fastensdistill.engine.packed import PackedWeights
from fastensdistill.engine.part_run import Execution, PartRun, kernels_themselves
from fastensdistill.engine.partials import left_to_unfold
from fastensdistill.engine.passes import run_part
from fastensdistill.kernels import wgmma
from fastensdistill.kernels.launch import KernelLaunch, record_launches
from fastensdistill.kernels.layout import Partials
from fastensdistill.kernels.ops import PORTABLE
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.network import gpu as gpus
from fastensdistill.network.gpu import Gpu
from fastensdistill.network.launch import INPUT, Group, Launch, Part, grad
from fastensdistill.network.nodes import Conv, Layer, Network, Node
from fastensdistill.network.on_load import Abilities, nothing
from fastensdistill.network.plan import plan


class Assumption(NamedTuple):
    """A number that nobody has measured, and why it should be about right."""

    value: float
    unit: str
    source: str


ASSUMED = {
    "held": Assumption(gpus.HELD, "of the memory's rate", "by kernels that do little else"),
    "multiprocessors": Assumption(132, "", "of an H100 and of an H200"),
    # 50 GB into one multiprocessor. A tile of 128 x 64 then multiplies at 281 TFLOP/s at most.
    "L2": Assumption(6.6e12, "bytes a second", "into all; three quarters of 5,120 a cycle at 1.7 GHz, 5.5-7.0 likely"),
    "alone": Assumption(0.75, "of that", "a program that has a multiprocessor to itself waits or stores a quarter"),
    "step": Assumption(0.11e-6, "seconds of a multiprocessor", "a program's: 4 warps of 180 instructions, 4 a cycle"),
    "least": Assumption(gpus.LEAST, "seconds", "a kernel that does next to nothing starts, waits for memory, stores"),
    "gap": Assumption(gpus.GAP, "seconds", "between two nodes of the captured graph, each depending on the one before"),
}  # fmt: skip
HELD, L2, ALONE, STEP, LEAST, GAP = (ASSUMED[name].value for name in ("held", "L2", "alone", "step", "least", "gap"))
MULTIPROCESSORS = int(ASSUMED["multiprocessors"].value)
REDUCTIONS = ("batch_norm_statistics_kernel", "batch_norm_coefficients_kernel")
ADD_ROWS = "add_rows_kernel"  # of a weight gradient's splits, else of BatchNorm's sums
STATISTICS, WEIGHTS = "norm statistics", "weights and update"


@dataclass(frozen=True)
class Kernel:
    """One node of the graph.

    ``op`` is the launch's, but for what the breakdown of a step keeps apart; ``name`` the Triton kernel's, if any.
    ``nbytes`` go through memory; ``l2`` bytes are loaded by all ``programs`` in all their ``steps`` of a product.
    ``rate``, FLOP/s, is that of a kernel which can run in its place, and does where it is faster. ``product`` is the
    seconds that another model gives for a product, and then decides alone.
    """

    op: str
    launch: Launch
    node: Node
    groups: int
    name: str = ""
    programs: int = MULTIPROCESSORS
    occupancy: int = 1
    tile: tuple[int, int] = (0, 0)
    flops: float = 0.0
    nbytes: float = 0.0
    l2: float = 0.0
    steps: float = 0.0
    rate: float = 0.0
    product: float = 0.0

    @property
    def layer(self) -> str:
        if isinstance(self.node, Conv):
            k, (channels, height, _) = self.node.kernel, self.node.in_shape
            return f"{k}x{k} s{self.node.stride} {channels}→{self.node.shape[0]} @{height}"
        return f"{self.node.shape[0]} channels @{self.node.shape[1]}"

    @property
    def width(self) -> int:
        """Channels of a convolution's narrower side, 0 of anything else."""
        return min(self.node.in_shape[0], self.node.shape[0]) if isinstance(self.node, Conv) else 0

    def seconds(self, gpu: Gpu) -> float:
        """Without the gap. The multiprocessor with the most programs decides; those it holds wait independently."""
        most = -(-self.programs // MULTIPROCESSORS)
        busy = self.programs / (MULTIPROCESSORS * most) * (1 - (1 - ALONE) ** min(self.occupancy, most))
        product = max(self.flops / gpu.flops, self.l2 / L2, self.steps * STEP / MULTIPROCESSORS) / busy
        if self.rate:
            product = min(product, self.flops / min(gpu.flops, self.rate))
        if self.product:
            product = max(self.product, self.flops / gpu.flops)
        few = min(1, self.programs / MULTIPROCESSORS)
        return max(product, self.nbytes / min(HELD * gpu.bandwidth, L2 * few), LEAST)


Kernels = tuple[Kernel, ...]  # of one launch, first the one that does what the plan describes


class Others(Protocol):
    """Kernels that are not the ops' own: what they take in, as ``network.plan`` asks, and what they should take."""

    def __hash__(self) -> int: ...

    def __call__(self, part: Part, node: Conv) -> Abilities: ...

    def computes(self, part: Part, launch: Launch) -> bool: ...

    def kernel(self, part: Part, launch: Launch) -> Kernel: ...


class OnMeta(TorchDispatchMode):
    """Within, the project's ops take their launchers on meta tensors too, so that their launches can be recorded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = PORTABLE.get(func.overloadpacket.__name__) if func.namespace == "fastensdistill" else None
        if own is None:
            return func(*args, **(kwargs or {}))
        with self:
            return own(*args, **(kwargs or {}))


@functools.cache
def reported() -> dict[tuple[Any, ...], int]:
    """Kernel, shape and fusions, tile, warps, stages, registers → programs that fit a multiprocessor, compiled for
    sm_90; the fewest of kernels alike.
    """
    found: dict[tuple[Any, ...], int] = {}
    for row in json.loads((RESULTS / "kernel_report.json").read_text())["rows"]:
        if row["arch"] == 90 and "warps" in row:  # of Triton's kernels
            key = row["kernel"], row["launch"], *row["tile"], row["warps"], row["stages"], row.get("maxnreg")
            found[key] = min(row["occupancy"], found.get(key, 32))
    return found


def occupancy(recorded: KernelLaunch) -> int:
    """As the tile states it, else as reported, else by its stages in shared memory and by the registers of the report's
    like kernels.
    """
    if recorded.programs:
        return recorded.programs
    a, name = recorded.arguments, recorded.kernel.__name__
    tile = [a.get(block) for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    key = name, kernel_report.describe(recorded), *tile, recorded.num_warps, recorded.num_stages, recorded.maxnreg
    if key in reported():
        return reported()[key]
    M, N, K = (int(size or 0) for size in tile)
    accumulators = M * N // (32 * recorded.num_warps) if K else 0
    sums = isinstance(a.get("p_mean"), Tensor) or isinstance(a.get("p_center"), Tensor)
    registers = min(recorded.maxnreg or 255, 80 + int(accumulators * (2.5 if sums and "gradient" in name else 0.75)))
    shared = 2 * recorded.num_stages * (M + N) * K
    return max(1, kernel_report.occupancy(90, registers, shared, recorded.num_warps))


def kernel(recorded: KernelLaunch, launch: Launch, part: Part) -> Kernel:
    """A recorded Triton launch by its grid, its constants and the sizes of its tensors."""
    a, name, programs = recorded.arguments, recorded.kernel.__name__, prod(recorded.grid)
    M, N, K = (a.get(block) or 0 for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    sizes = {key: value.numel() * value.element_size() for key, value in a.items() if isinstance(value, Tensor)}
    statistics = name in REDUCTIONS or (name == ADD_ROWS and launch.op != "weight gradient")
    found = Kernel(
        STATISTICS if statistics else launch.op, launch, part.network.by_name[launch.node], len(part.groups),
        name, programs, occupancy(recorded), (M, N), nbytes=sum(sizes.values()),
    )  # fmt: skip
    if not ("KERNEL" in a and "CO" in a):
        return found
    # masked lanes load nothing: rows, columns and depth are those that there are
    taps, depth, columns = a["KERNEL"] ** 2, a["C"], min(N, a["CO"])
    if "steps" in a:  # a weight gradient, which sums over positions
        found = replace(found, nbytes=sizes["p_partial"])
        M, steps = taps * a["C"] * -(-a["CO"] // N) / recorded.grid[0], a["steps"]
        total = steps * K
    else:
        if name == "conv_data_gradient_kernel":  # at a stride, a position has that much fewer taps
            taps, depth, columns = taps / a["STRIDE"] ** 2, a["CO"], min(N, a["C"])
        steps = a["KERNEL"] if a.get("ROW_TAPS") else taps * -(-depth // K)
        total = taps * depth
    return replace(found, steps=programs * steps, l2=2.0 * programs * total * (M + columns))


def left_by(part: Part, others: Others | None = None) -> dict[str, Partials]:
    """The weight gradients of a part that leave partial results to the un-fold, but for those that ``others`` make."""
    with assume_arch(90):
        left = left_to_unfold(part, kernels_themselves, torch.bfloat16, torch.device("meta"))
    theirs = {
        launch.node for launch in part.launches
        if others is not None and launch.op == "weight gradient" and others.computes(part, launch)
    }  # fmt: skip
    return {name: one for name, one in left.items() if name not in theirs}


def several_results(part: Part, name: str, splits: int) -> Tensor:
    """Memory for partial results of a layer's weight gradient."""
    layer = part.network.by_name[name]
    assert isinstance(layer, Layer)
    return torch.empty(splits, len(part.groups), layer.taps, layer.in_channels, layer.shape[0], device="meta")


@functools.cache
def record(
    network: Network, groups: tuple[Group, ...], batch: int, launches: tuple[Launch, ...], others: Others | None = None
) -> tuple[Kernels, ...]:
    """Of each launch of a part, in order. For a backward part a forward pass is planned, whose results it reads.

    What ``others`` compute is theirs alone: partial results of a weight gradient are summed by the un-fold.
    """
    part, count = Part("", network, groups, batch, list(launches)), len(groups)
    found: list[Kernels] = []

    def after(launch: Launch, buffers: dict[str, Any]) -> None:
        node = network.by_name[launch.node]
        if others is not None and others.computes(part, launch):
            recorded.clear()
            found.append((others.kernel(part, launch),))
            return
        kernels = [kernel(one, launch, part) for one in recorded] or [Kernel(launch.op, launch, node, count)]
        recorded.clear()
        first = kernels.pop(max(range(len(kernels)), key=lambda i: (kernels[i].steps, kernels[i].nbytes)))
        if first.op != STATISTICS:
            # partial results are written beside the result, or in its place where they are left to the un-fold
            whole = first.nbytes / left[launch.node].splits if launch.node in left else 0.0
            partial = first.nbytes - whole if launch.op == "weight gradient" and (kernels or whole) else 0.0
            first = replace(first, flops=float(launch.flops), nbytes=launch.nbytes + partial)
        found.append((first, *kernels))

    def implement(part: Part, launch: Launch, op: Callable[..., Any]) -> Callable[..., Any]:
        return (wgmma.kernel(op) if others is not None and others.computes(part, launch) else None) or op

    with torch.device("meta"), assume_arch(90), record_launches() as recorded, OnMeta():
        weights = PackedWeights(part, count, torch.bfloat16, "meta")
        weight_index = torch.arange(count, dtype=torch.int32)
        C, H, W = network.nodes[0].shape
        buffers: dict[str, Any] = {INPUT: torch.empty(1, batch, H, W, C)}
        if launches[0].op != "conv":
            own = [replace(group, network=0) for group in groups]
            (forward,) = plan([network], own, "forward", batch, others or nothing).parts
            run_part(PartRun(forward, weights, weight_index, buffers, Execution(implement=implement)))
            recorded.clear()
            classes = network.by_name[network.output].shape[0]
            buffers[grad(network.output)] = torch.empty(count, batch, classes)
        execution = Execution(implement=implement)
        execution.watch = after
        left = left_by(part, others)
        gradients = {grad(f"{name}.weight"): several_results(part, name, one.splits) for name, one in left.items()}
        run_part(PartRun(part, weights, weight_index, buffers, execution, gradients))
    return tuple(found)


def kernels(part: Part, others: Others | None = None) -> tuple[Kernels, ...]:
    """Of each of ``part.launches``, which are planned for ``others`` if these are given."""
    return record(part.network, part.groups, part.batch, tuple(part.launches), others)


@functools.cache
def nodes(network: str, method: str, batch: int, members: int, branches: int) -> GraphNodes:
    """Of a step's captured graph."""
    student, perturbation = METHODS[method]
    return count_step(network, members, branches, batch, student=student, perturbation=perturbation)


def beside(setting: Setting, others: Others | None = None) -> Kernels:
    """What no part launches: weights packed, seeds, ascent, loss, un-fold, update; and PyTorch's operations.

    Per weight, a branch has it packed for two passes, both ways, and un-folds its gradient, which may be in partial
    results; the update reads and writes weight, momentum and gradient. The partial results of ``others`` are counted
    where they are written.
    """
    training = [part for part in setting.parts if part.training]
    part = training[0]
    convs = [node for node in part.network.nodes if isinstance(node, Conv)]
    numbers = sum(node.shape[0] * node.in_shape[0] * node.kernel**2 for node in convs)
    one = Kernel(WEIGHTS, part.launches[0], Node("", (), (0, 0, 0)), len(part.groups))
    every = nodes(setting.network, setting.method, setting.batch, setting.members, setting.k).total
    apart = sum(len(found) for part in setting.parts for found in kernels(part))
    rest = every - (apart - setting.shared)
    more = sum(  # than one result
        several_results(each, name, left.splits - 1).nbytes
        for each in training for name, left in left_by(each, others).items()
    )  # fmt: skip
    return replace(one, nbytes=numbers * (12.0 * len(part.groups) + 32) + more), *[one] * (rest - 1)
