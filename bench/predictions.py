"""What a step of today's engine should take on a GPU, and what each change to it should give, before it is measured.

    python -m bench.predictions [--networks wrn28_4 resnet32] [--batch 512] [--members 4] [--gpu h100 h200]
                                [--by op|layer] [--assumptions]

No time here is a measurement. "As it stands" is the model of ``bench.recorded``, which follows the engine by itself; a
change alters its kernels, and a row that begins with "+" has all of the rows before it, up to the last without. What
wgmma kernels should take is in ``bench.wgmma_model``. What the model assumes of L2, of waiting and of gaps leaves every
time a band of ±15 percent, ±10 ms of WRN-28-4's at batch 512; with all its assumptions at their worst at once it is a
quarter more. With ``--by`` the table says instead where the time goes as it stands. ``bench.throughput`` gives the
outcome, and ``bench.kernels`` says per launch which assumption was wrong.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from bench import recorded, wgmma_model
from bench.common import table
from bench.recorded import GAP, MULTIPROCESSORS, WEIGHTS, Kernel, Kernels, beside, kernels
from bench.setting import METHODS, NETWORKS, Setting
from bench.wgmma_model import OPS, Wgmma, together
from fastensdistill.network.gpu import GPUS, Gpu
from fastensdistill.network.join import JOINT
from fastensdistill.network.launch import Launch, Part
from fastensdistill.network.nodes import Conv
from fastensdistill.network.on_load import Abilities, nothing
from fastensdistill.network.plan import plan_step

# Channels → TFLOP/s of kernels that the engine does not launch today, every one an estimate, from here up to the next.
# An input tile with its border in shared memory, by mma.sync: issue slots bound it below 64 channels, and it should
# reach 75-100, 180-220, 390-460 and 450-480. What wgmma should reach is in ``bench.wgmma_model``.
HALO = {16: 88, 32: 200, 64: 425, 128: 465}
VENDOR = {128: 620}  # cuDNN, one group
ANY = 1 << 20  # channels
PLAIN = [name for name, (model, arguments, _) in NETWORKS.items() if not arguments and model != "preresnet"]
BAND = 0.15  # of a time, either way
COLUMNS = {"network": "network", "gpu": "GPU", "change": "change", "images_per_second": "images/s", "ms": "ms",
           "ratio": "gain"}  # fmt: skip

Alteration = Callable[[Kernels], Kernels]  # of one launch; none are left of a launch that is no longer needed


def images(k: Kernel) -> float:
    """How many a convolution's launch computes, all groups together: the plan counts two FLOPs a multiplication."""
    assert isinstance(k.node, Conv)
    return k.launch.flops / (2 * k.node.macs)


def assumed(rates: dict[int, int], channels: int) -> float:
    return 1e12 * rates[max(width for width in rates if width <= channels)]


def vendor(found: Kernels) -> Kernels:
    """cuDNN from 128 channels on, a call per group; what it cannot fuse is a pass that reads its result."""
    k, *rest = found
    if k.op not in ("conv", "conv gradient", "weight gradient") or k.width < 128:
        return found
    assert isinstance(k.node, Conv)
    moved = replace(k, flops=0.0, l2=0.0, steps=0.0, nbytes=0.0, programs=MULTIPROCESSORS)
    calls = [replace(k, rate=assumed(VENDOR, k.width)), *[moved] * (k.groups - 1)]
    if k.op != "weight gradient" and len(k.launch.epilogue) > 1:
        read, written = (2 * prod(shape) * images(k) for shape in (k.node.in_shape, k.node.shape))
        if k.op == "conv gradient":
            read, written = written, read
        calls[0] = replace(calls[0], nbytes=read + written)
        calls.append(replace(moved, nbytes=k.nbytes - read + written))
    return *calls, *rest


def halo(rates: dict[int, int], widest: int, strides: tuple[int, ...] = (1,)) -> Alteration:
    """The input tile with its border, up to ``widest`` channels, where that is faster."""

    def alter(found: Kernels) -> Kernels:
        k, node = found[0], found[0].node
        if k.op not in ("conv", "conv gradient") or not isinstance(node, Conv) or not 16 <= k.width <= widest:
            return found
        fits = node.kernel == 3 and node.stride in strides
        return (replace(k, rate=assumed(rates, k.width)), *found[1:]) if fits else found

    return alter


@dataclass(frozen=True)
class Change:
    """``alterations`` of the kernels of today's plan, or another plan for other kernels (``by``).

    ``joint``: a layer of all teachers and all branches is one launch, as it is today by Triton's kernels.
    """

    title: str
    alterations: tuple[Alteration, ...] = ()
    by: Wgmma | None = None
    joint: bool = False


def norms(gradient: bool, seconds: bool = False) -> Abilities:
    return Abilities(True, gradient, seconds, seconds)


TODAY = Change("as it stands", joint=True)
CHANGES = (
    TODAY,
    Change("cuDNN from 128 channels on, what it cannot fuse as passes", (vendor,)),
    Change("halo kernel (mma.sync) up to 32 channels", (halo(HALO, 32),)),
    Change("halo kernel (mma.sync) up to 64 channels", (halo(HALO, 64),)),
    Change("halo kernel (mma.sync), all widths", (halo(HALO, ANY),)),
    Change("wgmma: weight gradient, 3x3 at stride 1 from 64 channels on", by=Wgmma(True, OPS[2:])),
    Change("+ forward and data gradient", by=Wgmma(True)),
    Change("+ BatchNorm and ReLU as they load", by=Wgmma(True, OPS, norms(False))),
    Change("+ the gradient of a block's inner BatchNorm as they load", by=Wgmma(True, OPS, norms(True))),
    Change("+ stride 2, 1x1 and narrow layers", by=Wgmma(False, OPS, norms(True))),
    Change("+ shortcuts as further products", by=Wgmma(False, OPS, norms(True, True))),
    Change("+ one launch a layer for teachers and branches", by=Wgmma(False, OPS, norms(True, True)), joint=True),
)
ROOF = "every planned launch at its roof, nothing beside"


def assumptions() -> list[dict[str, object]]:
    """All that the model assumes, with units and sources."""
    found = {**recorded.ASSUMED, **wgmma_model.ASSUMED}
    rows = [{"name": name, "value": one.value, "unit": one.unit, "source": one.source} for name, one in found.items()]
    for title, rates in (("halo kernel by mma.sync", HALO), ("cuDNN", VENDOR)):
        rows += [{"name": f"{title}, from {width} channels", "value": 1e12 * rate, "unit": "FLOP/s",
                  "source": "estimate"} for width, rate in rates.items()]  # fmt: skip
    return rows


@functools.cache
def passes(setting: Setting, by: Wgmma | None) -> dict[str, list[Part]]:
    """The step's plan by pass, for other kernels than the ops' own."""
    network, perturbation = setting.parts[0].network, METHODS[setting.method][1] or "none"
    sizes = setting.members, setting.k, setting.batch
    planned = plan_step(network, network, *sizes, perturbation, by or nothing)
    return {name: list(one.parts) for name, one in planned.items()}


def joined(parts: Sequence[Part], found: list[tuple[Kernels, ...]]) -> list[tuple[Kernels, ...]]:
    """The kernels of two parts of a pass, with the layers that both have as one node of the first."""
    if len(parts) != 2:
        return found
    first, second = ({one[0].launch.node: one[0] for one in part if one[0].launch.op in JOINT} for part in found)
    both = {name: together(first[name], second[name]) for name in first.keys() & second.keys()}
    ahead = [(both.get(k.launch.node, k) if k.launch.op in JOINT else k, *rest) for k, *rest in found[0]]
    behind = [tuple(rest) if k.launch.op in JOINT and k.launch.node in both else (k, *rest) for k, *rest in found[1]]
    return [tuple(ahead), tuple(behind)]


def costs(setting: Setting, change: Change, gpu: Gpu) -> list[tuple[Kernel, float]]:
    """Every node of a step's graph with its seconds, to which each adds a gap."""
    found: list[Kernel] = []
    every = [beside(setting, change.by)]
    for parts in passes(setting, change.by).values():
        of_parts = [kernels(part, change.by) for part in parts]
        for of_part in joined(parts, of_parts) if change.joint else of_parts:
            every += of_part
    for one in every:
        for alter in change.alterations:
            one = alter(one) if one else one
        found += one
    return [(k, k.seconds(gpu)) for k in found]


def seconds(setting: Setting, change: Change, gpu: Gpu) -> float:
    """Of a step."""
    return sum(time + GAP for _, time in costs(setting, change, gpu))


def predicted(network: str, batch: int, members: int, gpu_name: str, by_wgmma: bool = False) -> float:
    """Milliseconds of a TDiv−SDiv step, M = K = ``members``, with Triton's or the wgmma kernels' convolutions.

    ``gpu_name`` is "h100" or "h200".
    """
    change = CHANGES[-1] if by_wgmma else TODAY
    return 1e3 * seconds(Setting(network, "tdiv-sdiv", batch, members), change, GPUS[gpu_name])


def predicted_launch(launch: Launch, part: Part, gpu: Gpu) -> float:
    """Microseconds of one of ``part.launches``, with a gap per node."""
    return 1e6 * sum(k.seconds(gpu) + GAP for k in kernels(part)[part.launches.index(launch)])


def predicted_wgmma(launch: Launch, part: Part, gpu: Gpu) -> float | None:
    """Microseconds of the same by the wgmma kernels; None where they do not cover it."""
    by = Wgmma()
    return 1e6 * (by.kernel(part, launch).seconds(gpu) + GAP) if by.computes(part, launch) else None


def breakdown(setting: Setting, gpu: Gpu, by: str) -> list[dict[str, object]]:
    """Where a step spends its time as it stands: a row per "op", or per op and "layer", and one for all gaps."""
    found = costs(setting, TODAY, gpu)
    times: dict[str, list[float]] = {}
    for k, time in found:
        plain = by == "op" or k.op == WEIGHTS
        times.setdefault(k.op if plain else f"{k.op} {k.layer}", []).append(time)
    rows = [*sorted(times.items(), key=lambda row: -sum(row[1])), ("gaps", [GAP] * len(found))]
    total = sum(sum(row) for _, row in rows)
    return [{"name": n, "nodes": len(row), "ms": 1e3 * sum(row), "share": sum(row) / total} for n, row in rows]


def predictions(network: str, batch: int, members: int, gpu: Gpu) -> list[dict[str, object]]:
    """A row per change, and the roof; ``ratio`` is to the engine as it stands."""
    setting = Setting(network, "tdiv-sdiv", batch, members)
    times = [(change.title, seconds(setting, change, gpu)) for change in CHANGES]
    return [
        {"network": network, "gpu": gpu.name, "change": title, "images_per_second": batch / t, "ms": 1e3 * t,
         "ratio": times[0][1] / t}
        for title, t in (*times, (ROOF, setting.least_time(gpu)))
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["wrn28_4", "resnet32"], choices=PLAIN)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--members", type=int, default=4, help="M = K")
    parser.add_argument("--gpu", nargs="+", default=["h100", "h200"], choices=["h100", "h200"])
    parser.add_argument("--by", choices=["op", "layer"], help="where the time goes as it stands, instead of changes")
    parser.add_argument("--assumptions", action="store_true", help="print what the model assumes, and nothing else")
    options = parser.parse_args(argv)
    if options.assumptions:
        print(table(assumptions(), {name: name for name in ("name", "value", "unit", "source")}))
        return 0
    print(f"TDiv−SDiv, batch {options.batch}, M = K = {options.members}: predicted, not measured; ±{BAND:.0%}")
    for network in options.networks:
        setting = Setting(network, "tdiv-sdiv", options.batch, options.members)
        for gpu in (GPUS[name] for name in options.gpu):
            if options.by:
                print(f"{network}, {gpu.name}: {1e3 * seconds(setting, TODAY, gpu):.1f} ms")
                columns = {"name": options.by, "nodes": "nodes", "ms": "ms", "share": "share"}
                print(table(breakdown(setting, gpu, options.by), columns))
            else:
                print(table(predictions(network, options.batch, options.members, gpu), COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
