"""What a type checker cannot follow, or should not: layers by attribute, and arguments that are wrong on purpose."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def untyped(value: Any) -> Any:
    """``value``, unchecked: ``untyped(network).groups[0]``, ``untyped(DistillTrainer)("no student")``."""
    return value


def present(value: T | None) -> T:
    """``value``, which is not None."""
    assert value is not None
    return value
