"""What nvcc makes of the extension's CUDA kernels: rows for ``bench.kernel_report``, and failures for what must not be.

A spill, a stack frame, a local load or store, wgmma that the compiler serialised (C7510 and its kin), and a kernel for
wgmma without any are failures.
For every kernel: registers, barriers, shared memory that is fixed when it is compiled, tensor-core instructions, and
how many instructions a warp issues for one tile: those of the outermost loop with tensor-core instructions in it, each
counted once, and those of the innermost such loop. The kernels are grid-strided or persistent over tiles, so the
outermost loop is a tile; where a kernel has no such loop it is a tile itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import ROOT
from fastensdistill.kernels import wgmma

ARCHITECTURES = {80: "80", 90: "90a", 100: "100a"}  # compute capability → what the extension is built for
TENSOR_CORE = re.compile(r"\b(?:HGMMA|QGMMA|HMMA|UTC\w*MMA)\b")
TMA = re.compile(r"\b(?:UTMALDG|UTMASTG|UBLKCP)\b")
SERIALISED = re.compile(r"C75\d\d|wgmma\S* .*serializ", re.IGNORECASE)
HOPPER = "wgmma_"  # files of kernels for compute capability 9.0 alone
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
COLUMNS = {
    "arch": ("arch", 4), "regs": ("registers", 4), "spill": ("spills", 5), "stack": ("stack", 5),
    "bar": ("barriers", 3), "shared": ("shared", 6), "HGMMA": ("HGMMA", 5), "HMMA": ("HMMA", 4), "TMA": ("TMA", 3),
    "code": ("instructions", 6),
    "tile": ("tile instructions", 6), "mma": ("tile products", 4), "inner": ("inner instructions", 5),
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @property
    def target(self) -> int | None:
        """Where a branch goes, else None."""
        found = re.search(r"\bBRA\b.*?(?:`\(\S+\)|0x([0-9a-f]+))", self.text)
        return int(found[1], 16) if found and found[1] else None


def instructions(sass: str) -> dict[str, list[Instruction]]:
    """The functions of what ``cuobjdump -sass`` prints, without the padding behind their last branch to itself."""
    found: dict[str, list[Instruction]] = {}
    for line in sass.splitlines():
        if name := re.match(r"\s*Function : (\S+)", line):
            current = found.setdefault(name[1], [])
        elif one := LINE.match(line):
            current.append(Instruction(int(one[1], 16), one[2]))
    return {name: [i for i in code if not i.text.startswith("NOP")] for name, code in found.items()}


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops with tensor-core instructions, the largest first; the whole code where there are none."""
    back = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    bodies = [[i for i in code if first <= i.address <= last] for first, last in back if first is not None]
    found = sorted((body for body in bodies if products(body)), key=len, reverse=True)
    return found or [list(code)]


def products(code: Sequence[Instruction]) -> int:
    """Tensor-core instructions."""
    return count(TENSOR_CORE, code)


def count(what: re.Pattern[str], code: Sequence[Instruction]) -> int:
    return sum(bool(what.search(one.text)) for one in code)


def resources(said: str) -> dict[str, dict[str, int]]:
    """Of each entry function, from what ``ptxas -v`` says: registers, bytes of stack, spills and shared memory."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in said.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            name = entry[1]
            found[name] = {"registers": 0, "stack": 0, "spilled": 0, "shared": 0, "barriers": 0}
        elif other := re.search(r"Function properties for (\S+)", line):
            name = other[1]  # a function that was not inlined is none of ours, but its stack and spills would show
        if name not in found:
            continue
        for key, pattern in (
            ("registers", r"Used (\d+) registers"), ("stack", r"(\d+) bytes stack frame"),
            ("shared", r"(\d+) bytes smem"), ("barriers", r"used (\d+) barriers"),
        ):  # fmt: skip
            if number := re.search(pattern, line):
                found[name][key] = int(number[1])
        if spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[name]["spilled"] = int(spilled[1]) + int(spilled[2])
    return found


def row(
    name: str, code: Sequence[Instruction], used: dict[str, int], said: str, file: str, arch: int
) -> dict[str, Any]:
    """One kernel's row; ``said`` is all that the compiler said about its file."""
    outer, inner = loops(code)[0], loops(code)[-1]
    multiplies = products(code) > 0
    local = count(re.compile(r"\b(?:STL|LDL)\b"), code)
    warnings = [line.strip() for line in said.splitlines() if SERIALISED.search(line) and blamed(line, name)]
    found: dict[str, Any] = {
        "kernel": readable(name), "launch": file, "arch": arch, "tile": [None, None, None],
        "registers": used["registers"], "spills": local, "stack": used["stack"],
        "shared": used["shared"], "barriers": used["barriers"],
        "HGMMA": count(re.compile(r"\bHGMMA\b"), code), "HMMA": count(re.compile(r"\bHMMA\b"), code),
        "UTCMMA": count(re.compile(r"\bUTC\w*MMA"), code), "TMA": count(TMA, code), "instructions": len(code),
        "tile instructions": len(outer) if multiplies else None, "tile products": products(outer),
        "inner instructions": len(inner) if multiplies else None, "inner products": products(inner), "compiler": "nvcc",
    }  # fmt: skip
    broken = [f"{local} spill instructions"] * bool(local)
    broken += [f"{used['spilled']} bytes spilled"] * bool(used["spilled"] and not local)
    broken += [f"{used['stack']} bytes of stack"] * bool(used["stack"])
    broken += ["no HGMMA"] * (file.startswith(HOPPER) and not found["HGMMA"])
    return found | {"fails": broken + warnings[:1]}


def blamed(line: str, name: str) -> bool:
    """Whether a warning is about the kernel ``name``: it names it, or names none."""
    named = re.search(r"in (?:the )?function '?(\w+)'?", line)
    return named is None or named[1] == name


def readable(name: str) -> str:
    """A mangled name without its namespaces, in full where it cannot be read."""
    for tool in ("cu++filt", "c++filt"):
        if path := shutil.which(tool):
            text = subprocess.run([path, name], capture_output=True, text=True).stdout.strip()
            text = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::|fed::|_GLOBAL__\w+::", "", text)
            text = re.sub(r"\([^()]*\)(?=\d)", "", text)  # the casts of constants, as in (int)64
            return text.split("(")[0] or name
    return name


def compile_file(file: Path, arch: int) -> list[dict[str, Any]]:
    """The rows of a ``.cu`` file's kernels on one architecture. Raises RuntimeError where it does not compile."""
    target = ARCHITECTURES[arch]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas", "-v"]
        done = subprocess.run([*command, "-cubin", str(file), "-o", str(cubin)], capture_output=True, text=True)
        said = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"nvcc refuses {file.name} for sm_{target}: {said.strip().splitlines()[-1]}")
        sass = subprocess.run(["cuobjdump", "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    code = instructions(sass)
    # one that is left out on an architecture is a kernel of a few instructions
    return [row(name, code[name], used, said, file.name, arch) for name, used in resources(said).items()]


def missing() -> str:
    """Which of the tools is not there, "" where both are."""
    return next((tool for tool in ("nvcc", "cuobjdump") if shutil.which(tool) is None), "")


def report(arches: Sequence[int], say: Callable[[str], None], files: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """The rows of all of ``csrc/*.cu``, or of these ``files``; none where nvcc is missing, which is said."""
    if tool := missing():
        say(f"no {tool}: the CUDA kernels are left out")
        return []
    every = [(file, arch) for arch in arches for file in files or sorted((ROOT / "csrc").glob("*.cu"))]
    every = [(file, arch) for file, arch in every if arch == wgmma.ARCH or not file.name.startswith(HOPPER)]
    say(" ".join(f"{title:>{width}}" for title, (_, width) in COLUMNS.items()) + "  kernel")
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(lambda one: compile_file(*one), every):
            for one in found:
                rows.append(one)
                figures = " ".join(
                    f"{'' if one[name] is None else one[name]!s:>{width}}" for name, width in COLUMNS.values()
                )
                say(f"{figures}  {one['kernel']}" + "".join(f"  ← {broken}" for broken in one["fails"]))
    return rows
