"""The program that runs every CUDA launcher without PyTorch: on the CPU its own loops, with nvcc that it links."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.kernels import sanitize

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "launch_both": "rows", "launch_pairs": "rows", "launch_ods": "rows", "launch_step": "steps",
    "launch_pack": "packing", "launch_halo": "halo",
}  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return sanitize.build(tmp_path_factory.mktemp("sanitize"), host=True)


def lines(program: Path, *parts: str, **environment: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [str(program), *parts], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    return done.returncode, done.stdout.splitlines()


def test_every_launcher_there_is_has_its_lines(program):
    """4 dtypes of three, 10 pairs of the step, 2 of the packing, 4 shapes and 2 directions of the convolution."""
    status, found = lines(program)
    assert (status, found[-1]) == (0, "all right")
    named = [re.fullmatch(r"ok     (launch_\w+)<.*", line)[1] for line in found[:-1]]
    assert {name: named.count(name) for name in LAUNCHERS} == {
        "launch_both": 4, "launch_pairs": 4, "launch_ods": 4, "launch_step": 10, "launch_pack": 2,
        "launch_halo": 8,
    }  # fmt: skip
    headers = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.h"))
    assert set(re.findall(r"^int (launch_\w+)\(", headers, re.M)) == set(LAUNCHERS)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_does_nothing_is_wrong(program, launcher):
    status, found = lines(program, LAUNCHERS[launcher], SANITIZE_SKIP=launcher)
    assert status == 1
    assert {line.split("<")[0] for line in found if line.startswith("WRONG")} == {f"WRONG  {launcher}"}


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
