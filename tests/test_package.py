"""The package: cheap to import, never touches a device by being imported, every public name there and documented."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


PACKAGE = Path(fed.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# On import; what a function imports when it is called does not count
MAY_NOT_IMPORT = {
    "config": ("data", "engine", "evaluate", "train", "cli", "commands"),
    "engine": ("data", "evaluate", "train", "cli", "commands"),
    "method": ("data", "engine", "evaluate", "train", "cli", "commands"),
    "network": ("data", "engine", "evaluate", "train", "cli", "commands"),
    "kernels": ("data", "engine", "evaluate", "train", "cli", "commands", "method", "network"),
}


def imported(module: str) -> set[str]:
    """The package's modules that ``module`` imports when it is imported."""
    found: set[str] = set()
    for node in statements(ast.parse(MODULES[module].read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that run on import, those of classes and branches too, but not what is for the type checker alone."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from statements(node.orelse)
        elif not isinstance(node, ast.FunctionDef):
            yield from statements([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


@pytest.mark.parametrize("folder", MAY_NOT_IMPORT)
def test_who_imports_whom(folder):
    root = f"{fed.__name__}."
    inside = [name for name in MODULES if f"{name}.".startswith(f"{root}{folder}.")]
    assert inside
    for name in inside:
        above = tuple(f"{root}{other}." for other in MAY_NOT_IMPORT[folder])
        assert [other for other in imported(name) if f"{other}.".startswith(above)] == [], name


def test_config_and_engine_load_no_images():
    """Nor does anything that they import."""
    modules = [name for name in MODULES if name.startswith(f"{fed.__name__}.engine.")]
    program = f"""
import sys, {", ".join(modules)}, fastensdistill.config
found = [name for name in sys.modules if name.startswith(("PIL.", "fastensdistill.data"))]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_import_cycle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' → '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in imported(name) - {name}:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_no_file_is_longer_than_400_lines():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "csrc").glob("*")]
    lines = {path.name: path.read_text().count("\n") for path in files if path.is_file()}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_every_public_function_and_class_is_documented():
    """Triton kernels and references aside: the equations at the head of their file are theirs."""
    for path in Path(fed.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if path.parent.name == "kernels" and node.name.endswith(("_kernel", "_reference")):
                    continue
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
