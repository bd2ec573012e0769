"""The package: cheap to import, never touches a device by being imported, every public name there and documented."""

import importlib
import subprocess
import sys

import pytest

import fastensdistill as fed

PROBE = """
import sys
import fastensdistill
assert "torch" not in sys.modules, "importing the package imports torch"
for name in fastensdistill.__all__:
    getattr(fastensdistill, name)
import fastensdistill.cli, fastensdistill.commands, fastensdistill.demo, fastensdistill.doctor
import fastensdistill.evaluate.runs
import torch
assert not torch.cuda.is_initialized()
assert "matplotlib.pyplot" not in sys.modules
"""


def test_importing_is_cheap_and_touches_no_device():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [n for n in fed.__all__ if n != "models"])
def test_public_names_are_documented(name):
    assert (getattr(fed, name).__doc__ or "").strip()


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = fed.distil
    assert "LatentBE" in dir(fed)


def test_public_names_are_not_hidden_by_modules_of_the_same_name():
    """Importing a module sets its name on the package, where it would hide a function."""
    for module in ("evaluate.predict", "export", "models"):
        importlib.import_module(f"fastensdistill.{module}")
    for name, home in fed._HOME_OF.items():
        assert getattr(fed, name) is getattr(importlib.import_module(f"fastensdistill.{home}"), name), name
    assert callable(fed.evaluate.evaluate)
