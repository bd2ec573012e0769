"""The wgmma kernels before anything uses them: the driver's checks, then the proof that every run asks for.

Records: ``driver`` {right, wrong, layout, status}, ``proof`` {trouble, copies, said}. A layout that the driver or the
proof finds wrong becomes a remedy that the later stages obey; their steps use the kernels only where they are proven.
"""

from __future__ import annotations

import io
import sys

import torch

from bench import driver
from bench.gpu_run.context import Context
from bench.gpu_run.remedies import NAME, Remedies
from fastensdistill.engine import proof
from fastensdistill.kernels import wgmma


def check_driver(context: Context, arch: int) -> None:
    """The driver as carried, else built here; no PyTorch in its process, and a barrier that waits for ever traps."""
    if context.rehearse:
        command = driver.stand_in("check")
    elif arch != wgmma.ARCH:
        context.record.add("driver", left_out=f"compute capability {arch}")
        return
    else:
        if not driver.BINARY.exists() and (reason := driver.build()):
            context.record.add("driver", left_out=reason)
            return
        command = [str(driver.BINARY), "check"]
    found = driver.run(command, 0.8 * context.seconds)
    context.record.add("driver", **found)
    if found["layout"] == "copies":
        Remedies.extend(context.out / NAME, Remedies(copies=True))


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
