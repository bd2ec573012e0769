"""The stages that time: steps beside their peers, launches one by one, hardware counters of the slowest."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace

import torch

from bench import contenders, kernels, throughput
from bench.common import brief, interleave, quantile, spoils_context, spread, synchronize
from bench.contenders import CONTENDERS, fused_engine, how
from bench.gpu_run.context import Context
from bench.gpu_run.record import Row, read
from bench.launches import prepare
from bench.predictions import predicted, predicted_launch, predicted_wgmma
from bench.setting import Setting, batches, drawn_pairs, make
from fastensdistill.engine import proof
from fastensdistill.engine.dispatch import Dispatch
from fastensdistill.errors import InputError
from fastensdistill.kernels.tiles import device_arch
from fastensdistill.network.gpu import GPUS, Gpu

DISPATCH = "dispatch.json"
COUNTERS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "l1tex__throughput.avg.pct_of_peak_sustained_elapsed": "L1 %",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "programs by registers",
    "launch__occupancy_limit_shared_mem": "programs by shared memory",
    "launch__waves_per_multiprocessor": "waves",
}  # fmt: skip
MISSED = 0.25  # of a prediction
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats")
COUNTED = 3  # launches


def roof_of(context: Context) -> Gpu:
    """The card's roof as its stage measured it; without that, an H100's."""
    for row in read(context.record.path):
        if row["kind"] == "roof":
            return Gpu(row["name"], row["flops_per_second"], row["bytes_per_second"], "measured")
    return GPUS["h100"]


def expected_ms(context: Context, setting: Setting) -> float | None:
    """The step as predicted for this card before anything was measured."""
    name = roof_of(context).name
    card = "h200" if "H200" in name else "h100" if "H100" in name else None
    if card is None or context.rehearse or setting.method != "tdiv-sdiv":
        return None
    by_wgmma = proof.trouble(context.device) is None
    return prediction(context, lambda: predicted(setting.network, setting.batch, setting.members, card, by_wgmma))


def prediction(context: Context, predict: Callable[[], float | None]) -> float | None:
    """A prediction, which no measurement may fail for."""
    try:
        return predict()
    except Exception as error:
        context.record.add("no prediction", error=brief(error))
        return None


def first(context: Context, network: str = "", sizes: Sequence[int] = ()) -> None:
    """The fused engine alone, before anything that is slow to build. What proves it are the stages before this one."""
    roof = roof_of(context)
    for batch in sizes or context.sizes.batches:
        setting = context.setting(batch, network)
        began = time.perf_counter()
        problem = make(setting, context.device).copy(torch.float32, "fp32" if context.rehearse else "bf16")
        step = fused_engine(problem)
        given = batches(setting, 4, context.device, drawn_pairs(setting, 1, 4), torch.float32)
        call = throughput.cycle(step, given)
        call()
        synchronize(context.device)
        facts = {
            **setting.describe(), "contender": "fused", **how(step), "gate": "the stages before",
            "build_seconds": time.perf_counter() - began, "predicted_ms": expected_ms(context, setting),
        }  # fmt: skip
        context.record.add("built", **facts)

        def after(times: dict[str, list[float]], setting: Setting = setting, facts: Row = facts) -> None:
            seconds = spread(times["fused"])["median"]
            context.record.add(
                "throughput", **facts, title=f"fused engine, {facts['how']}", status="timed alone",
                seconds=seconds, rounds=len(times["fused"]), images_per_second=setting.images / seconds,
                p20=setting.images / quantile(times["fused"], 0.8), p80=setting.images / quantile(times["fused"], 0.2),
                tflops=setting.flops / seconds / 1e12, share_of_roof=setting.least_time(roof) / seconds,
            )  # fmt: skip

        interleave({"fused": call}, max(2, context.sizes.rounds // 3), context.device, context.sizes.turn, after=after)
        del step, problem, call, given
        throughput.memory(context.device)


def table(context: Context, names: Sequence[str], setting: Setting) -> None:
    """These contenders, gated and interleaved; a row is recorded whenever it changes."""
    said: dict[str, str] = {}
    roof = roof_of(context)
    expected = expected_ms(context, setting)

    def note(rows: list[Row]) -> None:
        for row in rows:
            text = json.dumps(row, default=str)
            if said.get(row["contender"]) != text:
                said[row["contender"]] = text
                context.record.add("throughput", **row, predicted_ms=expected)

    options = SimpleNamespace(
        contenders=list(names), rounds=context.sizes.rounds, turn=context.sizes.turn, energy=False
    )
    throughput.measure(setting, options, context.device, roof, context.deadline, note)


def compile_peer(context: Context) -> None:
    """The compiled peer's first step: what it compiles is then in the cache for the stage that times it."""
    setting = context.setting(context.sizes.batches[0])
    began = time.perf_counter()
    problem = make(setting, context.device).copy(torch.float32, "fp32" if context.rehearse else "bf16")
    step = CONTENDERS["compiled"].build(problem)
    step(batches(setting, 1, context.device, drawn_pairs(setting, 1, 1), torch.float32)[0])
    synchronize(context.device)
    context.record.add("compiled peer", seconds=time.perf_counter() - began)


def every_launch(context: Context) -> None:
    """Each distinct launch at full size, and, after each, the table of what is faster than its Triton kernel."""
    setting, roof = context.setting(context.sizes.batches[0]), roof_of(context)
    timer = kernels.timer(context.device, 20 if context.device.type == "cuda" else 2)
    arch = device_arch(torch.empty(0, device=context.device)) or None
    where = f"{roof.name}, {setting.network}, batch {setting.batch}, M = K = {setting.members}"
    context.record.add("kernels of", setting=setting.describe())
    rows: list[Row] = []
    missing = 0
    for index, (prepared, count) in enumerate(prepare(setting, context.device, context.dtype)):
        if time.monotonic() > context.deadline:
            missing += 1
            continue
        began = time.perf_counter()
        one = prepared
        expected = prediction(context, lambda: predicted_launch(one.launch, one.part, roof))  # noqa: B023
        by_wgmma = prediction(context, lambda: predicted_wgmma(one.launch, one.part, roof))  # noqa: B023
        facts = {"index": index, "launch": prepared.title, "pass": prepared.where, "op": prepared.launch.op,
                 "count": count, "predicted_us": expected, "wgmma_predicted_us": by_wgmma}  # fmt: skip
        try:
            with torch.no_grad():
                found = kernels.row(prepared, count, timer, roof, alone=False)
        except Exception as error:
            found = {"status": f"not timed: {brief(error)}"}
            if spoils_context(error):
                context.record.add("kernel", **facts, **found)
                raise
        rows.append(facts | found)
        context.record.add("kernel", **rows[-1], stage_seconds=time.perf_counter() - began)
        chosen = kernels.choices(rows, arch, where)
        (context.out / DISPATCH).write_text(json.dumps([asdict(r) for r in chosen], indent=1) + "\n")
    timed = [r for r in rows if "us" in r]
    context.record.add(
        "kernels", timed=len(timed), left_out=missing, sum_ms=sum(r["us"] * r["count"] for r in timed) / 1e3,
        predicted_ms=sum((r["predicted_us"] or 0.0) * r["count"] for r in timed) / 1e3,
        dispatch=[asdict(r) for r in kernels.choices(rows, arch, where)], misses=misses(rows),
    )  # fmt: skip


def misses(rows: Sequence[Row]) -> list[Row]:
    """Every time that is further than ``MISSED`` from its prediction, the dearest first."""
    found = []
    for row in rows:
        for by, measured, expected in (("triton", "us", "predicted_us"), ("wgmma", "wgmma", "wgmma_predicted_us")):
            us, predicted = row.get(measured), row.get(expected)
            if us and predicted and abs(us / predicted - 1) > MISSED:
                found.append({"launch": row["launch"], "by": by, "us": us, "predicted_us": predicted,
                              "ratio": us / predicted, "count": row["count"]})  # fmt: skip
    return sorted(found, key=lambda one: -abs(one["us"] - one["predicted_us"]) * one["count"])


def tuned(context: Context) -> None:
    """The step by the table that the launches gave, beside the present one."""
    contenders.tuned = Dispatch.load(context.out / DISPATCH)
    if not contenders.tuned.table:
        context.record.add("tuned", nothing="no launch is faster by cuDNN or CUDA than by Triton")
        return
    table(context, ["fused", "tuned"], context.setting(context.sizes.batches[0]))


def slowest(rows: Sequence[Row], count: int) -> list[Row]:
    """The launches that take most of a step, of the newest timing of each."""
    newest = {row["index"]: row for row in rows if row["kind"] == "kernel" and "us" in row}
    return sorted(newest.values(), key=lambda row: -row["us"] * row["count"])[:count]


def counters(context: Context) -> None:
    """Hardware counters of the slowest launches, in a process that the profiler starts."""
    chosen = slowest(read(context.record.path), COUNTED)
    profiler = shutil.which("ncu")
    if context.rehearse or profiler is None or not chosen:
        reason = "rehearsal" if context.rehearse else "no launch was timed" if profiler else "ncu is not installed"
        context.record.add("counters", left_out=reason, would_be=[row["launch"] for row in chosen])
        return
    indices = [str(row["index"]) for row in chosen]
    child = [sys.executable, "-m", "bench.gpu_run.stage", "some", "--out", str(context.out), "--launch", *indices]
    profile = [profiler, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    found: list[Row] = []
    # by name, and where the profiler does not know one of the names, by its own sections
    for asked in (["--metrics", ",".join(COUNTERS)], [word for name in SECTIONS for word in ("--section", name)]):
        done = subprocess.run([*profile, *asked, *child], capture_output=True, text=True, env=dict(os.environ))
        if found := read_counters(done.stdout):
            break
        lines = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        context.record.add("no counters", asked=asked[1][:60], error=lines[0][:200])
    context.record.add("counters", launches=[row["launch"] for row in chosen], kernels=found)


def read_counters(text: str) -> list[Row]:
    """The profiler's table, one row per kernel, under short names; a first row of units is left out."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    found = []
    for row in rows:
        if not (row.get("ID") or "").strip().isdigit():
            continue
        own: Row = {"kernel": row.get("Kernel Name")}
        for metric, name in COUNTERS.items():
            try:
                own[name] = float(str(row[metric]).replace(",", ""))
            except (KeyError, ValueError):
                continue
        found.append(own)
    return found


def some(context: Context, chosen: Sequence[int]) -> None:
    """Run these launches of the full-size step where the profiler is watching."""
    left, setting = set(chosen), context.setting(context.sizes.batches[0])
    for index, (prepared, _) in enumerate(prepare(setting, context.device, context.dtype)):
        if index in left:
            prepared.run()
            synchronize(context.device)
            torch.cuda.cudart().cudaProfilerStart()
            prepared.run()
            synchronize(context.device)
            torch.cuda.cudart().cudaProfilerStop()
            left.remove(index)
        if not left:
            return
    raise InputError(f"the step has no launches {sorted(left)}")
