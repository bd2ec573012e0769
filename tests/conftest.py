"""What has to be set before PyTorch and Triton are imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # without a GPU the Triton kernels run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before xdist asks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a fixture of their module run in one process (``--dist loadgroup``), so that it is made once."""
    for item in items:
        fixtures = getattr(item, "_fixtureinfo", None)
        definitions = [d for found in fixtures.name2fixturedefs.values() for d in found] if fixtures else []
        if isinstance(item, pytest.Function) and any(definition.scope == "module" for definition in definitions):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
