"""Images per second of whole training steps: the engines and their peers, interleaved in one process.

    python -m bench.throughput [--networks wrn28_4 resnet32] [--methods tdiv-sdiv] [--batches 128 512] [--members 4]
                               [--contenders fused eager compiled] [--minutes 9] [--json FILE] [--smoke]

Base images are counted: B a step whatever M and K (teacher training: M·B, every network has a batch of its own).
Nobody is timed who does not compute the step (``bench.contenders.Gate``). Medians over interleaved rounds with the
20th and 80th percentile; peak memory is what the contender adds; energy is the GPU's own counter over at least 5 s,
idle power subtracted; TFLOP/s count the least work (the plan's), and the roof is the plan's least time on the device as
measured in the same run. On a CPU everything is float32, and the fused engine, whose kernels would be interpreted, is
left out.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import contenders, roof
from bench.common import Meter, arguments, describe_host, interleave, quantile, save, start, synchronize, table
from bench.contenders import CONTENDERS, Contender, Gate, Step
from bench.setting import METHODS, NETWORKS, TITLES, Batch, Setting, batches, drawn_pairs, make
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.network.gpu import Gpu

COLUMNS = {
    "title": "step", "images_per_second": "images/s", "p20": "p20", "p80": "p80", "ratio": "ours faster by",
    "tflops": "TFLOP/s", "share_of_roof": "of roof", "peak_mib": "peak MiB", "joules_per_1000": "J/1000", "status": "",
}  # fmt: skip
OURS = ("fused", "tuned", "reference")


@dataclass
class Built:
    step: Step
    calls: Callable[[], object]
    row: dict[str, Any]
    held: int = 0


def cycle(step: Step, given: list[Batch]) -> Callable[[], object]:
    """One step on the next of ``given``."""
    order = itertools.cycle(given)
    return lambda: step(next(order))


def memory(device: torch.device) -> int:
    """Bytes that this process holds on the device, captured graphs' pools included."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def build(contender: Contender, gate: Gate, setting: Setting, device: torch.device) -> Built:
    """Build, check, warm up. The row's status is "timed", or says why not."""
    row = {**setting.describe(), "contender": contender.name, "title": contender.title, "status": "timed"}
    before, began = memory(device), time.perf_counter()
    precision = contender.precision if device.type == "cuda" else "fp32"
    problem = gate.problem.copy() if gate.at_size else make(setting, device)
    problem.config.precision = precision
    step = contender.build(problem)
    passed, row["errors"] = gate.check(contender, step if gate.at_size else None)
    row |= {"bounds": gate.bounds, "precision": precision}
    if not passed:
        row["status"] = "not timed: does not compute the step"
    pairs = drawn_pairs(setting, 1, 4)
    call = cycle(step, batches(setting, 4, device, pairs, torch.float32))
    if passed:
        call()
        synchronize(device)
    row["build_seconds"] = time.perf_counter() - began
    return Built(step, call, row, memory(device) - before)


def peak(built: Built, device: torch.device) -> float | None:
    """MiB: what the contender holds between steps, and what a step adds for a while."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    built.calls()
    synchronize(device)
    return (built.held + torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(setting: Setting, options: Any, device: torch.device, gpu: Gpu, deadline: float) -> list[dict[str, Any]]:
    """One row per contender."""
    rows: list[dict[str, Any]] = []
    running: list[Built] = []
    try:
        gate = Gate(setting, device)
    except torch.OutOfMemoryError:
        return [{**setting.describe(), "title": "everything", "contender": "", "status": "not timed: out of memory"}]
    for name in options.contenders:
        contender = CONTENDERS[name]
        row = {**setting.describe(), "contender": name, "title": contender.title}
        reason = contender.absent(setting.method, device.type)
        if reason is None and time.monotonic() > deadline:
            reason = "no time left"
        if reason is not None:
            rows.append(row | {"status": f"not timed: {reason}"})
            continue
        try:
            built = build(contender, gate, setting, device)
        except torch.OutOfMemoryError:
            rows.append(row | {"status": "not timed: out of memory"})
        except Exception as error:  # a peer that fails here is a row of the table, not the end of the run
            rows.append(row | {"status": f"not timed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"})
        else:
            rows.append(built.row)
            if built.row["status"] == "timed":
                running.append(built)
        memory(device)
    if running and options.rounds:
        finish(running, setting, options, device, gpu)
    return rows


def finish(running: list[Built], setting: Setting, options: Any, device: torch.device, gpu: Gpu) -> None:
    """Time who passed, interleaved, and fill their rows."""
    meter = Meter(device)
    for built in running:
        built.row["peak_mib"] = peak(built, device)
    names = {built.row["contender"]: built for built in running}
    least = 0.2 if device.type == "cuda" else 0.0
    times = interleave({name: built.calls for name, built in names.items()}, options.rounds, device, least)
    clocks = meter.clocks()  # right after the load, before they fall
    ours = [statistics.median(t) for name, t in times.items() if name in OURS]
    idle = meter.idle_watts() if options.energy else None
    for name, t in times.items():
        median, row, images = statistics.median(t), names[name].row, setting.images
        joules = meter.joules_per_call(names[name].calls, device, idle)
        row |= {
            "seconds": median, "images_per_second": images / median, "p20": images / quantile(t, 0.8),
            "p80": images / quantile(t, 0.2), "tflops": setting.flops / median / 1e12,
            "ratio": median / min(ours) if ours else None,
            "share_of_roof": setting.least_time(gpu) / median if device.type == "cuda" else None,
            "joules_per_1000": None if joules is None else 1000 * joules / images, "idle_watts": idle, "clocks": clocks,
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--networks", nargs="+", default=["wrn28_4"], choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=["tdiv-sdiv"], choices=METHODS)
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    parser.add_argument("--members", nargs="+", type=int, default=[4], help="M = K")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--dispatch", type=Path, help="table of bench.kernels, for the contender tuned")
    parser.add_argument("--minutes", type=float, default=60.0, help="build no further contender after that")
    parser.add_argument("--no-energy", dest="energy", action="store_false", help="skip the 5 s windows")
    options = start(parser, argv)
    if options.smoke:
        options.networks, options.methods = ["tiny"], list(METHODS)
        options.batches, options.members = [4], [2]
    contenders.tuned = Dispatch.load(options.dispatch) if options.dispatch else None
    device, deadline = torch.device(options.device), time.monotonic() + 60 * options.minutes
    host = describe_host(device)
    gpu, found = roof.measure(device, smoke=options.smoke, rounds=5)
    print(f"{host['device']}, torch {host['torch']}, commit {host['commit']}; {gpu.flops / 1e12:.3g} TFLOP/s "
          f"({found['dtype']}) and {gpu.bandwidth / 1e12:.3g} TB/s measured")  # fmt: skip
    every: list[dict[str, Any]] = []
    for network, method, batch, members in itertools.product(
        options.networks, options.methods, options.batches, options.members
    ):
        setting = Setting(network, method, batch, members)
        rows = measure(setting, options, device, gpu, deadline)
        every += rows
        print(f"\n{network}, {TITLES[method]}, batch {batch}, M = {members}, K = {setting.k}; "
              f"{setting.flops / setting.images / 1e9:.3g} GFLOP an image")  # fmt: skip
        print(table([row | {"status": row["status"].removeprefix("timed")} for row in rows], COLUMNS), flush=True)
        save(options.json, "throughput", host, options.smoke, roof=found, rounds=options.rounds, rows=every)
        gc.collect()
    failed = [row for row in every if "does not compute" in row["status"]]
    for row in failed:
        print(f"{row['title']}, {row['network']}, {row['method']}: {row['errors']}, allowed {row['bounds']}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
