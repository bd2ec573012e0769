"""The base class of students, and the simplest one (docs/method.md, Student)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from fastensdistill.errors import InputError
from fastensdistill.method.calls import call


class Student(nn.Module):
    """What the trainer needs of a student. ``forward(x, branches=[a, b])`` evaluates only those branches."""

    kind: str
    branches: int
    module: nn.Module
    target = "one-to-one"
    """What branches learn from: each from its teacher, or from the "mean" of all."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: set[tuple[int, ...]] = set()  # image shapes on which its branches were compared

    def forward(self, x: Tensor, branches: Sequence[int] | None = None) -> Tensor:
        raise NotImplementedError

    def deployed(self) -> nn.Module:
        """What is tested, validated and shipped: an ordinary network, or the student itself, as an ensemble."""
        return self

    def factors(self) -> list[nn.Parameter]:
        """Its rank-one factors, each once; none where it has none."""
        return []

    def mixed(self, weights: Tensor) -> Student:
        """A student whose branches have the factors of this one's mixed by rows of ``weights``.

        Raises InputError for one whose branches have no factors.
        """
        raise InputError(f"a {self.kind} student has no factors to mix")

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups for SGD; the learning rate of each is the schedule's times ``lr_scale``.

        Frozen parameters are included, because they may be thawed later: SGD leaves parameters without gradients alone.
        Source: docs/method.md, Loss.
        """
        return [{"params": list(self.parameters()), "lr_scale": 1.0, "weight_decay": weight_decay}]

    def penalty(self) -> Tensor:
        """``L_WD``: half the squared norm of all parameters; deviations of r and s count 1/K (docs/method.md, Loss)."""
        groups = self.parameter_groups(1.0)
        return sum((g["weight_decay"] * p.square().sum() for g in groups for p in g["params"]), torch.tensor(0.0)) / 2

    def check(self, x: Tensor) -> None:
        """Raise InputError, at the first images of a size, for a network whose branches mix."""
        if tuple(x.shape[1:]) not in self.checked and not torch.compiler.is_compiling():
            from fastensdistill.method.branch_check import check_once  # which knows the students

            check_once(self, x)

    def _named(self) -> str:
        return f"the student's {type(self.module).__name__}"

    def _chosen(self, branches: Sequence[int] | None) -> tuple[int, ...]:
        chosen = tuple(range(self.branches)) if branches is None else tuple(branches)
        if not chosen or any(not 0 <= k < self.branches for k in chosen):
            raise InputError(f"branches={list(chosen)}: expected indices from 0 to {self.branches - 1}")
        return chosen


class Single(Student):
    """A plain network with the student's interface: logits (1, B, C). The student of plain distillation."""

    kind, target = "single", "mean"

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.branches = module, 1

    def forward(self, x: Tensor, branches: Sequence[int] | None = None) -> Tensor:
        self._chosen(branches)
        return call(self.module, x, self._named()).unsqueeze(0)

    def deployed(self) -> nn.Module:
        return self.module


def check_branch_count(branches: int) -> int:
    """``branches``, which may be NumPy's. Raises InputError unless it is an integer of at least 1."""
    if not isinstance(branches, Integral) or isinstance(branches, bool) or branches < 1:
        raise InputError(f"branches={branches!r}: expected an integer of at least 1")
    return int(branches)
