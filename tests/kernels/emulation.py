"""The extension's ops with their CUDA kernels run on the CPU, block by block and thread by thread.

``emulation.cpp`` takes the place of csrc's .cu files: all else, from the operands' checks to the outputs, is the ops'
own C++. They are registered for a dispatch key that no tensor here has, so that calling them is up to the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastensdistill.kernels import (  # noqa: F401  (their ops)
    distillation_loss,
    diversity_seed,
    halo_conv,
    pack,
    perturb_step,
    wgmma_conv,
    wgmma_joint_conv,
    wgmma_weight_gradient,
)

ROOT = Path(__file__).parents[2]
# emulation_wgmma*.cpp: a file for each of csrc's wgmma_*.cu, with the same kernels
SOURCES = [*(set((ROOT / "csrc").glob("*.cpp")) - {ROOT / "csrc/tensors.cpp"})]
SOURCES += [*ROOT.glob("tests/kernels/emulation*.cpp"), *ROOT.glob("tests/kernels/wgmma_driver*.cpp")]
SOURCES.sort(key=lambda source: -source.stat().st_size)
KEY = "PrivateUse1"
folder = Path()  # of the test run, where the library is built: conftest.py sets it
# All that the extension implements
OPS = re.findall(r'library\.impl\("(\w+)"', "".join(source.read_text() for source in SOURCES))


def compiler() -> str:
    """Path of a C++ compiler."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert found, "the emulation needs a C++ compiler"
    return found


def _build(library: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-DFED_KEY={KEY}", f"-I{ROOT / 'csrc'}"]
    flags += ["-isystem", str(include), "-DTORCH_TARGET_VERSION=0x020a000000000000"]

    def compile(source: Path) -> str:
        output = library.with_name(f"{source.stem}.o")
        # What multiplies 64 by 256 by 16 is worth the machine's own instructions
        own = ["-O2", "-march=native"] if source.stem.startswith("emulation_wgmma") else []
        subprocess.run([compiler(), *flags, *own, "-c", source, "-o", output], check=True)
        return str(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, SOURCES))
    link = [f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-pthread", "-o", str(library)]
    subprocess.run([compiler(), "-shared", *objects, *link], check=True)


@functools.cache
def library() -> ctypes.CDLL:
    """Built once for all processes of a test run, and loaded."""
    with (folder / "emulation.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "emulation.so"
        if not path.exists():
            _build(path)
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def call(name: str, *operands: Any) -> Any:
    """The op once."""
    library()
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))
    return getattr(torch.ops.fastensdistill, name).default.redispatch(keys, *operands)


def both_ways(name: str, *operands: Any) -> tuple[Tensor, ...]:
    """The op with threads and blocks forwards, then backwards: the same bit by bit, or threads race in a phase.

    New memory starts as NaN. Returns the op's results or, where it has none, what it writes into, as it is afterwards;
    the operands themselves stay as they are.
    """
    schema = getattr(torch.ops.fastensdistill, name).default._schema
    written = [i for i, argument in enumerate(schema.arguments) if argument.alias_info is not None]
    runs: list[tuple[Tensor, ...]] = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for backwards in (False, True):
            library().walk_backwards(ctypes.c_bool(backwards))
            given = [x.clone() if i in written else x for i, x in enumerate(operands)]
            result = call(name, *given)
            results = (result,) if isinstance(result, Tensor) else result
            runs.append(tuple(given[i] for i in written) if written else tuple(results))
    finally:
        torch.use_deterministic_algorithms(before)
        library().walk_backwards(ctypes.c_bool(False))
    for one, other in zip(*runs, strict=True):
        same = torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        assert same, f"{name}: threads of a phase race"
    return runs[0]


def _in_place_of(name: str) -> Callable[..., Any]:
    def run(*operands: Any) -> Any:
        schema = getattr(torch.ops.fastensdistill, name).default._schema
        results = both_ways(name, *operands)
        if schema.returns:
            return results if len(schema.returns) > 1 else results[0]
        written = [x for x, argument in zip(operands, schema.arguments, strict=True) if argument.alias_info is not None]
        for operand, result in zip(written, results, strict=True):
            operand.copy_(result)

    return run


@contextlib.contextmanager
def hopper(*, swizzle_offsets: bool = False, multiprocessors: int = 3) -> Iterator[None]:
    """Within, what kernels of wgmma find: operands swizzled by their own offsets, and so many multiprocessors."""
    library().swizzle_offsets(ctypes.c_bool(swizzle_offsets))
    library().use_multiprocessors(ctypes.c_int(multiprocessors))
    try:
        yield
    finally:
        library().swizzle_offsets(ctypes.c_bool(False))
        library().use_multiprocessors(ctypes.c_int(3))


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within, the extension's ops run both ways on CPU tensors, as its CUDA kernels do on a device."""
    with torch.library._scoped_library("fastensdistill", "IMPL") as implementations:
        for name in OPS:
            implementations.impl(name, _in_place_of(name), "CPU")
        yield
