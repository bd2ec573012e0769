"""All kernels of the measured steps compiled at once, by many processes, before anything is launched or timed.

    python -m bench.gpu_run.warm [--networks wrn28_4] [--methods tdiv-sdiv] [--arch 90] [--workers N]

The steps are run with their launches recorded instead of done, on the CPU, a few images large: a kernel depends on the
shapes of a layer, not on the batch. Each distinct launch is compiled by Triton's own launch path (what it compiles
later has the same key in its cache), and so is the small C launcher that it builds for a kernel. No CUDA context is
made: processes can be forked, and a machine without a GPU does the same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import setting as setting_module
from bench.contenders import fused_engine
from bench.kernel_report import key
from bench.launches import prepare
from bench.setting import METHODS, NETWORKS, Setting, batches, drawn_pairs, make
from fastensdistill.kernels.launch import KernelLaunch, record_launches
from fastensdistill.kernels.tiles import assume_arch

IMAGES = 16
_launches: list[KernelLaunch] = []  # what the forked processes compile
_target: Any = None


def recorded(settings: Sequence[Setting], arch: int, dtype: torch.dtype = torch.bfloat16) -> list[KernelLaunch]:
    """The distinct launches of these steps, and of their launches one by one, on a GPU of capability ``arch``."""
    found: dict[str, KernelLaunch] = {}
    cpu = torch.device("cpu")
    for setting in settings:
        with unset():
            problem = make(setting, cpu)
        problem.config.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        given = batches(setting, 1, cpu, drawn_pairs(setting, 0, 1), torch.float32)
        with unset(), assume_arch(arch), record_launches() as launches:
            fused_engine(problem, capture=False)(given[0])
            if setting.method != "teach":
                for _ in prepare(setting, cpu, dtype):
                    pass
        for launch in launches:
            found.setdefault(key(launch), launch)
    return list(found.values())


@contextlib.contextmanager
def unset() -> Iterator[None]:
    """Networks with whatever weights and statistics PyTorch gives them: no launch depends on a value."""
    with mock.patch.object(setting_module, "settle"), mock.patch.object(torch.nn.init, "trunc_normal_"):
        yield


class Target:
    """A device as Triton's launch path sees it: a compute capability, and nothing that runs."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def processor_seconds() -> float:
    """Of this process and the compilers it has started: what a busy machine does not change."""
    return sum(os.times()[:4])


def _compile(index: int) -> tuple[int, float, float, str]:
    """Index, processor seconds for the kernel and for its launcher, and what went wrong."""
    import triton
    from triton.backends.nvidia import driver

    launch, began, compiled_at = _launches[index], processor_seconds(), 0.0
    try:
        triton.runtime.driver.set_active(_target)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.maxnreg}
        kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **options)
        compiled_at = processor_seconds()
        if hasattr(driver, "make_launcher"):  # Triton 3.8 has one launcher for all kernels, the driver's own
            driver.CudaLauncher(kernel.src, kernel.metadata)
        return index, compiled_at - began, processor_seconds() - compiled_at, ""
    except Exception as error:
        text = next(iter(str(error).splitlines()), "")
        return index, processor_seconds() - began, 0.0, f"{launch.kernel.__name__}: {type(error).__name__}: {text}"


@contextlib.contextmanager
def linkable() -> Iterator[None]:
    """A libcuda that launchers can be linked with where there is no driver: they are built, and never called."""
    from triton.backends.nvidia import driver

    try:
        driver.libcuda_dirs()
    except (AssertionError, OSError, subprocess.SubprocessError):
        pass
    else:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "libcuda.so.1"
        command = [os.environ.get("CC", "gcc"), "-shared", "-x", "c", "/dev/null", "-o", str(stub)]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
        before = os.environ.get("TRITON_LIBCUDA_PATH"), sys.getdlopenflags()
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        sys.setdlopenflags(os.RTLD_LAZY)  # of a driver's functions, which the stub lacks
        os.environ["LD_LIBRARY_PATH"] = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        driver.libcuda_dirs.cache_clear()
        import ctypes

        ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)  # by its name, for the launchers that ask for it
        try:
            yield
        finally:
            sys.setdlopenflags(before[1])
            driver.libcuda_dirs.cache_clear()
            if before[0] is None:
                del os.environ["TRITON_LIBCUDA_PATH"]
            else:
                os.environ["TRITON_LIBCUDA_PATH"] = before[0]


def compile_all(
    launches: Sequence[KernelLaunch], arch: int, workers: int, say: Callable[..., object] = lambda **row: None
) -> dict[str, Any]:
    """Compile all in forked processes; ``say(kernel=…, seconds=…, …)`` for each. The totals."""
    global _launches, _target
    _launches, _target = list(launches), Target(arch)
    began = time.perf_counter()
    kernels = launchers = 0.0
    errors: list[str] = []
    # the longest first, so that none of them is left for the end: convolutions
    order = sorted(range(len(launches)), key=lambda i: "conv" not in launches[i].kernel.__name__)
    try:
        with linkable(), ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            for index, kernel, launcher, error in pool.map(_compile, order):
                kernels, launchers = kernels + kernel, launchers + launcher
                name = launches[index].kernel.__name__
                failed = {"error": error} if error else {}
                say(kernel=name, processor_seconds=kernel, launcher_processor_seconds=launcher, **failed)
                if error:
                    errors.append(error)
    except BrokenProcessPool:  # a compiler that crashed: what is missing is compiled where it is launched
        errors.append("a process that compiled kernels died")
    return {
        "kernels": len(launches), "workers": workers, "seconds": time.perf_counter() - began,
        "kernel_processor_seconds": kernels, "launcher_processor_seconds": launchers, "errors": errors,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["wrn28_4"], choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=["tdiv-sdiv"], choices=METHODS)
    parser.add_argument("--members", type=int, default=4, help="M = K")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    began = time.perf_counter()
    settings = [Setting(n, m, IMAGES, options.members) for n in options.networks for m in options.methods]
    launches = recorded(settings, options.arch)
    print(f"{len(launches)} distinct kernels recorded in {time.perf_counter() - began:.1f} s")
    found = compile_all(launches, options.arch, options.workers)
    print(f"{found['seconds']:.1f} s on {options.workers} processes: {found['kernel_processor_seconds']:.1f} "
          f"processor seconds for kernels, {found['launcher_processor_seconds']:.1f} for launchers")  # fmt: skip
    for error in found["errors"]:
        print(error)
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
