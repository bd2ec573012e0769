"""What the Triton ops share: when a kernel runs instead of its reference, checks of shapes and sizes, 1-bit ReLU masks.

An op runs its kernel on CUDA tensors and its reference on all others. Under ``TRITON_INTERPRET=1`` the kernels can be
run on CPU tensors too: inside ``use_kernels()``, or everywhere with ``FASTENSDISTILL_KERNELS=interpret``.
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastensdistill.errors import InputError, unknown
from fastensdistill.kernels.extension import PORTABLE

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
except ImportError:  # a platform without Triton: the kernels stay plain functions and every op runs its reference

    class _Absent:
        constexpr = Any

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return function or (lambda function: function)

    triton = tl = _Absent()

    class TritonError(Exception):  # type: ignore[no-redef]  # never raised
        pass


HAS_TRITON = hasattr(triton, "__version__")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_NAMES = {str(t).removeprefix("torch."): t for t in (*KERNEL_DTYPES, torch.float64)}
PRECISIONS = ("ieee", "tf32")
# Arguments that follow from the batch size. Triton would compile a kernel anew where one is 1 or no multiple of 16;
# without that every batch size runs the same kernels, those that `engine.verify` has compared with the reference.
BATCH_SIZES = ["N", "n_partials", "n_rows", "n_splits", "positions", "steps"]
_LIMIT = 2**31

_forced = False
_recorded: list["Launch"] | None = None
_arounds: list["Around"] = []
_references: list[tuple[str, ...]] = []  # names of ops per ``references_only`` in force, () for all


class Launch(NamedTuple):
    """One kernel launch as the ops would do it: what the ahead-of-time report compiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None  # registers a thread may have; None leaves it to the compiler
    programs: int  # that a multiprocessor shall hold, 0 where nothing depends on it


Around = Callable[[Launch, Callable[[Launch], None]], None]


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Within, ops launch nothing: their results stay unwritten, and the launches are collected in the yielded list."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@contextlib.contextmanager
def around_launches(around: Around) -> Iterator[None]:
    """Within, ``around(launch, do)`` stands in the place of every launch.

    It calls ``do`` with the launch, or with one of other warps or stages; what was entered last is called first. This
    is how a diagnosis on a device logs, varies and repeats launches.
    """
    _arounds.append(around)
    try:
        yield
    finally:
        _arounds.remove(around)


@contextlib.contextmanager
def references_only(*ops: str) -> Iterator[None]:
    """Within, the ops of these names (without any: all) run their references, on a GPU too."""
    _references.append(ops)
    try:
        yield
    finally:
        _references.remove(ops)


def launch(kernel: Any, grid: tuple[int, ...], tile: Any, **arguments: Any) -> None:
    """Launch ``kernel`` with a ``Tile``'s warps, stages and registers, and the block sizes that it takes."""
    for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        if block in kernel.arg_names:
            arguments.setdefault(block, getattr(tile, block))
    one = Launch(kernel, grid, arguments, tile.num_warps, tile.num_stages, maxnreg=tile.maxnreg, programs=tile.programs)
    if _recorded is not None:
        _recorded.append(one)
        return
    do = _launch
    for around in _arounds:
        do = functools.partial(_wrapped, around, do)
    do(one)


def _wrapped(around: Around, do: Callable[[Launch], None], one: Launch) -> None:
    around(one, do)


def _launch(one: Launch) -> None:
    device = next(value.device for value in one.arguments.values() if isinstance(value, Tensor))
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "maxnreg": one.maxnreg}
        one.kernel[one.grid](**one.arguments, **options)


@contextlib.contextmanager
def use_kernels() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors too, through Triton's interpreter (needs ``TRITON_INTERPRET=1``)."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def runs_kernel(x: Tensor) -> bool:
    """Whether an op with input ``x`` runs its Triton kernel (True) or its reference."""
    if not HAS_TRITON or x.dtype == torch.float64 or () in _references:
        return False
    if x.is_cuda or _recorded is not None:
        return True
    if not (_forced or os.environ.get("FASTENSDISTILL_KERNELS") == "interpret"):
        return False
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError("kernels on CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the start")
    return True


def define(
    name: str,
    reference: Callable[..., Any],
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    decided_by: str,
    mutates: tuple[str, ...] = (),
) -> Any:
    """The op ``fastensdistill::name``; its schema is the reference's signature, so that no second list states it.

    All three functions take the reference's arguments by position. The launcher serves where ``runs_kernel`` says so
    of the argument named ``decided_by``, the reference elsewhere, the fake for shapes alone.
    """
    position = list(inspect.signature(reference).parameters).index(decided_by)

    def run(*arguments: Any) -> Any:
        kernel = runs_kernel(arguments[position]) and not any(name in ops for ops in _references)
        return (launcher if kernel else reference)(*arguments)

    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    op = torch.library.custom_op(f"fastensdistill::{name}", run, mutates_args=mutates, schema=schema)
    op.register_fake(fake)
    PORTABLE[name] = run
    return op


def require(condition: bool, message: str) -> None:
    """Raise ``InputError(message)`` unless ``condition``."""
    if not condition:
        raise InputError(message)


def check_tensor(name: str, x: Tensor, dimensions: int) -> None:
    """A contiguous floating-point tensor of so many dimensions, whose size per group fits int32 offsets."""
    require(x.dim() == dimensions, f"{name} has shape {tuple(x.shape)}, expected {dimensions} dimensions")
    require(x.is_contiguous(), f"{name} of shape {tuple(x.shape)} is not contiguous")
    count = 1
    for size in x.shape[1:]:
        count *= int(size)
    require(
        count < _LIMIT,
        f"{name} of shape {tuple(x.shape)} has {count} elements in one group, more than 32-bit offsets reach; "
        "use smaller batches",
    )


def check_rows(name: str, rows: Tensor | None, count: int, channels: int) -> None:
    """Per-slot (or per-group) channel parameters: shape (count, channels), or (1, channels) where all share them."""
    if rows is not None:
        good = rows.dim() == 2 and rows.shape[0] in (1, count) and rows.shape[1] == channels and rows.is_contiguous()
        require(good, f"{name} has shape {tuple(rows.shape)}, expected ({count} or 1, {channels}), contiguous")


def check_pair(names: str, first: Tensor | None, second: Tensor | None, count: int, channels: int) -> None:
    """Two per-slot parameters that only make sense together: both absent, or both of one shape."""
    require((first is None) == (second is None), f"{names} must be given together")
    if first is not None and second is not None:
        check_rows(names, first, count, channels)
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        require(first.shape == second.shape and second.is_contiguous(), f"{names} have shapes {shapes}, expected equal")


def check_shortcut(residual: Tensor | None, stride: int, shape: tuple[int, ...]) -> None:
    """A residual whose every ``stride``-th position fits ``shape`` (G, N, H, W, C), with at most C channels."""
    if residual is not None:
        check_tensor("residual", residual, 5)
        size = (*residual.shape[:2], *(-(-s // stride) for s in residual.shape[2:4]))
        require(
            size == tuple(shape[:4]) and residual.shape[4] <= shape[4],
            f"residual has shape {tuple(residual.shape)}, expected every {stride}-th position of it to fit "
            f"{tuple(shape)}",
        )


def check_out(name: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor, add: bool) -> Tensor:
    """Where sums of ``shape`` go that an op makes of ``like``: the given ``out``, or new memory, zeros to add to."""
    dtype = accumulator(like.dtype)
    if out is None:
        return like.new_zeros(shape, dtype=dtype) if add else like.new_empty(shape, dtype=dtype)
    require(
        tuple(out.shape) == shape and out.dtype == dtype and out.is_contiguous(),
        f"{name} is {out.dtype} of shape {tuple(out.shape)}, expected {dtype} {shape}, contiguous",
    )
    return out


def leave(value: Tensor, out: Tensor, add: bool) -> None:
    """``value`` into ``out``, or on top of what is there."""
    out.add_(value) if add else out.copy_(value)


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: float32, or float64 for float64 (references only)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def absent(x: Tensor) -> Tensor:
    """What an op returns in the place of a result nobody asked for (ops return fixed tuples)."""
    return x.new_empty(0)


def present(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def wide(rows: Tensor) -> Tensor:
    """Rows (G or 1, C) of a per-group parameter, shaped to go with (G, N, H, W, C)."""
    return rows[:, None, None, None, :]


def pick(rows: Tensor, slots: Tensor | None) -> Tensor:
    """Rows of a per-slot parameter (slots or 1, C) for each group, as ``wide``; without slots they are by group."""
    return wide(rows if slots is None or rows.shape[0] == 1 else rows[slots.long()])


def row_stride(rows: Tensor | None) -> int:
    """Elements from one slot's row to the next; 0 where all slots share one row."""
    return 0 if rows is None or rows.shape[0] == 1 else int(rows.shape[1])


def out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Positions along one side after a convolution or pooling."""
    return (size + 2 * padding - kernel) // stride + 1


def residual_sizes(residual: Tensor | None) -> dict[str, int]:
    """The sizes of a residual (G, N, HR, WR, CR) as kernels take them."""
    height, width, channels = residual.shape[2:] if residual is not None else (0, 0, 0)
    return {"HR": height, "WR": width, "CR": channels}


def shortcut(x: Tensor, stride: int, height: int, width: int, channels: int) -> Tensor:
    """``x[:, :, ::stride, ::stride]`` with zero channels appended (or the first ``channels`` kept)."""
    x = x[:, :, ::stride, ::stride][:, :, :height, :width]
    return F.pad(x, (0, channels - x.shape[-1]))


def pack_mask(positive: Tensor) -> Tensor:
    """Bool (..., C) → uint8 (..., ceil(C/8)): channel c is bit c % 8 of byte c // 8; bits past C are 0."""
    channels = positive.shape[-1]
    bits = F.pad(positive.to(torch.uint8), (0, -channels % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=positive.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, channels: int) -> Tensor:
    """The inverse of ``pack_mask``: uint8 (..., ceil(C/8)) → bool (..., C)."""
    bits = (mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.flatten(-2)[..., :channels].bool()


def partial_rows(values: Tensor, block: int) -> Tensor:
    """Sums of (G, positions, C) over runs of ``block`` positions: (G, ceil(positions / block), C)."""
    padded = F.pad(values, (0, 0, 0, -values.shape[1] % block))
    return padded.unflatten(1, (-1, block)).sum(2)
