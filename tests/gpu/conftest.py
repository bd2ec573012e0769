"""Everything here needs a CUDA device, and is selected by ``-m gpu``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=[None, 4, 8], ids=["own-warps", "4-warps", "8-warps"])
def warps(request, monkeypatch):
    """Every kernel with so many warps: compilers have been wrong at one count and right at another."""
    modules = [m for name, m in sys.modules.items() if name.startswith("fastensdistill.kernels.")]
    for module in modules:
        launch = getattr(module, "launch", None)
        if request.param and launch is not None and not module.__name__.endswith("triton_utils"):

            def forced(kernel, grid, tile, launch=launch, **arguments):
                return launch(kernel, grid, tile._replace(num_warps=request.param), **arguments)

            monkeypatch.setattr(module, "launch", forced)
    return request.param
