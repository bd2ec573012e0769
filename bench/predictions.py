"""What each change to the engine should give, written down before it is measured. No number here is a measurement.

    python -m bench.predictions [--networks wrn28_4 resnet32] [--batch 512] [--members 4] [--gpu h200]

A launch takes the larger of its arithmetic at the rate assumed for its kernel and width (TFLOP/s, below) and its
traffic at 85% of the memory's rate; arithmetic and traffic are the plan's. ``bench.throughput`` gives the outcome, and
``bench.kernels`` says per launch which assumption was wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.common import table
from bench.setting import NETWORKS, Setting
from fastensdistill.network.gpu import GPUS, Gpu
from fastensdistill.network.launch import Launch
from fastensdistill.network.nodes import Conv, Network

HELD = 0.85  # of the memory's rate, by kernels that do little else
# Channels → TFLOP/s on an H200: a gather, which reads every input nine times through L2; an input tile with its border,
# by mma.sync (csrc/halo_conv.h says why) and by wgmma; cuDNN. Every one of them an estimate.
GATHER = {4: 50, 16: 100, 32: 180, 64: 320, 128: 500}
HALO = {4: 50, 16: 200, 32: 350, 64: 450, 128: 500}
HALO_WGMMA = {4: 50, 16: 320, 32: 480, 64: 620, 128: 700, 256: 740}
VENDOR = {4: 50, 16: 100, 32: 200, 64: 400, 128: 620}
COLUMNS = {"network": "network", "change": "change", "images_per_second": "images/s", "ms": "ms", "ratio": "gain"}


@dataclass(frozen=True)
class Change:
    """``rate`` gives a convolution's TFLOP/s; ``extra`` bytes that a launch moves beside the plan's (or less)."""

    title: str
    rate: Callable[[Launch, Conv], float]
    extra: Callable[[Launch, Network], float] = lambda launch, network: 0.0


def assumed(rates: dict[int, int], node: Conv) -> float:
    """For the narrower side of a convolution."""
    channels = min(node.in_shape[0], node.shape[0])
    return rates[max(width for width in rates if width <= max(4, channels))]


def covered(launch: Launch, node: Conv) -> bool:
    """Whether the kernel that keeps its input tile with the border can run this launch."""
    return launch.op in ("conv", "conv gradient") and (node.kernel, node.stride) == (3, 1) and node.in_shape[0] >= 16


def halo(rates: dict[int, int], widest: int) -> Callable[[Launch, Conv], float]:
    """The faster of both kernels up to ``widest`` channels, the gather beyond and where nothing else can run."""

    def rate(launch: Launch, node: Conv) -> float:
        fits = covered(launch, node) and min(node.in_shape[0], node.shape[0]) <= widest
        return max(assumed(GATHER, node), assumed(rates, node) if fits else 0)

    return rate


def vendor(launch: Launch, node: Conv) -> float:
    wide = min(node.in_shape[0], node.shape[0]) >= 128
    return assumed(VENDOR if wide else GATHER, node)


def unfused(launch: Launch, network: Network) -> float:
    """The result of a vendor's convolution is read and written once more, by what follows it."""
    node = network.by_name[launch.node]
    if not isinstance(node, Conv) or min(node.in_shape[0], node.shape[0]) < 128 or launch.op == "weight gradient":
        return 0.0
    macs = node.shape[0] * node.shape[1] * node.shape[2] * node.in_shape[0] * node.kernel**2
    C, H, W = node.shape if launch.op == "conv" else node.in_shape
    return 2 * 2.0 * C * H * W * launch.flops / (2 * macs)  # two passes of bf16, over as many images as the FLOPs say


def applied_on_load(launch: Launch, network: Network) -> float:
    """BatchNorm-ReLU of a training group as the prologue of the convolution: its own pass is not launched."""
    return -launch.nbytes if launch.op == "norm" and not any(s.kind == "add" for s in launch.epilogue) else 0.0


CHANGES = (
    Change("Triton kernels everywhere (as the table of dispatch stands)", lambda _, node: assumed(GATHER, node)),
    Change("cuDNN from 128 channels on, what it cannot fuse as passes", vendor, unfused),
    Change("halo kernel (mma.sync) up to 32 channels", halo(HALO, 32)),
    Change("halo kernel (mma.sync) up to 64 channels", halo(HALO, 64)),
    Change("halo kernel (mma.sync), all widths", halo(HALO, 1 << 20)),
    Change("the same, BatchNorm and ReLU applied as it loads", halo(HALO, 1 << 20), applied_on_load),
    Change("halo kernel with wgmma", halo(HALO_WGMMA, 1 << 20)),
    Change("the same, BatchNorm and ReLU applied as it loads", halo(HALO_WGMMA, 1 << 20), applied_on_load),
    Change("every launch at its roof", lambda *_: float("inf")),
)


def seconds(setting: Setting, change: Change, gpu: Gpu) -> float:
    """Of a step. At best a launch computes at the device's rate."""
    total = 0.0
    for part in setting.parts:
        for launch in part.launches:
            node = part.network.by_name[launch.node]
            rate = min(gpu.flops, 1e12 * change.rate(launch, node)) if isinstance(node, Conv) else gpu.flops
            traffic = max(0.0, launch.nbytes + change.extra(launch, part.network)) / (HELD * gpu.bandwidth)
            total += max(launch.flops / rate, traffic)
    return total


def predictions(network: str, batch: int, members: int, gpu: Gpu) -> list[dict[str, object]]:
    """A row per change; ``ratio`` is to the first."""
    setting = Setting(network, "tdiv-sdiv", batch, members)
    times = [seconds(setting, change, gpu) for change in CHANGES]
    return [
        {"network": network, "change": change.title, "images_per_second": batch / t, "ms": 1e3 * t,
         "ratio": times[0] / t}
        for change, t in zip(CHANGES, times, strict=True)
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["wrn28_4", "resnet32"], choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--members", type=int, default=4, help="M = K")
    parser.add_argument("--gpu", default="h200", choices=GPUS)
    options = parser.parse_args(argv)
    gpu = GPUS[options.gpu]
    print(f"TDiv−SDiv, batch {options.batch}, M = K = {options.members}, {gpu.name}: predicted, not measured")
    rows = [row for name in options.networks for row in predictions(name, options.batch, options.members, gpu)]
    print(table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
