"""The torch-free driver of the wgmma kernels: built here, run on a device, its lines read.

    python -m bench.driver [--arch 90a]            builds ``bench/_driver``, which can be carried to a machine
    python -m bench.driver --run check|measure     runs it here, and prints what its lines say

It checks every form of descriptor and every kernel against a result on the CPU, says which layout of the input's tile
the device's unit reads rightly, and measures what the design rests on. Its lines are

    right NAME                               WRONG NAME: where, what it is, what was expected
    layout tile|copies|loads                 measured NAME VALUE UNIT
    uncovered NAME: why                      descriptors {...}

and its exit status is 0, 1 where something is wrong, 77 without a device.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import ROOT

SOURCES = (
    *(f"tests/kernels/wgmma_driver{part}.cpp" for part in ("", "_operands", "_conv", "_gradient")),
    *("tests/kernels/wgmma_driver_cuda.cu", "tests/kernels/sanitize_cuda.cpp", "csrc/tensor_map.cu"),
    *("csrc/wgmma_conv.cu", "csrc/wgmma_narrow.cu", "csrc/wgmma_weight_gradient.cu"),
)
BINARY = ROOT / "bench" / "_driver"
LAYOUTS = ("tile", "copies", "loads")
MEASURED = re.compile(r"measured (.+?) (-?[0-9.]+(?:e[-+]?\d+)?) (\S.*)")


def build(arch: str = "90a", binary: Path = BINARY) -> str:
    """Compile the driver for ``arch``: "" where it was built, else why it was not."""
    if nvcc := shutil.which("nvcc"):
        sources = [str(ROOT / name) for name in SOURCES if (ROOT / name).exists()]
        if len(sources) < len(SOURCES):
            return "its source is not part of this version"
        # a wait that does not end traps, after a second or so
        target = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-DFED_PATIENCE=2000000000", "-lineinfo", "-t0"]
        target += [f"-I{ROOT / folder}" for folder in ("csrc", "tests/kernels")] + ["-cudart=static"]
        done = subprocess.run([nvcc, "-std=c++17", "-O3", *target, *sources, "-o", str(binary)],
                              capture_output=True, text=True)  # fmt: skip
        lines = (done.stderr or done.stdout).strip().splitlines()
        return f"nvcc: {lines[-1] if lines else done.returncode}"[:300] if done.returncode else ""
    return "no nvcc"


def parse(text: str) -> dict[str, Any]:
    """What its lines say: ``right`` (how many), ``wrong``, ``layout``, ``measured`` (name → value and unit)."""
    lines = text.splitlines()
    layouts = [line.split()[1] for line in lines if line.startswith("layout ") and len(line.split()) == 2]
    matches = filter(None, map(MEASURED.fullmatch, lines))
    return {
        "right": sum(line.startswith("right ") for line in lines),
        "wrong": [line.removeprefix("WRONG ") for line in lines if line.startswith("WRONG ")],
        "layout": next((one for one in layouts if one in LAYOUTS), None),
        "measured": {match[1]: [float(match[2]), match[3]] for match in matches},
    }


def run(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Run it for at most ``limit`` seconds: what its lines say, and ``status``, which is its exit status or "hung"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, errors="replace")
        status: Any = done.returncode
        text, errors = done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        text, errors = ((one or b"").decode(errors="replace") for one in (error.stdout, error.stderr))
        status = "hung"
    except OSError as error:
        return parse("") | {"status": f"not started: {error.strerror or error}", "last": ""}
    last = next(iter((text + errors).strip().splitlines()[-1:]), "")
    return parse(text) | {"status": status, "last": last[:300]}


def stand_in(what: str, name: str = "all") -> list[str]:
    """A program that says what a right driver would: for a rehearsal."""
    lines = {"check": ["right descriptors", "layout tile"], "measure": [f"measured {name} 1 cycles"]}[what]
    return [sys.executable, "-c", f"print({chr(10).join(lines)!r})"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90a")
    parser.add_argument("--run", choices=["check", "measure"])
    options = parser.parse_args(argv)
    if options.run:
        found = run([str(BINARY), options.run], 120)
        print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
        return 0 if found["status"] == 0 else 1
    if reason := build(options.arch):
        print(f"not built: {reason}", file=sys.stderr)
        return 1
    print(BINARY)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
