"""Launching Triton kernels: where they run, and the seams at which a launch is recorded, wrapped or left out.

A kernel runs on CUDA tensors. Under ``TRITON_INTERPRET=1`` it can be run on CPU tensors too: inside ``use_kernels()``,
or everywhere with ``FASTENSDISTILL_KERNELS=interpret``.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastensdistill.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton: the kernels stay plain functions and every op runs its reference

    class _Absent:
        constexpr = Any

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return function or (lambda function: function)

        @staticmethod
        def constexpr_function(function: Any) -> Any:
            return function

    triton = tl = _Absent()

HAS_TRITON = hasattr(triton, "__version__")
# Arguments that follow from the batch size. Triton would compile a kernel anew where one is 1 or no multiple of 16;
# without that every batch size runs the same kernels, those that `engine.verify` has compared with the reference.
BATCH_SIZES = ["N", "n_partials", "n_rows", "n_splits", "positions", "steps"]

# What the contexts below put in force, the innermost last
_forced: list[bool] = []
_references: list[tuple[str, ...]] = []  # names of ops, () for all
_records: list[list["KernelLaunch"]] = []
_arounds: list["Around"] = []


class KernelLaunch(NamedTuple):
    """One kernel launch as the ops would do it: what the ahead-of-time report compiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None  # registers a thread may have; None leaves it to the compiler
    programs: int  # that a multiprocessor shall hold, 0 where nothing depends on it


Around = Callable[[KernelLaunch, Callable[[KernelLaunch], None]], None]


@contextlib.contextmanager
def _in_force(stack: list[Any], value: Any) -> Iterator[Any]:
    stack.append(value)
    try:
        yield value
    finally:
        stack.pop()


def use_kernels() -> contextlib.AbstractContextManager[Any]:
    """Run the Triton kernels on CPU tensors too, through Triton's interpreter (needs ``TRITON_INTERPRET=1``)."""
    return _in_force(_forced, True)


def references_only(*ops: str) -> contextlib.AbstractContextManager[Any]:
    """Within, the ops of these names (without any: all) run their references, on a GPU too."""
    return _in_force(_references, ops)


def record_launches() -> contextlib.AbstractContextManager[list[KernelLaunch]]:
    """Within, ops launch nothing: their results stay unwritten, and the launches are collected in the yielded list."""
    return _in_force(_records, [])


def around_launches(around: Around) -> contextlib.AbstractContextManager[Any]:
    """Within, ``around(launch, do)`` stands in the place of every launch.

    It calls ``do`` with the launch, or with one of other warps or stages; what was entered last is called first. This
    is how a diagnosis on a device logs, varies and repeats launches.
    """
    return _in_force(_arounds, around)


def kept_to_reference(op: str | None = None) -> bool:
    """Whether ``references_only`` is in force for ``op``, or without a name for all ops."""
    return bool(_references) and any(op in ops or not ops for ops in _references)


def runs_kernel(device: str, *dtypes: torch.dtype) -> bool:
    """Whether Triton kernels run for tensors of these dtypes on a ``device`` such as "cuda"; float64 has none.

    Raises InputError where they are asked for on the CPU without Triton's interpreter.
    """
    if not HAS_TRITON or torch.float64 in dtypes:
        return False
    if device == "cuda" or _records:
        return True
    if not (_forced or os.environ.get("FASTENSDISTILL_KERNELS") == "interpret"):
        return False
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError("kernels on CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the start")
    return True


@functools.cache
def _sources(kernel: Any) -> list[tuple[str, str]]:
    """What the kernel takes, and the field of a ``Tile`` or of an op's operands that it is, if no argument."""
    names = [str(name) for name in kernel.arg_names]
    return [(name, name if name.startswith("BLOCK_") else name.removeprefix("p_").lower()) for name in names]


def kernel_launch(kernel: Any, grid: tuple[int, ...], tile: Any, *operands: Any, **arguments: Any) -> KernelLaunch:
    """The launch of ``kernel`` with a ``Tile``'s warps, stages and registers.

    What the kernel takes and ``arguments`` lack is the tile's block size of that name, or the field of an op's
    ``operands``, NamedTuples: ``p_z`` is their z, ``RELU`` their relu.
    """
    fields = tile._asdict()
    for one in operands:
        fields |= one._asdict()
    for name, field in _sources(kernel):
        if name not in arguments:
            arguments[name] = fields[field]
    return KernelLaunch(kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.maxnreg, tile.programs)


def launch(kernel: Any, grid: tuple[int, ...], tile: Any, *operands: Any, **arguments: Any) -> None:
    """Do a :func:`kernel_launch`."""
    issue(kernel_launch(kernel, grid, tile, *operands, **arguments))


def issue(one: KernelLaunch) -> None:
    """Launch, or record; nothing is launched on an empty grid."""
    if 0 in one.grid:
        return
    if _records:
        _records[-1].append(one)
        return
    do = _launch
    for around in _arounds:
        do = functools.partial(_wrapped, around, do)
    do(one)


def _wrapped(around: Around, do: Callable[[KernelLaunch], None], one: KernelLaunch) -> None:
    around(one, do)


def _launch(one: KernelLaunch) -> None:
    device = next(value.device for value in one.arguments.values() if isinstance(value, Tensor))
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "maxnreg": one.maxnreg}
        one.kernel[one.grid](**one.arguments, **options)


def row_stride(rows: Tensor | None) -> int:
    """Elements from one slot's row to the next; 0 where all slots share one row."""
    return 0 if rows is None or rows.shape[0] == 1 else int(rows.shape[1])


def sizes(names: str, x: Tensor | None) -> dict[str, int]:
    """The sizes of x (G, N, height, width, channels) as a kernel takes them, such as "HR WR CR"; 0 without x."""
    return dict(zip(names.split(), (0, 0, 0) if x is None else x.shape[2:], strict=True))
