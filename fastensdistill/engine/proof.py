"""Whether the wgmma kernels may run here: another process has to have proven them on this very device first.

    python -m fastensdistill.engine.proof [--device cuda]          prove again, and remember what came of it

A kernel that was only ever compiled can compute the wrong thing, crash, or wait for ever. None of that may happen to a
run, so ``python -m fastensdistill.kernels.prove`` tries them in a process of its own with a time limit, and whatever
ends otherwise than well means that Triton computes instead. Where the first layout of tiles is wrong, the one that is
right on every device is tried, and kept (``wgmma.in_copies``). The outcome is remembered in a file by the library, the
device, the driver and the version of PyTorch. ``FASTENSDISTILL_WGMMA=off`` refuses the kernels, ``trusted`` takes them
without a proof.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch

import fastensdistill
from fastensdistill.engine.parallel import anyone, from_first, processes, rank, together
from fastensdistill.errors import InputError, one_line, unknown
from fastensdistill.files import write_atomically
from fastensdistill.kernels import extension, wgmma

SWITCH, SWITCHED = "FASTENSDISTILL_WGMMA", ("off", "trusted")
LIMIT = 120.0  # seconds: PyTorch from a cold disk, the device's context, and small launches
COMMAND = (sys.executable, "-m", "fastensdistill.kernels.prove")
AGAIN = "python -m fastensdistill.engine.proof"
UNDONE, NONE = "not done", "none in this build for this device"
NOTHING = ""  # to say: there is nothing that could have been used


class Outcome(NamedTuple):
    """Of a proof."""

    trouble: str  # why the kernels are not proven, "" where they are
    copies: bool = False  # they are as long as they hold copies of tiles


# What was found, by device and whether by all processes: what one alone has found the others do not know.
_known: dict[tuple[torch.device, bool], str | None] = {}


def trouble(device: torch.device) -> str | None:
    """Why the wgmma kernels are not to be used on ``device``; None where they are, ``NOTHING`` where there are none.

    Answered once per process and device. The first time, of several processes all have to ask together, unless this
    one is for itself (``parallel.alone``): process 0 proves for those whose GPUs are of the same kind. Raises
    InputError for an unknown value of the switch.
    """
    if device.type != "cuda":
        return NOTHING
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    several = processes() > 1
    for key in ((device, True), *([] if several else [(device, False)])):
        if key in _known:
            return _known[key]
    _known[device, several] = found = _trouble(device)
    return found


def _trouble(device: torch.device) -> str | None:
    switch = os.environ.get(SWITCH, "")
    with together():
        if switch not in ("", *SWITCHED):
            raise unknown(f"value of {SWITCH}", switch, SWITCHED)
    own = identity(device)
    first, (found, copies) = from_first((own, _of_one(device, own, switch) if rank() == 0 else (None, False)))
    wgmma.keep_copies(wgmma.copies() or copies)
    if found is None and own != first:
        found = f"process {rank()} has another device or version than the one on which they were proven"
    return anyone(found)


def _of_one(device: torch.device, own: dict[str, str], switch: str) -> tuple[str | None, bool]:
    """The trouble, and whether the kernels are to hold copies."""
    major, minor = torch.cuda.get_device_capability(device)
    if not _any_built(10 * major + minor):
        return NOTHING, False
    if switch == "off":
        return f"{SWITCH}=off", False
    found = remembered(own)
    if switch == "trusted":
        return None, found is not None and found.copies
    if found is None:
        found = settle(device)
        remember(own, found)
    return found.trouble or None, found.copies


def _any_built(arch: int) -> bool:
    return any(wgmma.built(op, arch) for op in wgmma.KERNELS)


def advice(device: torch.device) -> str:
    """The same for a user: one line, or "" where nothing is to be said."""
    found = trouble(device)
    if not found:
        return ""
    if found.startswith(SWITCH):
        return f"Triton computes the convolutions: {found}"
    return (
        f"Triton computes the convolutions: the wgmma kernels were not proven on this device ({found}; again: {AGAIN})"
    )


def state(device: torch.device) -> str:
    """What is known of the kernels on ``device`` without finding out: proven, not proven and why, not tried."""
    major, minor = torch.cuda.get_device_capability(device)
    if not _any_built(10 * major + minor):
        return NONE
    if os.environ.get(SWITCH):
        return f"not asked about, {SWITCH}={os.environ[SWITCH]}"
    found = remembered(identity(device))
    if found is None:
        return f"not tried yet; the next run with the fused engine does, or {AGAIN}"
    if found.trouble:
        return f"not proven ({found.trouble}; again: {AGAIN})"
    return "proven, with copies of tiles" if found.copies else "proven"


def identity(device: torch.device) -> dict[str, str]:
    """What a proof is about: the library, the device, the driver, the version of PyTorch."""
    library = hashlib.sha256(extension.LIBRARY.read_bytes()).hexdigest() if extension.LIBRARY.exists() else ""
    return {
        "library": library, "device": torch.cuda.get_device_name(device), "driver": driver(),
        "torch": torch.__version__,
    }  # fmt: skip


def driver() -> str:
    """The version of NVIDIA's driver; what CUDA it is for where NVML cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # NVML raises its own errors
        return str(torch.version.cuda)


def cache_folder() -> Path:
    """Where outcomes are remembered: by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastensdistill"


def file_of(own: dict[str, str]) -> Path:
    """The file of one outcome."""
    return cache_folder() / f"wgmma-{hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]}.json"


def remembered(own: dict[str, str]) -> Outcome | None:
    """The outcome that was remembered for ``own``; None where there is none to read."""
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
        row = json.loads(file_of(own).read_text())
        if row.get("of") == own and isinstance(row.get("trouble"), str):
            return Outcome(row["trouble"], row.get("copies") is True)
    return None


def remember(own: dict[str, str], found: Outcome) -> None:
    """Keep an outcome; where nothing can be written it is found again by the next process."""
    with contextlib.suppress(InputError, OSError, RuntimeError):
        write_atomically(file_of(own), (json.dumps({"of": own} | found._asdict(), indent=1) + "\n").encode())


def settle(device: torch.device, echo: IO[str] | None = None) -> Outcome:
    """Prove the kernels; where something is wrong or ends the process, once more with copies."""
    found = prove(device, COMMAND, echo=echo)
    if found and not found.startswith(UNDONE) and not prove(device, [*COMMAND, "--copies"], echo=echo):
        return Outcome("", True)
    return Outcome(found)


def prove(device: torch.device, command: Sequence[str], limit: float = LIMIT, echo: IO[str] | None = None) -> str:
    """Run ``command`` for ``device`` in a process of its own: "" where it ends well, else how it ended, in one line.

    With ``echo`` what it prints is written there.
    """
    root = str(Path(fastensdistill.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        temporary = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
    except OSError as error:
        return one_line(f"nowhere to write to: {error.strerror or error}")
    with temporary as output:
        try:
            process = subprocess.Popen(
                [*command, "--device", str(device)], env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            return one_line(f"{command[0]} could not be started: {error.strerror or error}")
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # one inside the driver may not die at once
                    process.wait(5)
        output.seek(0)
        said = output.read()
    if echo is not None:
        echo.write(said)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1][-200:] if lines else "no output"
    if code is None:
        return one_line(f"{UNDONE} after {limit:.0f} s, last: {last}")
    if code < 0:
        names = {one.value: one.name for one in signal.Signals}
        return one_line(f"killed by {names.get(-code, f'signal {-code}')}, last: {last}")
    return one_line(f"exit status {code}, {last}") if code else ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 where the kernels are proven, 1 where not, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    if device.type != "cuda" or not torch.cuda.is_available():
        print(f"error: there is no CUDA device {device}", file=sys.stderr)
        return 2
    found = settle(device, sys.stdout)
    remember(identity(device), found)
    print(f"{torch.cuda.get_device_name(device)}: {state(device)}")
    return 1 if found.trouble else 0


if __name__ == "__main__":
    raise SystemExit(main())
