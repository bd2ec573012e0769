"""The torch-free driver of the wgmma kernels: its checks find all kernels right on the CPU, and find what is wrong."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from bench import driver
from tests.kernels import emulation
from tests.untyped import present

ROOT = Path(__file__).parents[2]
SHAPE = r"[13]x[13] s[12] \d+>\d+ \d+x\d+x\d+"
UNCOVERED = re.compile("uncovered (.*): (.*)")


def run(capfd, *names: str, skip: bytes | None = None) -> tuple[int, list[str]]:
    """The driver's exit status and lines; kernels with ``skip`` in their name do nothing."""
    words = [b"driver", *(name.encode() for name in names)]
    capfd.readouterr()
    status = emulation.library().wgmma_driver(len(words), (ctypes.c_char_p * len(words))(*words), skip)
    return status, capfd.readouterr().out.splitlines()


def listed(capfd, pattern: str) -> list[str]:
    return [name for name in run(capfd, "list")[1] if re.fullmatch(pattern, name)]


@pytest.mark.parametrize("kind", ["conv", "data_gradient", "weight_gradient"])
@pytest.mark.parametrize("boxes", ["tile", "copies"])
def test_every_kernel_is_right(capfd, kind, boxes):
    names = listed(capfd, f"{kind} {SHAPE} .*{boxes}")
    assert len(names) >= 14
    status, lines = run(capfd, "run", *names)
    assert not [line for line in lines if not re.match("right|uncovered", line)]
    assert status == 0
    assert sum(line.startswith("right ") for line in lines) >= 0.9 * len(names)


@pytest.mark.parametrize(("kind", "kernel"), [("conv", b"WideConv"), ("data_gradient", b"WideConv"),
                                              ("weight_gradient", b"WgmmaWeightGradient")])  # fmt: skip
def test_a_kernel_that_does_nothing_is_wrong(capfd, kind, kernel):
    names = listed(capfd, rf"{kind} {SHAPE}.*tile")
    names = [name for name in names if not re.search(r" (16|32)>| \d+>(16|32) ", name)]  # another kernel's
    status, lines = run(capfd, "run", *names, skip=kernel)
    assert status == 1
    for name, line in zip(names, lines, strict=True):
        assert re.match(rf"WRONG {re.escape(name)}: \w[\w ]*\[0, 0, 0, 0, 0\] is -?nan, expected", line) or (
            line.startswith("uncovered")
        ), line


def test_operands_say_which_boxes_they_are_read_from(capfd):
    for offsets, layout in ((False, "tile"), (True, "copies")):
        with emulation.hopper(swizzle_offsets=offsets):
            status, lines = run(capfd, "run", "operands")
        assert (status, lines[-1], lines[-2]) == (0, "right operands", f"layout {layout}")
        forms = json.loads(lines[0].removeprefix("descriptors "))
        assert len(forms) == 6
        for form in forms.values():
            assert form["offset" if offsets else "address"] == form["all"] > form["address" if offsets else "offset"]
            assert form["aligned right"] == form["aligned"] > 0
        assert driver.parse("\n".join(lines))["layout"] == layout


def test_where_addresses_are_not_swizzled_copies_are_right(capfd):
    names = [f"conv 3x3 s1 64>64 5x8x8 plain {boxes}" for boxes in ("tile", "copies")]
    names += [f"weight_gradient 3x3 s1 64>64 3x9x11 {boxes}" for boxes in ("tile", "copies")]
    with emulation.hopper(swizzle_offsets=True):
        _, lines = run(capfd, "run", *names)
    assert [line.split()[0] for line in lines] == ["WRONG", "right"] * 2


def test_every_fate_of_a_test_has_its_line(tmp_path):
    program = tmp_path / "driver"
    sources = [ROOT / "tests/kernels/wgmma_driver.cpp", ROOT / "tests/kernels/wgmma_driver_stub.cc"]
    command = [emulation.compiler(), "-std=c++17", f"-I{ROOT / 'csrc'}", *sources, "-o", program]
    subprocess.run(command, check=True)

    def lines(command: str, **environment: str) -> tuple[int, list[str]]:
        environment = {**os.environ, "WGMMA_DRIVER_LIMIT": "1", **environment}
        done = subprocess.run([program, command], capture_output=True, text=True, env=environment, check=False)
        return done.returncode, done.stdout.splitlines()

    assert lines("check", NO_DEVICE="1") == (77, ["no CUDA device: nothing was run"])
    assert lines("measure") == (0, ["measured speed 1 m/s"])
    status, found = lines("check")
    assert status == 1
    assert found == [
        "right good", "WRONG bad: z[1, 0] is 4, expected 3; 1 of 4 are wrong",
        "WRONG unwritten: z[0] is nan, expected 0; 1 of 1 are wrong", "WRONG trap: ended by signal 6",
        "WRONG hang: no end after 1 s", "uncovered late: too wide",
    ]  # fmt: skip
    assert driver.parse("\n".join(found))["wrong"][0].startswith("bad: z[1, 0]")
    assert present(UNCOVERED.fullmatch(found[-1]))[2] == "too wide"
