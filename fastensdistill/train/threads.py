"""A hint where CPU training would be slow because too many threads compete."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch


def usable_cores() -> int:
    """Cores that this process may use: those of the machine, less what its affinity or a container's quota forbids."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, min(cores, math.ceil(quota))) if quota else cores


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The cores that a container's control group allows (version 2, else 1), None where it sets no limit."""
    try:
        if (root / "cpu.max").is_file():
            allowed, period = (root / "cpu.max").read_text().split()
        else:
            allowed, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(allowed) / int(period) if int(allowed) > 0 else None
    except (OSError, ValueError):  # "max"
        return None


def thread_hint(device: torch.device) -> str | None:
    """One line for a run on ``device`` that has more threads than cores, or shares its cores with others.

    Threads of one operation wait for the slowest: one that has to wait for a core holds up all the others.
    """
    if device.type != "cpu":
        return None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    threads, cores = torch.get_num_threads() * processes, usable_cores()
    wanted = max(1, cores // processes)
    if threads > max(cores, processes):
        return (f"{threads} threads on {cores} cores, which can be many times slower than one thread for each: set "
                f"OMP_NUM_THREADS={wanted}")  # fmt: skip
    try:
        load, machine = os.getloadavg()[0], os.cpu_count() or 1
    except (OSError, AttributeError):
        return None
    if threads > processes and load >= machine + 1 and "OMP_NUM_THREADS" not in os.environ:
        return (f"this machine is busy (load {load:.0f} on {machine} cores), so {threads} threads may wait for one "
                "another; OMP_NUM_THREADS=1 is often faster then")  # fmt: skip
    return None
