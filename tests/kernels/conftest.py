"""Fixtures of the op tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from tests.kernels import emulation


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that PyTorch hands out is filled with NaN, so that an element nobody writes fails a test."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def emulation_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder that all processes of the run share."""
    own = tmp_path_factory.getbasetemp()
    emulation.folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(params=["reference", "emulated"])
def each_implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test with the reference, and with the extension's CUDA kernels on the CPU."""
    with emulation.on_cpu() if request.param == "emulated" else contextlib.nullcontext():
        yield
