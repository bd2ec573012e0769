"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that PyTorch hands out is filled with NaN, so that an element nobody writes fails a test."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
