"""What a plan's launches do on the device, read off the engine itself, and what each kernel should take: a model.

The ops are run with their kernels recorded instead of launched, for sm_90: grids, tiles, splits and the number of nodes
are the engine's own, so that a change of theirs moves the model. Arithmetic and traffic are the plan's; what the plan
leaves out (partial sums, coefficients, copies) is counted by the tensors that are passed. The programs that fit a
multiprocessor are those of ``bench/results/kernel_report.json``.

A kernel takes the larger of its product and its traffic through memory. A product takes the largest of its arithmetic,
of what its programs load through L2 and of its steps, and longer where programs do not fill the multiprocessors. The
rates of the arithmetic and of the memory are ``network.gpu``'s; all that is assumed stands below and is no measurement.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from bench import kernel_report
from bench.common import RESULTS
from bench.setting import Setting
from fastensdistill.engine.passes import run_part
from fastensdistill.engine.weights import Weights
from fastensdistill.kernels import triton_utils
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.network.gpu import Gpu
from fastensdistill.network.launch import Group, Launch, Part
from fastensdistill.network.nodes import Conv, Network, Node
from fastensdistill.network.plan import plan

HELD = 0.85  # of the memory's rate, by kernels that do little else
MULTIPROCESSORS = 132  # of an H100 and of an H200
L2 = 6.6e12  # bytes a second into all of them together, 50 GB into one, which no kernel exceeds; 5.5 to 7.0 are likely
ALONE = 0.75  # of that, where one program is all that a multiprocessor holds: it waits or stores a quarter of the time
STEP = 0.11e-6  # seconds of a multiprocessor that a step of a program takes at least: addresses, masks, a barrier
GAP = 1.2e-6  # seconds between two nodes of the captured graph, each of which depends on the one before
TRANSPOSED = 0.2  # of the memory's rate, by a copy that also transposes
OTHER_NODES = 25  # nodes outside the plan's parts: weights packed, seed, ascent, loss, un-fold, update
REDUCTIONS = ("batch_norm_statistics_kernel", "batch_norm_coefficients_kernel")
STATISTICS, COPIES, WEIGHTS = "norm statistics", "copies of gradients", "weights and update"


@dataclass(frozen=True)
class Kernel:
    """One node of the graph.

    ``op`` is the launch's, but for what the breakdown of a step keeps apart; ``name`` the Triton kernel's, if any.
    ``nbytes`` go through memory; ``l2`` bytes are loaded by all ``programs`` in all their ``steps`` of a product.
    ``rate``, FLOP/s, is that of a kernel which can run in its place, and does where it is faster.
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
        few = min(1, self.programs / MULTIPROCESSORS)
        return max(product, self.nbytes / min(HELD * gpu.bandwidth, L2 * few))


Kernels = tuple[Kernel, ...]  # of one launch, first the one that does what the plan describes


@functools.cache
def reported() -> dict[tuple[Any, ...], int]:
    """Kernel, shape and fusions, tile, warps and stages → programs that fit a multiprocessor, as compiled for sm_90."""
    rows = json.loads((RESULTS / "kernel_report.json").read_text())["rows"]
    return {
        (r["kernel"], r["launch"], *r["tile"], r["warps"], r["stages"]): r["occupancy"] for r in rows if r["arch"] == 90
    }


def occupancy(recorded: triton_utils.Launch) -> int:
    """As reported; elsewhere by its stages in shared memory, and by registers as in the report's like kernels."""
    a, name = recorded.arguments, recorded.kernel.__name__
    tile = [a.get(block) for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    key = name, kernel_report._describe(recorded), *tile, recorded.num_warps, recorded.num_stages
    if key in reported():
        return reported()[key]
    M, N, K = (int(size or 0) for size in tile)
    accumulators = M * N // (32 * recorded.num_warps) if K else 0
    sums = isinstance(a.get("p_mean"), Tensor) or isinstance(a.get("p_center"), Tensor)
    registers = min(255, 80 + int(accumulators * (2.5 if sums and "gradient" in name else 0.75)))
    shared = 2 * recorded.num_stages * (M + N) * K
    return max(1, kernel_report.occupancy(90, registers, shared, recorded.num_warps))


def kernel(recorded: triton_utils.Launch, launch: Launch, part: Part) -> Kernel:
    """A recorded Triton launch by its grid, its constants and the sizes of its tensors."""
    a, name, programs = recorded.arguments, recorded.kernel.__name__, prod(recorded.grid)
    M, N, K = (a.get(block) or 0 for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    sizes = {key: value.numel() * value.element_size() for key, value in a.items() if isinstance(value, Tensor)}
    found = Kernel(
        STATISTICS if name in REDUCTIONS else launch.op, launch, part.network.by_name[launch.node], len(part.groups),
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


@functools.cache
def record(
    network: Network, groups: tuple[Group, ...], batch: int, launches: tuple[Launch, ...]
) -> tuple[Kernels, ...]:
    """Of each launch of a part, in order. For a backward part a forward pass is planned, whose results it reads.

    Tensors of the batch's size are allocated, but never touched.
    """
    part, count = Part("", network, groups, batch, list(launches)), len(groups)
    weights, slots = Weights(part, count, torch.bfloat16), torch.arange(count, dtype=torch.int32)
    C, H, W = network.nodes[0].shape
    buffers: dict[str, Any] = {"input": torch.empty(1, batch, H, W, C)}
    parameters = {f"{name}.grad" for node in network.nodes for name in node.parameters}
    found: list[Kernels] = []

    def after(launch: Launch) -> None:
        node = network.by_name[launch.node]
        kernels = [kernel(one, launch, part) for one in recorded] or [Kernel(launch.op, launch, node, count)]
        recorded.clear()
        first = kernels.pop(max(range(len(kernels)), key=lambda i: (kernels[i].steps, kernels[i].nbytes)))
        if first.op != STATISTICS:
            partial = first.nbytes if launch.op == "weight gradient" and kernels else 0.0
            first = replace(first, flops=float(launch.flops), nbytes=launch.nbytes + partial)
        for gradient in (buffers[name] for name in launch.writes if name in parameters):
            share = 1.0 if gradient.is_contiguous() else TRANSPOSED
            kernels.append(Kernel(COPIES, launch, node, count, nbytes=8 * gradient.numel() / share))
        found.append((first, *kernels))

    with assume_arch(90), triton_utils.record_launches() as recorded:
        if launches[0].op != "conv":
            (forward,) = plan([network], [replace(group, network=0) for group in groups], "forward", batch).parts
            run_part(forward, weights, slots, buffers)
            recorded.clear()
            classes = network.by_name[network.output].shape[0]
            buffers[f"{network.output}.grad"] = torch.empty(count, batch, classes)
        run_part(part, weights, slots, buffers, after=after)
    return tuple(found)


def kernels(part: Part) -> tuple[Kernels, ...]:
    """Of each of ``part.launches``."""
    return record(part.network, part.groups, part.batch, tuple(part.launches))


def beside(setting: Setting) -> Kernels:
    """What no part launches. Per weight, a branch has it packed for two passes, both ways, and un-folds its gradient;
    the update reads and writes weight, momentum and gradient.
    """
    part = next(part for part in setting.parts if part.training)
    convs = [node for node in part.network.nodes if isinstance(node, Conv)]
    numbers = sum(node.shape[0] * node.in_shape[0] * node.kernel**2 for node in convs)
    one = Kernel(WEIGHTS, part.launches[0], Node("", (), (0, 0, 0)), len(part.groups))
    return replace(one, nbytes=numbers * (12.0 * len(part.groups) + 32)), *[one] * (OTHER_NODES - 1)
