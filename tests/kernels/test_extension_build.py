"""The build: CUDA kernels for every architecture without spills, or pure Python and why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastensdistill.kernels import extension
from tests.kernels import emulation
from tests.untyped import present

ROOT = Path(__file__).parents[2]
KERNELS = ["logits", "perturb_step", "pack"]
ARCHITECTURES = ["80", "90a", "100"]
# Kernels hold 256 or 512 threads: 80 registers let three such blocks of 256 share a processor's 65,536.
MAX_REGISTERS = 80
# The loss with every option in float64, which no run is trained in: two blocks.
MAX_REGISTERS_OF = {"LossRows<double, true>": 128}
MAX_SHARED = 48 * 1024  # what a kernel may have without asking for more


def ptxas_report(kernel: str, folder: Path) -> list[dict[str, str | int]]:
    """Registers, shared memory and spills of every kernel of a .cu file and architecture, from nvcc -Xptxas -v."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    output = folder / f"{kernel}.fatbin"
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        *codes,
        "-Xptxas=-v",
        "-fatbin",
        str(ROOT / f"csrc/{kernel}.cu"),
        "-o",
        str(output),
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "warning" not in text, text
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.S,
    )
    rows = []
    for match in entry.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        row: dict[str, str | int] = {
            "name": match["name"],
            "arch": match["arch"],
            "shared": int(shared[1]) if shared else 0,
        }
        rows.append({**row, **{key: int(match[key]) for key in ("registers", "spill_stores", "spill_loads")}})
    return rows


def readable(name: str) -> str:
    """LossRows<fed::bf16> from a mangled name."""
    whole = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    return present(re.search(r"block_kernel<fed::(.*) ?>\(", whole))[1].strip()


@pytest.mark.slow
def test_cuda_kernels_compile_without_spills(tmp_path, capsys):
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("no nvcc on this machine")
    with ThreadPoolExecutor(2) as pool:
        rows = [row for report in pool.map(lambda kernel: ptxas_report(kernel, tmp_path), KERNELS) for row in report]
    with capsys.disabled():
        print()
        for row in rows:
            print(
                f"sm_{row['arch']:<4} {row['registers']:>4} registers {row['shared']:>6} B shared "
                f"{row['spill_stores']:>3} B spilt  {readable(str(row['name']))}"
            )
    # 4 dtypes of four kernels, 2 of three, 10 of the step, on every architecture
    assert len(rows) == len(ARCHITECTURES) * (4 * 4 + 3 * 2 + 10)
    for row in rows:
        assert row["spill_stores"] == row["spill_loads"] == 0, row
        assert int(row["registers"]) <= MAX_REGISTERS_OF.get(readable(str(row["name"])), MAX_REGISTERS), row
        assert int(row["shared"]) <= MAX_SHARED, row


def copy_of_the_project(folder: Path) -> Path:
    """What a source distribution holds of the package and its tests, without libraries built earlier."""
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("fastensdistill", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "setup.py", folder)
    return folder


def build(project: Path, **environment: str) -> tuple[dict[str, object], str]:
    """Builds in place as an editable installation does; the report, and what the build printed."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=project,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((project / "fastensdistill/kernels/_build.json").read_text()), done.stderr


def python(project: Path, *arguments: str, **environment: str) -> str:
    paths = {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project, env={**os.environ, **paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_source_distribution_has_every_source(tmp_path):
    project = copy_of_the_project(tmp_path / "project")
    for name in ("MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    python(project, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {Path(name).name for name in archive.getnames() if "/csrc/" in name}
    assert packed == {path.name for path in (ROOT / "csrc").iterdir()}


def test_what_was_built_is_loaded():
    if not extension.BUILD_REPORT.exists() or not json.loads(extension.BUILD_REPORT.read_text())["built"]:
        pytest.skip("no extension was built")
    assert extension.describe()["loaded"], extension.describe()["reason"]
    assert all(extension.serves(name, "cuda") and not extension.serves(name, "cpu") for name in emulation.OPS)


DESCRIBE = "import json; from fastensdistill.kernels import distillation_loss, extension; "
DESCRIBE += "print(json.dumps(extension.describe()))"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nowhere", "CXX": ""}, "pure Python: no C++ compiler"),
        ({"FASTENSDISTILL_BUILD": "python"}, "pure Python: FASTENSDISTILL_BUILD=python"),
        ({"CXX": "/bin/false"}, "pure Python: false failed"),
        ({"PATH": "/usr/bin:/bin", "CUDA_HOME": "/nowhere"}, "pure Python: no nvcc"),
    ],
    ids=["no-compiler", "switched-off", "broken-compiler", "no-nvcc"],
)
def test_without_compilers_the_package_is_pure_python(tmp_path, environment, reason):
    project = copy_of_the_project(tmp_path / "project")
    stale = project / "fastensdistill/kernels" / extension.LIBRARY.name
    stale.write_bytes(b"built earlier")
    report, printed = build(project, **environment)
    assert report["built"] is False
    assert str(report["reason"]).startswith(reason)
    assert [line for line in printed.splitlines() if line.startswith("fastensdistill: pure Python")]
    assert not stale.exists()
    state = json.loads(python(project, "-c", DESCRIBE))
    assert (state["loaded"], state["reason"]) == (False, report["reason"])


# Compilers that make empty files; nvcc, of a file whose name has wgmma in it, says what the environment tells it to
STUB = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.9, V12.9.1" ;;
  *--list-gpu-code*) echo sm_80 sm_90 sm_100 ;;
  *) for word in "$@"; do [ "$last" = -o ] && : > "$word"; last=$word; done
     echo "$*" >> "$STUB_CALLS"
     case "$*" in *csrc/wgmma_*) echo "$STUB_SAYS" >&2 ;; esac ;;
esac
"""
SPILLED = "    0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads"
SERIALISED = (
    "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to a call"
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", None), (SPILLED, SPILLED),
     (SERIALISED, SERIALISED)],
    ids=["good", "spilled", "serialised"],
)  # fmt: skip
def test_kernels_of_wgmma_are_for_sm_90a_alone_and_as_they_should_be(tmp_path, said, reason):
    project = copy_of_the_project(tmp_path / "project")
    for source in (project / "csrc").glob("wgmma_*.c*"):
        source.unlink()
    (project / "csrc/wgmma_stub.cu").touch()
    (project / "csrc/wgmma_stub.cpp").touch()
    for name in ("nvcc", "c++"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    paths = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CXX": str(tmp_path / "c++"), "STUB_CALLS": str(calls)}
    report, _ = build(project, STUB_SAYS=said, **paths)
    if "no CUDA" in str(report.get("reason")):
        pytest.skip("this PyTorch has no CUDA")
    assert report.get("reason") == (reason and f"pure Python: wgmma_stub.cu: {reason.strip()}")
    lines = calls.read_text().splitlines()
    (own,) = (line for line in lines if "csrc/wgmma_stub.cu " in line)
    assert re.findall(r",code=(\w+)", own) == ["sm_90a"]
    assert sum("csrc/wgmma_stub.cpp" in line for line in lines) == 1
    (other,) = (line for line in lines if "csrc/logits.cu " in line)
    assert re.findall(r",code=(\w+)", other) == ["sm_80", "sm_90a", "sm_100", "compute_100"]


def test_library_that_does_not_load_is_said_once_and_replaced(tmp_path):
    project = copy_of_the_project(tmp_path / "project")
    (project / "fastensdistill/kernels" / extension.LIBRARY.name).write_bytes(b"not a library")
    code = "import warnings\nwith warnings.catch_warnings(record=True) as caught:\n warnings.simplefilter('always')\n"
    code += " from fastensdistill.kernels import distillation_loss as d, extension\n"
    code += "import torch\nz = torch.randn(2, 3, 5)\n"
    code += "d.distillation_loss(z, z, torch.zeros(3, dtype=torch.int64), 4.0, 1.0)\n"
    code += "print(sum('not loadable' in str(w.message) for w in caught), extension.describe()['reason'])"
    assert python(project, "-c", code).startswith("1 built but not loadable")
