"""Every kernel in every shape that a step's plan has: time, TFLOP/s, GB/s, share of its own roof, against cuDNN.

    python -m bench.kernels [--network wrn28_4] [--batch 128] [--members 4] [--compile] [--dispatch FILE] [--json FILE]

A launch is captured as a CUDA graph and replayed with a cold L2 (a write of 512 MB before each, which also hides the
host). Convolutions are compared with cuDNN: alone, without what the launch fuses, group by group on channels-last
memory ("dense") and in one call with groups= ("grouped"); and group by group with all that the launch fuses as
operations of their own ("vendor"), with --compile also compiled. Where the extension's halo convolution covers a
launch, it is timed in that place, with all that this fuses ("CUDA": by blocks of 64 or of 128 channels, whichever is
quicker), and so are the wgmma kernels ("wgmma"). What is faster than Triton can be written as a table for the engine
(--dispatch). A launch is timed only if it agrees with its reference in float64, a large convolution in float32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from bench import roof
from bench.common import arguments, brief, describe_host, save, spoils_context, spread, start, table
from bench.launches import Expected, Prepared, compare, expected, prepare
from bench.setting import NETWORKS, Setting
from fastensdistill.engine.dispatch import CALLED, Choice, ConvShape, shape_of
from fastensdistill.engine.graph import uncollected
from fastensdistill.engine.part_run import Implement
from fastensdistill.kernels import halo_conv, wgmma
from fastensdistill.kernels.halo_conv import HALO
from fastensdistill.kernels.operands import Window
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.kernels.vendor_conv import VENDOR, as_images
from fastensdistill.network.gpu import Gpu

COLUMNS = {
    "launch": "launch", "count": "per step", "us": "us", "p20": "p20", "p80": "p80", "tflops": "TFLOP/s", "gbs": "GB/s",
    "share_of_roof": "of roof", "cuda": "CUDA us", "wgmma": "wgmma us", "vendor": "cuDNN us",
    "dense": "alone us", "grouped": "grouped us", "compiled": "compiled us", "status": "",
}  # fmt: skip
GAIN = 0.03  # below that a choice is noise
CONVS = ("conv", "conv gradient", "weight gradient")


def timer(device: torch.device, repeats: int) -> Callable[[Callable[[], object]], list[float]]:
    """Seconds of a call, each time with nothing of it in the L2 cache."""
    if device.type != "cuda":

        def host(call: Callable[[], object]) -> list[float]:
            found = []
            for _ in range(repeats):
                began = time.perf_counter()
                call()
                found.append(time.perf_counter() - began)
            return found

        return host
    flush = torch.empty(1 << 29, dtype=torch.uint8, device=device)

    def measure(call: Callable[[], object]) -> list[float]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with uncollected(), torch.cuda.graph(graph):
            call()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for first, last in events:
            flush.zero_()
            first.record()
            graph.replay()
            last.record()
        torch.cuda.synchronize(device)
        return [first.elapsed_time(last) / 1e3 for first, last in events]

    return measure


def check(prepared: Prepared, right: Expected) -> float:
    """The largest error of what the launch writes, as a multiple of what is allowed."""
    return max(error / allowed for _, error, allowed in compare(prepared, right))


def bare(prepared: Prepared, grouped: bool) -> Callable[[], object] | None:
    """The launch's convolution alone by PyTorch: a call per group, or one with groups=."""
    _, args, kwargs = prepared.call()
    k, stride, padding = (kwargs.get(name, default) for name, default in (("kernel", 1), ("stride", 1), ("padding", 0)))
    G = len(prepared.weight_index)
    name, x = prepared.launch.op, args[0]
    weight: Tensor | None = None
    if name == "weight gradient":
        d = args[1]
        size = (d.shape[-1], x.shape[-1], k, k)
    elif name == "conv":
        weight = args[1].index_select(0, prepared.weight_index).unflatten(1, (k, k)).permute(0, 4, 3, 1, 2)
    else:
        weight = args[1].index_select(0, prepared.weight_index).flip(1).unflatten(1, (k, k)).permute(0, 3, 4, 1, 2)
    dtype = weight.dtype if weight is not None else args[1].dtype
    x = x.to(dtype).expand(G, -1, -1, -1, -1)

    def together(t: Tensor) -> Tensor:
        """(G, N, H, W, C) → (N, G·C, H, W), channels-last."""
        return as_images(t.permute(1, 2, 3, 0, 4).flatten(3).contiguous())

    groups = G if grouped else 1
    pairs: list[tuple[Tensor, ...]]
    if name == "weight gradient":
        pairs = [(together(x), together(d))] if grouped else [(as_images(x[g]), as_images(d[g])) for g in range(G)]
        size = (size[0] * groups, *size[1:])
        return lambda: [nn_grad.conv2d_weight(a, size, b, stride, padding, 1, groups) for a, b in pairs]
    assert weight is not None
    flat = weight.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    layers = [w.contiguous(memory_format=torch.channels_last) for w in weight]
    pairs = [(together(x), flat)] if grouped else [(as_images(x[g].contiguous()), layers[g]) for g in range(G)]
    if name == "conv":
        return lambda: [F.conv2d(a, w, None, stride, padding, 1, groups) for a, w in pairs]
    height, width = kwargs["in_size"]
    image = (x.shape[1], groups * weight.shape[2], height, width)
    return lambda: [nn_grad.conv2d_input(image, w, a, stride, padding, 1, groups) for a, w in pairs]


class ByHalo(Prepared):
    """The same launch by the extension's halo convolution."""

    def run(self, implement: Implement = lambda part, launch, op: HALO[op]) -> dict[str, Any]:
        return super().run(implement)


class ByVendor(ByHalo):
    """The same launch by PyTorch's convolution, what it cannot fuse as operations of their own."""

    def run(self, implement: Implement = lambda part, launch, op: VENDOR[op]) -> dict[str, Any]:
        return super().run(implement)


def by_halo(prepared: Prepared, right: Expected, measure: Any) -> dict[str, Any]:
    """Its microseconds by the channels of a block, and the best; None where it does not cover the launch."""
    if prepared.launch.op not in ("conv", "conv gradient"):
        return {"cuda": None}
    _, (x, weight, *_), kwargs = prepared.call()
    window, arch = Window(kwargs["kernel"], kwargs.get("stride", 1), kwargs.get("padding", 0)), device_arch(x)
    if not (arch and halo_conv.built(arch)) or not halo_conv.supports(
        weight.shape[2], weight.shape[3], window, x.dtype, arch
    ):
        return {"cuda": None}
    other, out_channels = ByHalo(**vars(prepared)), weight.shape[3]
    found: dict[str, Any] = {"cuda": None}
    for most in sorted({halo_conv.block_channels(out_channels), halo_conv.block_channels(out_channels, 64)}):
        with halo_conv.at_most(most):
            error = check(other, right)
            if error > 1:
                return {"cuda": None, "status": f"CUDA not timed: errs {error:.3g} times what is allowed"}
            found[f"cuda_{most}"] = us = 1e6 * spread(measure(other.run))["median"]
        found["cuda"] = min(us, found["cuda"] or us)
    return found


class ByWgmma(ByHalo):
    """The same launch by the extension's wgmma kernel."""

    def run(self, implement: Implement = lambda part, launch, op: wgmma.kernel(op) or op) -> dict[str, Any]:
        return super().run(implement)


def by_wgmma(prepared: Prepared, right: Expected, measure: Any) -> dict[str, Any]:
    """Its microseconds; None where it does not cover the launch, or errs more than is allowed."""
    op, arch = CALLED.get(prepared.launch.op), device_arch(prepared.weight_index)
    if op is None or not wgmma.built(op, arch):
        return {"wgmma": None}
    kernel, stride, channels, out_channels, *_ = shape_of(prepared.part, prepared.launch)
    window = Window(kernel, stride, kernel // 2)
    if reason := wgmma.unsupported(channels, out_channels, window, prepared.weights.dtype, arch):
        return {"wgmma": None, "wgmma_error": reason}
    other = ByWgmma(**vars(prepared))
    error = check(other, right)
    if error > 1:
        return {"wgmma": None, "wgmma_error": f"errs {error:.3g} times what is allowed"}
    return {"wgmma": 1e6 * spread(measure(other.run))["median"]}


def by_pytorch(prepared: Prepared, right: Expected, measure: Any) -> dict[str, Any]:
    """Microseconds of PyTorch's convolution in its place; None where it errs more than is allowed."""
    whole = ByVendor(**vars(prepared))
    return {"vendor": 1e6 * spread(measure(whole.run))["median"] if check(whole, right) <= 1 else None}


def unless_it_raises(name: str, rival: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``rival`` finds; where it fails, no number for it and the reason, and the launch's own time still stands."""
    try:
        return rival()
    except Exception as error:
        if spoils_context(error):
            raise
        return {name: None, f"{name}_error": brief(error)}


def row(
    prepared: Prepared, count: int, measure: Any, gpu: Gpu, compiled: bool = False, alone: bool = True
) -> dict[str, Any]:
    """One launch's check and times; ``alone``: beside cuDNN's bare convolution too."""
    launch = prepared.launch
    found: dict[str, Any] = {
        "launch": f"{prepared.title}, {len(prepared.part.groups)} groups", "pass": prepared.where, "op": launch.op,
        "count": count, "flops": launch.flops, "nbytes": launch.nbytes, "least_us": 1e6 * gpu.least_time(launch),
        "fused": [str(step) for step in (*launch.prologue, *launch.epilogue)], "status": "",
    }  # fmt: skip
    right = expected(prepared)  # once for all that is compared with it
    error = check(prepared, right)
    found["error"] = error
    if error > 1:
        return found | {"status": f"not timed: errs {error:.3g} times what is allowed"}
    times = spread(measure(prepared.run))
    seconds = times["median"]
    found |= {
        "us": 1e6 * seconds, "p20": 1e6 * times["p20"], "p80": 1e6 * times["p80"],
        "tflops": launch.flops / seconds / 1e12 if launch.flops else None, "gbs": launch.nbytes / seconds / 1e9,
        "share_of_roof": gpu.least_time(launch) / seconds,
    }  # fmt: skip
    found |= unless_it_raises("cuda", lambda: by_halo(prepared, right, measure))
    found |= unless_it_raises("wgmma", lambda: by_wgmma(prepared, right, measure))
    if launch.op in CONVS:
        for name, grouped in (("dense", False), ("grouped", True)) if alone else ():
            call = bare(prepared, grouped)
            found[name] = None if call is None else 1e6 * spread(measure(call))["median"]
        found["shape"] = shape_of(prepared.part, launch)
        found |= unless_it_raises("vendor", lambda: by_pytorch(prepared, right, measure))
    if launch.op in CONVS and compiled:
        op, args, kwargs = prepared.call()
        function = torch.compile(VENDOR[op], dynamic=False)
        found["compiled"] = 1e6 * spread(measure(lambda: function(*args, **kwargs)))["median"]
    return found


def choices(rows: Sequence[dict[str, Any]], arch: int | None, where: str) -> list[Choice]:
    """Rows for ``engine.dispatch``: what is faster than Triton by more than ``GAIN``, all launches of a shape together.

    An implementation counts that has been timed for every one of them.
    """
    together: dict[tuple[str, ConvShape], list[dict[str, Any]]] = {}
    for r in rows:
        if "shape" in r and "us" in r:
            together.setdefault((r["op"], r["shape"]), []).append(r)
    found = []
    for (op, shape), same in together.items():
        times = {
            name: sum(r[key] * r["count"] for r in same)
            for name, key in (("triton", "us"), ("cudnn", "vendor"), ("cuda", "cuda"), ("wgmma", "wgmma"))
            if all(r.get(key) is not None for r in same)
        }
        best = min(times, key=lambda name: times[name])
        if times[best] < (1 - GAIN) * times["triton"]:
            reason = f"{times['triton']:.0f} → {times[best]:.0f} us a step, {where}"
            found.append(Choice(op, best, reason, shape=shape, arch=arch))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=30)
    parser.add_argument("--network", default="wrn28_4", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--members", type=int, default=4, help="M = K")
    parser.add_argument("--compile", action="store_true", help="against torch.compile too: a compilation per shape")
    parser.add_argument("--only", nargs="+", help="ops, such as conv or 'weight gradient'")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after that")
    parser.add_argument("--dispatch", type=Path, help="write the table of what is faster than Triton there, as JSON")
    options = start(parser, argv)
    if options.smoke:
        options.network, options.batch, options.members = "tiny", 2, 2
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    setting = Setting(options.network, "tdiv-sdiv", options.batch, options.members)
    host, (gpu, measured) = describe_host(device), roof.measure(device, smoke=options.smoke, rounds=5)
    measure, rows, deadline = timer(device, options.rounds), [], time.monotonic() + 60 * options.minutes
    if device.type != "cuda":
        print("On a CPU the ops run their references: these are not the kernels.")
    for prepared, count in prepare(setting, device, dtype):
        if time.monotonic() > deadline:
            print("no time left: the rest of the plan's launches is missing")
            break
        if not options.only or prepared.launch.op in options.only:
            with torch.no_grad():
                rows.append(row(prepared, count, measure, gpu, options.compile))
            save(options.json, "kernels", host, options.smoke, roof=measured, setting=setting.describe(), rows=rows)
    print(table(rows, COLUMNS))
    timed = [r for r in rows if "us" in r]
    if halo := [r for r in timed if r["cuda"] is not None]:
        for op in sorted({r["op"] for r in halo}):
            triton, cuda = (sum(r[name] * r["count"] for r in halo if r["op"] == op) / 1e3 for name in ("us", "cuda"))
            print(f"{op}, where CUDA covers it: {triton:.3g} ms by Triton, {cuda:.3g} ms by CUDA")
    total, least = (sum(r[name] * r["count"] for r in timed) for name in ("us", "least_us"))
    print(f"{sum(r['count'] for r in timed)} launches of a step: {total / 1e3:.3g} ms one after the other, "
          f"{least / 1e3:.3g} ms at least")  # fmt: skip
    where = f"{host['device']}, {options.network}, batch {options.batch}, M = K = {options.members}"
    arch = device_arch(torch.empty(0, device=device)) or None
    if chosen := choices(rows, arch, where):
        print("faster than Triton, for the table of engine/dispatch.py:", *chosen, sep="\n    ")
    if options.dispatch:
        options.dispatch.write_text(json.dumps([asdict(r) for r in chosen], indent=1) + "\n")
    return 1 if len(timed) < len(rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
