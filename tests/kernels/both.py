"""One op twice: its kernel (on the GPU, or interpreted) with NaN-poisoned memory, and its reference on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastensdistill.kernels.launch import use_kernels
from tests.compare import check_close
from tests.untyped import present

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
# groups, images, height, width, channels; the second has more positions than one program sums
SHAPES = {"odd": (2, 3, 5, 7, 20), "two-rows-of-sums": (1, 3, 16, 11, 16), "one-pixel": (3, 1, 1, 1, 9)}
each_shape = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
each_sharing = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


def _moved(value: Any) -> Any:
    """A copy on the device (on the CPU too: ops may write into running estimates)."""
    return value.detach().clone().to(DEVICE) if isinstance(value, torch.Tensor) else value


def _results(value: Any) -> list[torch.Tensor | None]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def run_kernel(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``op`` by its kernel. Every output starts as NaN (255 for bytes), so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    try:
        with use_kernels():
            return op(*args, **kwargs)
    finally:
        torch.use_deterministic_algorithms(False)


def check_op(op: Callable[..., Any], *args: Any, tolerance: float = 1e-5, **kwargs: Any) -> Any:
    """Compare all results and in-place changes of kernel and reference; on a GPU the kernel twice, bit by bit."""
    moved = [_moved(a) for a in args], {k: _moved(v) for k, v in kwargs.items()}
    again = [_moved(a) for a in args], {k: _moved(v) for k, v in kwargs.items()}
    actual = _results(run_kernel(op, *moved[0], **moved[1]))
    expected = op(*args, **kwargs)
    names = getattr(expected, "_fields", ("result",))
    wanted = _results(expected)
    for name, a, e in zip(names, actual, wanted, strict=True):
        assert (a is None) == (e is None), f"{op.__name__} {name}: one of kernel and reference left it out"
        if a is None or e is None:
            continue
        if a.dtype == torch.uint8:
            assert torch.equal(a.cpu(), e), f"{op.__name__} {name}: {int((a.cpu() != e).sum())} bytes differ"
        else:
            assert a.dtype == e.dtype
            check_close(f"{op.__name__} {name}", a, e, tolerance)
    for i, (a, e) in enumerate(zip(moved[0], args, strict=True)):
        if isinstance(e, torch.Tensor) and e.is_floating_point():
            check_close(f"{op.__name__} argument {i} afterwards", a, e, tolerance)
    if DEVICE == "cuda":
        for a, b in zip(actual, _results(run_kernel(op, *again[0], **again[1])), strict=True):
            assert a is None or torch.equal(a, present(b)), f"{op.__name__}: two runs differ"
    return expected


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal values, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(1000 * seed + sum((i + 1) * s for i, s in enumerate(shape)))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)
