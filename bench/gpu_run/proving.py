"""The wgmma kernels before anything uses them: the driver's checks, then the proof that every run asks for.

Records: ``driver`` {right, wrong, layout, status}, ``proof`` {trouble, copies, said}. A layout that the driver or the
proof finds wrong becomes a remedy that the later stages obey; their steps use the kernels only where they are proven.
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
from typing import Any

import torch

from bench import driver
from bench.gpu_run.context import Context
from bench.gpu_run.remedies import NAME, Remedies
from fastensdistill.engine import proof
from fastensdistill.kernels import wgmma


def check_driver(context: Context, arch: int) -> None:
    """The driver as carried, else built here; no PyTorch in its process, and a barrier that waits for ever traps.

    First which layout the device reads rightly, then every kernel with that one in a single process, which is quick,
    and only where that process dies each in a process of its own.
    """
    if not context.rehearse:
        if arch != wgmma.ARCH:
            context.record.add("driver", left_out=f"compute capability {arch}")
            return
        if not driver.BINARY.exists() and (reason := driver.build()):
            context.record.add("driver", left_out=reason)
            return
    operands = run_driver(context, 0.3, "run", "operands")
    layout = operands["layout"] or "copies"
    kernels = run_driver(context, 0.4, "run", *names(context, layout))
    apart = None
    if kernels["status"] not in (0, 1):
        apart = run_driver(context, 0.9 - context.passed, "check")
    every = [operands, apart or kernels]
    context.record.add(
        "driver", layout=operands["layout"], right=sum(one["right"] for one in every),
        wrong=[line for one in every for line in one["wrong"]], status=every[-1]["status"], last=every[-1]["last"],
        died=kernels["status"] if apart else None, seconds=round(time.monotonic() - context.began, 1),
    )  # fmt: skip
    if layout == "copies":
        Remedies.extend(context.out / NAME, Remedies(copies=True))


def run_driver(context: Context, share: float, *words: str) -> dict[str, Any]:
    """Run it with these arguments for at most a ``share`` of the stage's time."""
    command = driver.stand_in("check") if context.rehearse else [str(driver.BINARY), *words]
    return driver.run(command, max(1.0, share * context.seconds))


def names(context: Context, layout: str) -> list[str]:
    """The driver's checks of kernels, those with ``layout``."""
    if context.rehearse:
        return []
    done = subprocess.run([str(driver.BINARY), "list"], capture_output=True, text=True, timeout=10)
    every = [name for name in done.stdout.splitlines() if name != "operands" and not name.startswith("measure ")]
    other = [one for one in driver.LAYOUTS if one != layout]
    return [name for name in every if name.split()[-1] not in other]


def prove(context: Context) -> None:
    """What ``engine.proof`` does before a run, here with what it prints; its outcome is kept for the later stages."""
    said = io.StringIO()
    if context.rehearse:
        command = [sys.executable, "-c", "print('right  stand-in'); print('all right')"]
        context.record.add("proof", trouble=proof.prove(context.device, command, 30, said), copies=False)
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if proof.state(device) == proof.NONE:
        context.record.add("proof", left_out=proof.NONE)
        return
    found = proof.settle(device, said)
    proof.remember(proof.identity(device), found)
    lines = said.getvalue().splitlines()
    print(said.getvalue())
    wrong = [line for line in lines if line.startswith("WRONG")]
    right = sum(line.startswith("right") for line in lines)
    context.record.add("proof", **found._asdict(), right=right, wrong=wrong[:20], last=lines[-1:])
    if found.copies:
        Remedies.extend(context.out / NAME, Remedies(copies=True))
