"""What every benchmark shares: where it ran, interleaved timing, quantiles, energy, and the results file."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastensdistill.kernels import extension
from fastensdistill.kernels.launch import HAS_TRITON, triton

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def arguments(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options that all commands have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds, of which the median is taken")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: does everything run? No result.")
    return parser


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and set what the timings depend on."""
    options = parser.parse_args(argv)
    if options.smoke:
        options.device, options.rounds, options.threads = "cpu", 2, 1
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")  # tf32, where float32 is asked for at all
    torch.backends.cudnn.benchmark = True
    return options


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile."""
    return {"median": statistics.median(values), "p20": quantile(values, 0.2), "p80": quantile(values, 0.8)}


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    least: float = 0.0,
    *,
    after: Callable[[dict[str, list[float]]], object] = lambda times: None,
    lost: dict[str, str] | None = None,
    deadline: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds per call, one value per round: in a round everybody has a turn, so a drift of the clocks hits all alike.

    Every other round goes backwards, so that nobody always follows the same one (a library's threads may still spin).
    A turn repeats its call until ``least`` seconds have passed by the estimate of an untimed first turn. The device is
    waited for only at a turn's ends, as a training loop would. ``after`` is called with the times after every round.
    With ``lost``, a call that raises is left out from then on, and its error is put there; without, it ends all. After
    ``deadline`` (of ``time.monotonic``) no further round begins, but there are two at least.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats: dict[str, int] = {}

    def turn(name: str, count: int) -> float | None:
        """Seconds of one call of ``count``; None where it raised."""
        began = time.perf_counter()
        try:
            for _ in range(count):
                calls[name]()
            synchronize(device)
        except Exception as error:
            if lost is None:
                raise
            lost[name] = brief(error)
            return None
        return (time.perf_counter() - began) / count

    for name in calls:
        if turn(name, 1) is not None and (estimate := turn(name, 1)) is not None:
            repeats[name] = max(1, round(least / max(estimate, 1e-6)))
    for i in range(rounds):
        if i >= 2 and time.monotonic() > deadline:
            break
        for name in list(calls)[:: -1 if i % 2 else 1]:
            if name in repeats and name not in (lost or {}) and (seconds := turn(name, repeats[name])) is not None:
                times[name].append(seconds)
        after(times)
    return times


def brief(error: BaseException) -> str:
    """An exception in one line."""
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Within, cuDNN takes the algorithm it thinks best: a search costs seconds a shape in float64, and two searches may
    end with two algorithms, which do not agree bit for bit. It decorates a function, too."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def spoils_context(error: BaseException) -> bool:
    """Whether nothing on the device works any more after ``error``, so that the process has to end."""
    return isinstance(error, RuntimeError) and any(s in str(error) for s in ("CUDA error", "Triton Error [CUDA]"))


class Meter:
    """The GPU's own energy counter, driver and clocks, by NVML; every reading is None where it is not to be had."""

    def __init__(self, device: torch.device):
        self.handle, self.reason = None, "not a GPU"
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except Exception as error:  # NVML's errors are its own, and a benchmark does without energy
            self.reason = f"{type(error).__name__}: {error}"

    def read(self, name: str, *arguments: Any) -> Any:
        """One NVML query, ``nvmlDeviceGet…`` less that prefix."""
        if self.handle is None:
            return None
        try:
            return getattr(self.nvml, f"nvmlDeviceGet{name}")(self.handle, *arguments)
        except (self.nvml.NVMLError, AttributeError):  # its queries come and go with its versions
            return None

    def joules(self) -> float | None:
        millijoules = self.read("TotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def idle_watts(self, seconds: float = 3.0) -> float | None:
        """Power with nothing running, which belongs to no contender."""
        before, began = self.joules(), time.perf_counter()
        if before is None:
            return None
        time.sleep(seconds)
        after = self.joules()
        return None if after is None else (after - before) / (time.perf_counter() - began)

    def joules_per_call(
        self, call: Callable[[], object], device: torch.device, idle: float | None, seconds: float = 5.0
    ) -> float | None:
        """Over a window of at least ``seconds``, idle power subtracted."""
        if idle is None:
            return None
        synchronize(device)
        before, began, calls = self.joules(), time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for _ in range(10):
                call()
            synchronize(device)
            calls += 10
        after, passed = self.joules(), time.perf_counter() - began
        return None if before is None or after is None else (after - before - idle * passed) / calls

    def clocks(self) -> dict[str, Any]:
        if self.handle is None:
            return {}
        sm, memory = self.nvml.NVML_CLOCK_SM, self.nvml.NVML_CLOCK_MEM
        limit = self.read("EnforcedPowerLimit")
        return {
            "sm_mhz": self.read("ClockInfo", sm), "sm_max_mhz": self.read("MaxClockInfo", sm),
            "memory_mhz": self.read("ClockInfo", memory), "power_limit_w": None if limit is None else limit / 1000,
            "temperature_c": self.read("Temperature", 0),
        }  # fmt: skip


def commit() -> str:
    """The commit measured, "+" where tracked files differ from it, "unknown" outside a checkout.

    Where the history does not travel with the files, the environment says it: ``BENCH_COMMIT``.
    """
    if given := os.environ.get("BENCH_COMMIT"):
        return given

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=ROOT)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return "unknown" if not head else head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def driver_version() -> str | None:
    """Without NVML's Python package."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def describe_host(device: torch.device) -> dict[str, Any]:
    """Commit, device, driver, versions and clocks: what a number means nothing without."""
    host = {
        "commit": commit(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{processor()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None, "python": platform.python_version(),
        "extension": {name: extension.describe()[name] for name in ("loaded", "reason")},
    }  # fmt: skip
    if device.type == "cuda":
        meter = Meter(device)
        driver = meter.nvml.nvmlSystemGetDriverVersion() if meter.handle is not None else driver_version()
        properties = torch.cuda.get_device_properties(device)
        host |= {
            "device": properties.name, "capability": f"{properties.major}.{properties.minor}", "driver": driver,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "clocks": meter.clocks(),
        }  # fmt: skip
    return host


def save(path: Path | None, kind: str, host: dict[str, Any], smoke: bool, **content: Any) -> None:
    """One JSON per run. ``kind`` is the command's name."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kind": kind, "smoke": smoke, "host": host, **content}, indent=1) + "\n")


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as text; ``columns`` maps keys to headings, numbers to the right with three digits of precision."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "–" if value is None else str(value)

    cells = [list(columns.values())] + [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in columns]
    return "\n".join(
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )
