"""A tensor in a file: its shape and dtype now, its values when they are needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Leaf:
    """``shape`` and ``dtype`` of a tensor in a file; ``read()`` gives the tensor, on the CPU and owned by the caller.

    ``problem`` says what it is where it cannot be read as an ordinary tensor ("a quantised tensor"); ``shape`` and
    ``dtype`` are then None.
    """

    def __init__(
        self,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype | None,
        read: Callable[[], Tensor] | None,
        problem: str = "",
    ):
        self.shape, self.dtype, self.problem, self._read = shape, dtype, problem, read

    def read(self) -> Tensor:
        """The tensor, on the CPU and owned by the caller."""
        assert self._read is not None, self.problem
        return self._read()

    def __setstate__(self, state: object) -> None:
        """What a pickle hangs on a tensor is not taken over."""

    @classmethod
    def of(cls, tensor: Tensor) -> Leaf:
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @classmethod
    def unreadable(cls, problem: str) -> Leaf:
        """A tensor that cannot be read, and why."""
        return cls(None, None, None, problem)
