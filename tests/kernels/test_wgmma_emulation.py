"""The CPU's block of warpgroups: sample kernels are right with it, and wherever one does something wrong it tells."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.kernels.emulation import compiler

ROOT = Path(__file__).parents[2]
FAULTS = re.findall(
    r"\w+", re.findall(r"enum Fault \{(.*?)\}", (ROOT / "tests/kernels/wgmma_samples.h").read_text(), re.S)[0]
)
# Only where something is applied on load
ON_LOAD = {"NO_PUBLISH", "LATE_PUBLISH", "TRANSFORM_RACES"}
# Where copies make them harmless
OF_SHIFTS = {"WRONG_STRIDE"}


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("samples") / "samples"
    flags = ["-std=c++17", "-O2", "-pthread", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/kernels'}"]
    subprocess.run([compiler(), *flags, ROOT / "tests/kernels/wgmma_samples.cpp", "-o", output], check=True)
    return output


def run(program: Path, *faults: str) -> list[tuple[list[int], str]]:
    """Fault, wrong elements (-1: misuse), backwards, offsets swizzled, copies, on load; and what was said."""
    numbers = [str(FAULTS.index(fault)) for fault in faults]
    printed = subprocess.run([program, *numbers], check=True, capture_output=True, text=True).stdout
    lines = [line.split(" ", 7) for line in printed.splitlines()]
    return [([int(word) for word in words[:6]], words[7]) for words in lines]


def test_samples_are_right(program):
    """Both ways and with operands swizzled by their offsets, where only copies of the tile are right."""
    cases = run(program, "NONE")
    assert len(cases) == 48
    for (_, wrong, _, offsets, copies, _), said in cases:
        assert (wrong == 0) is bool(copies or not offsets), said


def test_every_fault_is_found(program):
    faults = [fault for fault in FAULTS if fault not in ("NONE", "FAULTS")]
    found: dict[str, list[bool]] = {fault: [] for fault in faults}
    for (fault, wrong, _, _, copies, on_load), _ in run(program, *faults):
        name = FAULTS[fault]
        if not (name in ON_LOAD and not on_load) and not (name in OF_SHIFTS and copies):
            found[name].append(wrong != 0)
    assert all(all(tries) for tries in found.values()), {name: tries for name, tries in found.items() if not all(tries)}
    assert sum(len(tries) for tries in found.values()) == 240


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_roles_share_nothing_without_a_barrier(sanitizer, tmp_path):
    """Neither kernels nor the emulation of their instructions."""
    program = tmp_path / "races"
    command = [
        compiler(),
        "-std=c++17",
        "-O1",
        "-g",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-pthread",
    ]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/kernels'}"]
    command += [str(ROOT / "tests/kernels/wgmma_samples.cpp")]
    built = subprocess.run([*command, "-o", program], capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"no library for -fsanitize={sanitizer} on this machine")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program, "races"], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address randomisation")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["0", "0"]] * 8
