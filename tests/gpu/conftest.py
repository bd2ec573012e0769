"""Everything here needs a CUDA device, and is selected by ``-m gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastensdistill.kernels.launch import around_launches

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=[None, 4, 8], ids=["own-warps", "4-warps", "8-warps"])
def warps(request):
    """Every kernel with so many warps: compilers have been wrong at one count and right at another."""
    if request.param is None:
        yield None
        return
    with around_launches(lambda launch, do: do(launch._replace(num_warps=request.param, maxnreg=None))):
        yield request.param
