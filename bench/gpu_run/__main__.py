"""Proof and measurements on a bare CUDA machine, in two calls of at most seven and five minutes.

    python -m bench.gpu_run --call A --out DIR [--commit SHA] [--packages DIR]
    python -m bench.gpu_run --call B --out DIR
    python -m bench.gpu_run --rehearse --out DIR [--call B] [--plant FAULT …]

A is: is it right, first numbers, the table beside the peers, every launch timed. B is the second network, the batch of
the paper, the extension, 4 and 8 warps, hardware counters. ``--call long`` needs an hour: all tests, the other methods,
PyTorch's search, loaders, scaling. ``--plan`` prints the stages with their expected seconds and runs nothing.

Needed there: Python with torch, Triton and numpy, PyYAML, Pillow, safetensors, scikit-learn and nvidia-ml-py as the
package has them, a C compiler for Triton, nvcc where the extension is not carried; pytest for the stages csrc and tests
(left out without it); neither rich nor matplotlib. Carry, if you can: the extension built here for that card
(``TORCH_CUDA_ARCH_LIST=9.0a python setup.py build_ext --inplace``; it has no Python in it), missing packages in a
folder (``--packages``), and for a second start the ``caches.tgz.*`` of the first (``--caches DIR``).

Every number is in DIR/results.jsonl the moment it exists; DIR/log has each stage's output. Stages run in processes of
their own under limits of their own: one that hangs, dies or spoils the CUDA context costs itself. What is wrong is
diagnosed by the run (which launch, which tile, first wrong buffer, which capture), a remedy is looked for, and the step
is timed with it. A rehearsal does the same on a CPU with tiny sizes; faults planted in it are ``launch`` (wrong numbers
unless with 8 warps), ``launch-dies``, ``launch-hangs``, ``step`` (wrong in the whole step only), ``captured`` (wrong in
a replay), ``uncapturable``, and of a stage ``hang=first``, ``kill=table``, ``raise=smoke``, ``memory=table``.

Exit status: 0 when every stage has been accounted for, whatever it found; 2 for a wrong argument; 3 without a device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu_run.findings import findings, summary, text_table
from bench.gpu_run.record import Record, read
from bench.gpu_run.stages import (
    CALLS,
    FAULTS,
    FAULTS_OF_STAGES,
    NO_DEVICE,
    RESULTS,
    STAGES,
    WITH_PEERS,
    Stage,
    of_call,
    stated,
)

ROOT = Path(__file__).resolve().parent.parent.parent
REHEARSAL = {"limit": 100, "hang": 15, "stall": 40, "seconds": 290}
RESERVED = 12.0  # seconds kept for packing


@dataclass
class Started:
    stage: Stage
    process: subprocess.Popen[bytes]
    began: float
    limit: float
    attempt: int = 1
    wall: float = field(default_factory=time.time)
    ended: float = 0.0  # when it was seen to have ended, while another was waited for


@dataclass
class Run:
    """The parent: it imports nothing that could touch a device."""

    options: argparse.Namespace
    record: Record
    began: float = field(default_factory=time.monotonic)
    started: dict[str, Started] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.options.out

    def left(self, stage: Stage) -> float:
        if not self.options.seconds:
            return float("inf")
        passed = time.monotonic() - self.began
        return self.options.seconds - passed - (0 if stage.name == "pack" else RESERVED)

    def limit(self, stage: Stage) -> float:
        if not self.options.rehearse:
            return min(stage.limit, self.left(stage))
        hangs = f"hang={stage.name}" in self.options.plant
        return min(REHEARSAL["hang"] if hangs else REHEARSAL["limit"], self.left(stage))

    def environment(self, stage: Stage) -> dict[str, str]:
        caches = self.out / "caches"
        found = dict(os.environ)
        path = filter(None, [str(ROOT), self.options.packages, os.environ.get("PYTHONPATH")])
        found |= {
            "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(caches / "triton"), "XDG_CACHE_HOME": str(caches / "proofs"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        }  # fmt: skip
        if self.options.commit:
            found["BENCH_COMMIT"] = self.options.commit
        if stage.name.startswith("warm"):
            found["TRITON_STORE_BINARY_ONLY"] = "1"
        found.pop("TRITON_INTERPRET", None)
        if self.options.rehearse and stage.restarts:
            found["TRITON_INTERPRET"] = "1"
        return found

    def do(self, stage: Stage) -> None:
        """Start one, and wait for it unless it goes on in the background."""
        for name in stage.after:
            self.finish(name)
        if reason := self.reason_against(stage):
            if not stage.when or reason != "not called for":
                self.ended(stage, f"left out: {reason}", 0.0)
            return
        self.started[stage.name] = self.start(stage)
        if not stage.background:
            self.finish(stage.name)

    def reason_against(self, stage: Stage) -> str:
        if stage.when and stage.when not in findings(read(self.record.path)):
            return "not called for"
        if bad := [name for name in stage.needs if self.status.get(name, "ok") != "ok"]:
            return f"{bad[0]} did not end well"
        return "no time left" if self.left(stage) < 3 else ""

    def start(self, stage: Stage, attempt: int = 1) -> Started:
        limit = self.limit(stage)
        command = [sys.executable, "-m", "bench.gpu_run.stage", stage.name, "--out", str(self.out),
                   "--seconds", str(round(limit, 1))]  # fmt: skip
        command += ["--rehearse"] if self.options.rehearse else []
        command += ["--plant", *self.options.plant] if self.options.plant else []
        log = self.out / "log"
        log.mkdir(exist_ok=True)
        with (log / f"{stage.name}.txt").open("ab") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment(stage), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Started(stage, process, time.monotonic(), limit, attempt)

    def finish(self, name: str) -> None:
        """Wait for a stage that was started; start it again where it knows how to go on."""
        while name in self.started:
            one = self.started.pop(name)
            status = self.wait(one)
            seconds = (one.ended or time.monotonic()) - one.began
            recorded = any(row["stage"] == name and row["at"] > one.wall for row in read(self.record.path))
            again = status != "ok" and recorded and one.attempt <= one.stage.restarts and self.left(one.stage) > 10
            self.ended(one.stage, status, seconds, one.attempt, again)
            if again:
                self.started[name] = self.start(one.stage, one.attempt + 1)

    def wait(self, one: Started) -> str:
        stall = (REHEARSAL["stall"] if self.options.rehearse else one.stage.stall) if one.stage.stall else 0
        while True:
            for other in self.started.values():
                if not other.ended and other.process.poll() is not None:
                    other.ended = time.monotonic()
            try:
                code = one.process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                if now - one.began > one.limit:
                    self.kill(one)
                    return f"ended after {one.limit:.0f} s"
                if stall and now - self.last_sign(one) > stall:
                    self.kill(one)
                    return f"hung: no record for {stall} s"
                continue
            self.kill(one)  # what it may have left running
            if code == 0:
                return "ok"
            return f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else self.failure(one, code)

    def last_sign(self, one: Started) -> float:
        """When the stage last recorded something, by this process's clock."""
        rows = [row["at"] for row in read(self.record.path) if row["stage"] == one.stage.name]
        return max([one.began, *(time.monotonic() - (time.time() - at) for at in rows[-1:])])

    @staticmethod
    def kill(one: Started) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()

    def failure(self, one: Started, code: int) -> str:
        if code == NO_DEVICE:
            return "no CUDA device"
        lines = (self.out / "log" / f"{one.stage.name}.txt").read_text(errors="replace").strip().splitlines()
        return f"failed: {lines[-1][:160]}" if lines else f"exit status {code}"

    def ended(self, stage: Stage, status: str, seconds: float, attempt: int = 1, again: bool = False) -> None:
        self.status[stage.name] = status
        more = {"attempt": attempt, "started_again": again} if attempt > 1 or again else {}
        self.record.add("stage", name=stage.name, status=status, seconds=round(seconds, 1), **more)
        print(f"[{time.monotonic() - self.began:5.0f} s]  {stage.name:13} {seconds:6.1f} s  {status}"
              f"{', started again' if again else ''}", flush=True)  # fmt: skip


def chosen(options: argparse.Namespace) -> tuple[Stage, ...]:
    if not options.stages:
        return of_call(options.call)
    return tuple(stage for stage in STAGES if stage.name in options.stages)


def carry_in(options: argparse.Namespace) -> None:
    """Caches of an earlier run, and its extension where there is none."""
    pieces = sorted(options.caches.glob("caches.tgz.*"), key=lambda path: int(path.suffix[1:]))
    archive = options.out / "carried.tgz"
    with archive.open("wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    with tarfile.open(archive) as tar:
        tar.extractall(options.out, filter="data")
    archive.unlink()
    package = ROOT / "fastensdistill" / "kernels"
    for file in (options.out / "caches" / "extension").glob("*"):
        if not (package / file.name).exists():
            shutil.copy2(file, package)


def show_plan(stages: Sequence[Stage], call: str) -> None:
    rows = []
    for s in stages:
        does = s.does + (f" (only if: {s.when})" if s.when else "") + (" (meanwhile)" if s.background else "")
        rows.append({"stage": s.name, "expected": s.expected, "limit": s.limit, "does": does})
    print(*text_table(rows, {"stage": "stage", "expected": "expected s", "limit": "limit s", "does": "does"}), sep="\n")
    print(f"expected in all: {stated(stages):.0f} s{f' of {CALLS[call]}' if CALLS[call] else ''} (an estimate)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--call", choices=CALLS, default="A")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_run", help="folder of the results")
    parser.add_argument("--stages", nargs="+", choices=[s.name for s in STAGES], metavar="STAGE", help="only these")
    parser.add_argument("--seconds", type=float, help="for all of them; by default the call's")
    parser.add_argument("--commit", default="", help="what is measured, where the history does not travel")
    parser.add_argument("--packages", default="", help="folder of Python packages that the machine lacks")
    parser.add_argument("--caches", type=Path, help="folder with the caches.tgz.* of an earlier run")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, with stand-ins: no result")
    parser.add_argument("--plant", nargs="+", default=[], help="faults, in a rehearsal")
    parser.add_argument("--plan", action="store_true", help="print the stages and their times, run nothing")
    options = parser.parse_args(argv)
    stages = chosen(options)
    if options.plan:
        show_plan(stages, options.call)
        return 0
    if options.plant and not options.rehearse:
        parser.error("--plant is for a rehearsal: faults are not planted in a measurement")
    for plant in options.plant:
        fault, _, name = plant.partition("=")
        places = WITH_PEERS if fault == "memory" else [s.name for s in STAGES]
        if not (plant in FAULTS or (fault in FAULTS_OF_STAGES and name in places)):
            parser.error(f"--plant {plant}: expected {', '.join(FAULTS)}, or one of {', '.join(FAULTS_OF_STAGES)} with "
                         f"=STAGE (memory: {', '.join(WITH_PEERS)})")  # fmt: skip
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.caches:
        carry_in(options)
    if options.seconds is None:
        options.seconds = REHEARSAL["seconds"] if options.rehearse else CALLS[options.call]
    record = Record(options.out / RESULTS, "run")
    record.add(
        "run", call=options.call, rehearsal=options.rehearse, plants=options.plant, commit=options.commit or None,
        seconds=options.seconds, stages={s.name: s.expected for s in stages}, stated_seconds=round(stated(stages), 1),
        python=sys.version.split()[0], free_bytes=shutil.disk_usage(options.out).free,
    )  # fmt: skip
    run = Run(options, record)
    for stage in stages:
        run.do(stage)
        if run.status.get("device") == "no CUDA device":
            print("there is no CUDA device here; --rehearse runs without one")
            return 3
    for name in list(run.started):
        run.finish(name)
    record.add("end", seconds=round(time.monotonic() - run.began, 1))
    print(f"\n{'REHEARSAL, NO RESULT. ' if options.rehearse else ''}{record.path}")
    print(*summary(read(record.path)), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
