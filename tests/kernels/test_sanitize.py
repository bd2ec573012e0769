"""The program that runs every CUDA kernel without PyTorch: on the CPU its own loops, with nvcc that it links."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.kernels import sanitize
from tests.untyped import present

ROOT = Path(__file__).parents[2]
# kernel → its part of the program, and the first words of the lines that tell of it
KERNELS = {
    "LossRows": ("rows", "LossRows"), "LossScalars": ("rows", "LossRows"), "PairRows": ("rows", "PairRows"),
    "Means": ("rows", "PairRows"), "OdsRows": ("rows", "OdsRows"), "Step": ("steps", "Step"),
    "Pack": ("packing", "Pack"), "HaloForward": ("halo", "HaloForward"), "HaloGradient": ("halo", "HaloGradient"),
}  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return sanitize.build(tmp_path_factory.mktemp("sanitize"), host=True)


def lines(program: Path, *parts: str, **environment: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [str(program), *parts], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    return done.returncode, done.stdout.splitlines()


def test_every_kernel_has_its_lines(program):
    """4 dtypes of three, 10 pairs of the step, 2 of the packing, 4 shapes of the convolution both ways."""
    status, found = lines(program)
    assert (status, found[-1]) == (0, "all right")
    named = [present(re.fullmatch(r"ok     (\w+)<.*", line))[1] for line in found[:-1]]
    assert Counter(named) == {
        "LossRows": 4, "PairRows": 4, "OdsRows": 4, "Step": 10, "Pack": 2, "HaloForward": 4, "HaloGradient": 4,
    }  # fmt: skip
    headers = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.h"))
    assert set(re.findall(r"X\(fed::(\w+)<", headers)) | {"HaloForward", "HaloGradient"} == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_does_nothing_is_wrong(program, kernel):
    part, line = KERNELS[kernel]
    status, found = lines(program, part, SANITIZE_SKIP=kernel)
    assert status == 1
    assert {words.split("<")[0] for words in found if words.startswith("WRONG")} == {f"WRONG  {line}"}


def test_a_part_that_does_not_exist_is_no_success(program):
    assert lines(program, "row") == (1, ["WRONG  a part of another name than rows, steps, packing, halo"])


@pytest.mark.slow
def test_it_is_built_for_a_gpu_and_says_where_there_is_none(tmp_path, capfd):
    if sanitize.find_nvcc() is None:
        pytest.skip("no nvcc on this machine")
    program = sanitize.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [sanitize.PROGRAM]
    status = sanitize.run(program)
    printed = capfd.readouterr().out
    if status == sanitize.NO_DEVICE:
        assert "no CUDA device: nothing was run" in printed
    else:
        assert status == 0, printed
