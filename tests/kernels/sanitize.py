"""Builds the driver that runs every CUDA kernel of csrc without PyTorch, and runs it under compute-sanitizer.

    python -m tests.kernels.sanitize --build DIR            only builds; prints the program's path
    python -m tests.kernels.sanitize --build DIR --run      builds and runs it, by itself and under each tool there is

The program prints a line per launcher and exits with 0, with 1 where a result is wrong, with 77 without a device. It
links what it needs, so that it can be built on one machine and run on another: with PROGRAM in DIR nothing is built.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = "sanitize"
PARTS = ["driver", "rows", "packing", "halo"]
KERNELS = ["halo_conv", "logits", "pack", "perturb_step"]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
NO_DEVICE = 77


def find_nvcc() -> str | None:
    """Path of nvcc, or None."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


def build(folder: str | Path, arch: str = "90a", *, host: bool = False) -> Path:
    """The program in ``folder``, made there unless it is there; returns its path.

    ``arch`` is what nvcc compiles for. With ``host`` the kernels' bodies run on the CPU, to test the program itself.
    Raises subprocess.CalledProcessError where a compiler fails, with its words on stderr, and FileNotFoundError
    without one.
    """
    folder = Path(folder).resolve()
    program = folder / (f"{PROGRAM}_host" if host else PROGRAM)
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    backend = "host" if host else "cuda"
    sources = [ROOT / f"tests/kernels/sanitize_{name}.cpp" for name in (*PARTS, backend)]
    if host:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        command = [compiler, "-O2"]
    else:
        compiler = find_nvcc()
        command = [compiler, "-O3", "-lineinfo", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        sources += [ROOT / f"csrc/{name}.cu" for name in KERNELS]
    if compiler is None:
        raise FileNotFoundError("no g++ or c++" if host else "no nvcc, on PATH or in CUDA_HOME")
    objects = [folder / f"{source.name}.{backend}.o" for source in sources]

    def compile(source: Path, output: Path) -> None:
        subprocess.run(
            [*map(str, command), "-std=c++17", f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(output)], check=True
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile, sources, objects))
    unfinished = program.with_suffix(".part")
    subprocess.run([compiler, *objects, "-o", unfinished, *([] if host else ["-cudart=static"])], check=True)
    for made in objects:
        made.unlink()
    return unfinished.rename(program)


def run(program: Path, limit: float = 60) -> int:
    """By itself, then under each of compute-sanitizer's tools, each at most ``limit`` seconds; the worst exit status.

    Prints what they print, and a line about each. Without a device 77.
    """
    sanitizer = shutil.which("compute-sanitizer")
    commands = {"plain": [str(program)]}
    if sanitizer:
        # 9 tells a finding from a wrong result
        commands |= {tool: [sanitizer, "--tool", tool, "--error-exitcode", "9", str(program)] for tool in TOOLS}
    else:
        print("compute-sanitizer is not installed: the program runs by itself alone", flush=True)
    worst = 0
    for name, command in commands.items():
        began = time.monotonic()
        try:
            status = subprocess.run(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = 124
        told = "ok" if status == 0 else f"exit status {status}"
        print(f"{name}: {told}, {time.monotonic() - began:.1f} s", flush=True)
        if status == NO_DEVICE:
            return status
        worst = max(worst, abs(status))
    return worst


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, metavar="DIR", help="where the program is, or is made")
    parser.add_argument("--arch", default="90a", help="GPU architecture to compile for (90a)")
    parser.add_argument("--run", action="store_true", help="run it too")
    parser.add_argument("--limit", type=float, default=60, help="seconds that each run may take (60)")
    given = parser.parse_args(arguments)
    program = build(given.build, given.arch)
    print(program, flush=True)
    return run(program, given.limit) if given.run else 0


if __name__ == "__main__":
    sys.exit(main())
