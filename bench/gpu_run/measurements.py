"""The numbers that the design of the wgmma kernels rests on, each with what it settles; in seconds, and in any order.

1 to 4 are the driver's (``bench.driver``): descriptors against the CPU, cycles of a product, the older instructions'
peak, what L2 delivers. 6, today's kernels, is the stages launches and kernels. The rest is here. Records: ``measuring``
before one begins, so that a process that dies in it is not asked again, then ``measured`` {name, settles, values}.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from bench import driver, kernels
from bench.common import brief, spoils_context, spread
from bench.gpu_run.context import Context
from bench.gpu_run.record import read
from fastensdistill.kernels.batch_norm import batch_norm_apply, batch_norm_statistics
from fastensdistill.kernels.batch_norm_backward import batch_norm_backward

Values = dict[str, Any]
WIDTHS = ((64, 32), (128, 16), (256, 8))  # channels and size of WRN-28-4's three groups
IMAGES, GROUPS = 2048, 4
NODES = 400  # of a step's graph, about
DRIVER_LIMIT = 20.0  # seconds for all of the driver's


def timed(context: Context, call: Callable[[], object], repeats: int = 10) -> float:
    """Seconds, the median, with a cold L2."""
    return spread(kernels.timer(context.device, repeats if not context.rehearse else 1)(call))["median"]


def vendor(context: Context) -> Values:
    """TFLOP/s of cuDNN's convolutions in bf16, channels-last, everything in one call."""
    images, found = 4 if context.rehearse else IMAGES, {}
    for channels, size in ((8, 4),) if context.rehearse else WIDTHS:
        with context.device:
            x, d = (torch.randn(images, size, size, channels).bfloat16().permute(0, 3, 1, 2) for _ in range(2))
            w = torch.randn(channels, channels, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
        flops = 2 * 9 * images * size**2 * channels**2

        def forward(x: Tensor = x, w: Tensor = w) -> Tensor:
            return F.conv2d(x, w, padding=1)

        def data(x: Tensor = x, w: Tensor = w, d: Tensor = d) -> Tensor:
            return nn_grad.conv2d_input(x.shape, w, d, padding=1)

        def weight(x: Tensor = x, w: Tensor = w, d: Tensor = d) -> Tensor:
            return nn_grad.conv2d_weight(x, w.shape, d, padding=1)

        for call in (forward, data, weight):
            found[f"{call.__name__} {channels}@{size}"] = round(flops / timed(context, call) / 1e12, 3)
    return found


def around(context: Context) -> Values:
    """TB/s of what lies between convolutions at 64 channels: a copy, BatchNorm, its gradient; µs of its statistics."""
    N, size, C = (2, 4, 16) if context.rehearse else (IMAGES // GROUPS, 32, 64)
    z = torch.randn(GROUPS, N, size, size, C, device=context.device).to(context.dtype)
    d, out = torch.randn_like(z), torch.empty_like(z)
    rows = [torch.rand(1, C, device=context.device) + 0.5 for _ in range(4)]
    sums = torch.randn(GROUPS, 33, 2, C, device=context.device)
    count, nbytes = GROUPS * N * size**2, z.numel() * z.element_size()
    calls = {
        "copy": (2.0, lambda: out.copy_(z)),
        "norm": (2 + 1 / 16, lambda: batch_norm_apply(z, rows[0], rows[1], mask=True)),
        "norm gradient": (3.0, lambda: batch_norm_backward(d, z, sums, count, rows[0], rows[1], rows[2])),
    }
    found = {name: round(passes * nbytes / timed(context, call) / 1e12, 4) for name, (passes, call) in calls.items()}
    seconds = timed(context, lambda: batch_norm_statistics(sums, count, *(row.clone() for row in rows)))
    return found | {"statistics us": round(1e6 * seconds, 2)}


def nodes(context: Context) -> Values:
    """µs a node of a graph of small kernels, each of which depends on the one before; the same from Python."""
    x = torch.zeros(1024, device=context.device)

    def chain() -> None:
        for _ in range(NODES if not context.rehearse else 4):
            x.add_(1)

    count = NODES if not context.rehearse else 4
    found = {"us a node": round(1e6 * timed(context, chain) / count, 3)}
    began = time.perf_counter()
    chain()
    found["us launched"] = round(1e6 * (time.perf_counter() - began) / count, 3)
    return found


def step(context: Context) -> Values:
    """Milliseconds of the captured step, by the newest timing; the sum of its launches comes with the stage kernels."""
    rows = [row for row in read(context.record.path) if row["kind"] == "throughput" and row.get("seconds")]
    own = [row for row in rows if row["contender"] == "fused" and row["network"] == context.sizes.network]
    return {f"{row['network']} {row['batch']}": round(1e3 * row["seconds"], 3) for row in own[-1:]}


def of_driver(context: Context) -> Values:
    """The driver's own, each in a process of its own under a limit of its own."""
    if not context.rehearse and not driver.BINARY.exists():
        return {"left_out": "no driver"}
    command = driver.stand_in("measure") if context.rehearse else [str(driver.BINARY), "measure"]
    found = driver.run(command, DRIVER_LIMIT)
    return {"status": found["status"], **found["measured"]}


# name → what it settles, and how it is measured; in the order of the design
MEASUREMENTS: dict[str, tuple[str, Callable[[Context], Values]]] = {
    "driver": ("Dᵀ or D; the narrow kernel; mma.sync; clusters; the ceiling of Triton's kernels", of_driver),
    "vendor": ("cuDNN's rows of the table; what twice the compiled peer means", vendor),
    "around": ("the order of the fusions", around),
    "nodes": ("whether launches are merged", nodes),
    "step": ("what lies between a step's launches", step),
}


def measure(context: Context) -> None:
    """All that this stage has not begun yet."""
    begun = {row["name"] for row in context.record.earlier() if row["kind"] == "measuring"}
    for name, (settles, how) in remaining(begun):
        if time.monotonic() > context.deadline:
            context.record.add("measured", name=name, settles=settles, values={"left_out": "no time left"})
            continue
        context.record.add("measuring", name=name)
        try:
            values = how(context)
        except Exception as error:
            context.record.add("measured", name=name, settles=settles, values={"error": brief(error)})
            if spoils_context(error):
                raise
            continue
        context.record.add("measured", name=name, settles=settles, values=values)


def remaining(begun: set[str]) -> Iterator[tuple[str, tuple[str, Callable[[Context], Values]]]]:
    return ((name, one) for name, one in MEASUREMENTS.items() if name not in begun)
