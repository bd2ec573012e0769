"""What the documents say of the repository is so: files exist, commands parse, checklists name the one place."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from torch import nn

from fastensdistill import cli, models
from fastensdistill.data.sources import DATASETS
from fastensdistill.method.perturbation import PERTURBATIONS
from tests.runs import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
WRITTEN_BY_RUNS = {"config.yaml", "results.json", "network.json", "metrics.jsonl", "results.jsonl"}
SUFFIXES = ("py", "md", "json", "sh", "toml", "yaml", "svg", "cu", "cpp", "h")


def test_every_file_that_a_document_names_exists():
    for document in DOCUMENTS:
        text = document.read_text()
        links = {ROOT / document.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)}
        names = re.findall(rf"`((?:[\w*.-]+/)*[\w*-]+\.(?:{'|'.join(SUFFIXES)}))`", text)
        for name in set(names) - WRITTEN_BY_RUNS:
            places = (ROOT, ROOT / "fastensdistill", document.parent, ROOT / "examples")
            assert any(list(place.glob(name)) for place in places), f"{document.name} names {name}"
        for link in links:
            assert link.exists(), f"{document.name} links to {link}"


def code(path: Path) -> str:
    """A file without its docstrings and comments."""
    return re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text())


def commands() -> list[str]:
    """Every line of the documents that starts the command line or a module of the repository."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.S):
            found += [line.split("#")[0].strip() for line in block.splitlines()]
        found += re.findall(r"`((?:fastensdistill|python -m) [^`\n]+)`", document.read_text())
    return sorted({line for line in found if "-m " in line or line.startswith("fastensdistill ")})


@pytest.mark.parametrize("line", commands())
def test_commands_in_the_documents_parse(line, monkeypatch, tmp_path):
    words = shlex.split(line)
    if "fastensdistill" in words:  # as the first word, or after -m
        name, *flags = words[words.index("fastensdistill") + 1 :]
        if name in cli.COMMANDS and "--help" not in flags:
            monkeypatch.chdir(tmp_path)
            assert cli.parse(name, flags)
        else:
            assert name == "COMMAND" or name in cli.COMMANDS
    else:
        module = words[words.index("-m") + 1]
        assert module in ("pip", "pytest") or importlib.util.find_spec(module) is not None
        source = (ROOT / (module.replace(".", "/") + ".py"), ROOT / module.replace(".", "/") / "__main__.py")
        text = "".join(path.read_text() for path in source if path.is_file())
        for flag in re.findall(r"(?<=\s)--[a-z-]+", line) if module != "pytest" else ():
            assert flag == "--help" or f'"{flag}"' in text, f"{module} has no {flag}"


def test_the_package_imports_as_its_layers_say():
    table = (ROOT / "docs/architecture.md").read_text().split("## Layers")[1].split("## Words")[0]
    rows = [
        re.findall(r"`(\w+)(?:/|\.py)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")
    ]
    rank = {name: i for i, row in enumerate(rows) for name in row}
    package = ROOT / "fastensdistill"
    assert set(rank) == {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()} - {
        "__init__"
    }
    for path in package.rglob("*.py"):
        here = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.parse(path.read_text()).body if here != "__init__" else ():
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastensdistill."):
                there = node.module.split(".")[1]
                assert rank[there] <= rank[here], f"{path.name} imports {node.module}, of a later layer"


def test_a_model_is_one_file_and_one_row():
    rows = {name: getattr(build, "func", build) for name, build in models.MODELS.items()}
    ours = {cls for cls in rows.values() if isinstance(cls, type)}
    defined = set()
    for path in Path(models.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"fastensdistill.models.{path.stem}")
        defined |= {c for c in vars(module).values() if isinstance(c, type) and "num_classes" in _arguments(c)}
    assert ours == defined
    for name in rows:
        if rows[name] in ours:
            assert getattr(models, name).__name__ == name
    package = (ROOT / "fastensdistill").rglob("*.py")
    used = "".join(code(path) for path in package if path.parent.name != "models")
    for cls in ours:
        assert not re.search(rf"\b{cls.__name__}\b", used), f"{cls.__name__} is known outside models/"


def _arguments(cls: type) -> tuple[str, ...]:
    return cls.__init__.__code__.co_varnames if issubclass(cls, nn.Module) and "__init__" in vars(cls) else ()


@pytest.mark.parametrize(
    ("names", "home"),
    [(DATASETS, "data/sources.py"), (PERTURBATIONS, "method/perturbation.py")],
    ids=["data sets", "perturbations"],
)
def test_a_name_is_decided_on_in_one_file(names, home):
    """Nothing else in the package compares with it: the row is all there is."""
    for path in (ROOT / "fastensdistill").rglob("*.py"):
        where = path.relative_to(ROOT / "fastensdistill").as_posix()
        if where in (home, "demo.py"):
            continue
        for name in set(names) - {"none", "digits", "tdiv", "gaussian"}:
            assert not re.search(rf'(==|in \(|!=) *"{name}"', code(path)), f"{where} asks for {name!r}"
