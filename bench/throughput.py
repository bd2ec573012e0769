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
from bench.common import (
    Meter,
    arguments,
    brief,
    describe_host,
    interleave,
    quantile,
    save,
    start,
    synchronize,
    table,
)
from bench.contenders import CONTENDERS, Contender, Gate, Step, how
from bench.setting import METHODS, NETWORKS, TITLES, Batch, Setting, batches, drawn_pairs, make
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.network.gpu import Gpu

COLUMNS = {
    "title": "step", "images_per_second": "images/s", "p20": "p20", "p80": "p80", "ratio": "ours faster by",
    "tflops": "TFLOP/s", "share_of_roof": "of roof", "peak_mib": "peak MiB", "joules_per_1000": "J/1000", "status": "",
}  # fmt: skip
FUSED = ("fused", "fused-triton", "tuned", "fused-launched")
OURS = (*FUSED, "reference")


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
    row |= how(step)
    if contender.name in FUSED and row["how"] not in row["title"]:
        row["title"] += f", {row['how']}"
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


Note = Callable[[list[dict[str, Any]]], object]


class Table:
    """The rows of one setting, and who is timed. ``note`` is given all rows whenever one of them has changed."""

    def __init__(self, setting: Setting, options: Any, device: torch.device, gpu: Gpu, deadline: float, note: Note):
        self.setting, self.options, self.device, self.gpu = setting, options, device, gpu
        self.deadline, self.note = deadline, note
        self.rows: list[dict[str, Any]] = []
        self.running: dict[str, Built] = {}
        self.meter = Meter(device)

    def add(self, contender: Contender, gate: Gate) -> None:
        """Build and check one; whatever it raises is its row's status."""
        row = {**self.setting.describe(), "contender": contender.name, "title": contender.title}
        reason = contender.absent(self.setting.method, self.device.type)
        if reason is None and time.monotonic() > self.deadline:
            reason = "no time left"
        if reason is None:
            try:
                built = build(contender, gate, self.setting, self.device)
                row = built.row
                if row["status"] == "timed":
                    self.time_alone(built)
                    self.running[contender.name] = built
            except torch.OutOfMemoryError:
                reason = "out of memory"
            except Exception as error:  # a peer that fails here is a row of the table, not the end of the run
                reason = brief(error)
        if reason is not None:
            row["status"] = f"not timed: {reason}"
        self.rows.append(row)
        self.note(self.rows)
        memory(self.device)

    def time_alone(self, built: Built) -> None:
        """A first number, which stands if nothing later is reached."""
        times = interleave({"it": built.calls}, 3, self.device, 0.05 if self.device.type == "cuda" else 0.0)["it"]
        self.fill(built.row, times)

    def fill(self, row: dict[str, Any], times: list[float]) -> None:
        median, images = statistics.median(times), self.setting.images
        row |= {
            "seconds": median, "rounds": len(times), "images_per_second": images / median,
            "p20": images / quantile(times, 0.8), "p80": images / quantile(times, 0.2),
            "tflops": self.setting.flops / median / 1e12,
            "share_of_roof": self.setting.least_time(self.gpu) / median if self.device.type == "cuda" else None,
        }  # fmt: skip

    def time(self, names: Sequence[str]) -> None:
        """Time these, interleaved, and fill their rows after every round."""
        names = [name for name in names if name in self.running]
        if not names or not self.options.rounds:
            return
        for name in names:
            self.running[name].row["peak_mib"] = peak(self.running[name], self.device)
        lost: dict[str, str] = {}
        fresh = [name for name in names if "ratio" not in self.running[name].row]  # others keep their earlier rounds

        def after(times: dict[str, list[float]]) -> None:
            ours = [statistics.median(t) for name, t in times.items() if name in OURS and t]
            for name in fresh:
                if times[name]:
                    self.fill(self.running[name].row, times[name])
                    ratio = statistics.median(times[name]) / min(ours) if ours else None
                    self.running[name].row |= {"ratio": ratio, "beside": names}
            self.note(self.rows)

        turn = getattr(self.options, "turn", 0.2) if self.device.type == "cuda" else 0.0
        calls = {name: self.running[name].calls for name in names}
        interleave(calls, self.options.rounds, self.device, turn, after=after, lost=lost, deadline=self.deadline)
        clocks = self.meter.clocks()  # right after the load, before they fall
        idle = self.meter.idle_watts() if self.options.energy else None
        for name in fresh:
            row = self.running[name].row
            row["clocks"], row["idle_watts"] = clocks, idle
            if name in lost:
                row["status"] = f"not timed to the end: {lost[name]}"
            elif (joules := self.meter.joules_per_call(calls[name], self.device, idle)) is not None:
                row["joules_per_1000"] = 1000 * joules / self.setting.images
        self.note(self.rows)


def measure(
    setting: Setting, options: Any, device: torch.device, gpu: Gpu, deadline: float, note: Note = lambda rows: None
) -> list[dict[str, Any]]:
    """One row per contender, ours first; ``note`` gets the rows after every build and every round.

    Who may run out of time or memory comes when the others have their numbers, one at a time, beside ours.
    """
    table = Table(setting, options, device, gpu, deadline, note)
    try:
        gate = Gate(setting, device)
    except Exception as error:
        reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else brief(error)
        row = {**setting.describe(), "title": "everything", "contender": "", "status": f"not timed: the gate: {reason}"}
        note([row])
        return [row]
    chosen = [CONTENDERS[name] for name in sorted(options.contenders, key=lambda name: name not in OURS)]
    for contender in chosen:
        if not contender.apart:
            table.add(contender, gate)
    table.time(list(table.running))
    for contender in chosen:
        if contender.apart:
            for name in [name for name in table.running if name not in OURS]:
                del table.running[name]
            memory(device)
            table.add(contender, gate)
            if contender.name in table.running:
                table.time(list(table.running))
    return table.rows


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

        def note(rows: list[dict[str, Any]]) -> None:
            rows = every + rows  # noqa: B023  (called before the next setting begins)
            save(options.json, "throughput", host, options.smoke, roof=found, rounds=options.rounds, rows=rows)

        every += (rows := measure(setting, options, device, gpu, deadline, note))
        print(f"\n{network}, {TITLES[method]}, batch {batch}, M = {members}, K = {setting.k}; "
              f"{setting.flops / setting.images / 1e9:.3g} GFLOP an image")  # fmt: skip
        print(table([row | {"status": row["status"].removeprefix("timed")} for row in rows], COLUMNS), flush=True)
        note([])
        gc.collect()
    failed = [row for row in every if "does not compute" in row["status"]]
    for row in failed:
        print(f"{row['title']}, {row['network']}, {row['method']}: {row['errors']}, allowed {row['bounds']}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
