"""The halo convolution's blocks on the CPU, instruction by instruction, against the references; what nvcc makes of it.

``emulation.py`` runs what a GPU would: blocks, threads, shared memory (NaN before a block starts), ldmatrix, mma and
asynchronous copies. Every case runs twice, forwards with copies as late as allowed and backwards with copies at once.
``halo_races.cpp`` runs the warps of a block at the same time.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastensdistill.kernels import halo_conv as halo
from fastensdistill.kernels.conv_data_gradient import DataGradient
from fastensdistill.kernels.grouped_conv import ConvOutput, conv_output
from fastensdistill.kernels.ops import present
from tests.kernels.emulation import both_ways, compiler, library
from tests.kernels.halos import (
    CASES,
    FEW,
    by_name,
    check_forward,
    check_gradient,
    epilogues,
    gradient_epilogues,
    operands,
)
from tests.untyped import untyped

ROOT = Path(__file__).parents[2]


def tile_of(x: Tensor, out_channels: int, columns: int | None) -> list[int]:
    return list(untyped(halo.halo_tile)(*x.shape[1:4], columns or out_channels))


def emulated_conv(x, weight, weight_index, *, columns=None, **options) -> ConvOutput:
    operands = halo.HaloOperands(x, weight, weight_index, **options)
    return conv_output(*both_ways("halo_conv", *operands, tile_of(x, weight.shape[3], columns)))


def emulated_gradient(d, weight, weight_index, *, columns=None, **options) -> DataGradient:
    operands = (d, weight, weight_index, *halo.HaloEpilogue(**options))
    out, statistics = both_ways("halo_data_gradient", *operands, tile_of(d, weight.shape[3], columns))
    return DataGradient(out, present(statistics))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward(case):
    x, weight, weight_index = operands(case)
    check_forward(emulated_conv(x, weight, weight_index), x, weight, weight_index, {})


@pytest.mark.parametrize("epilogue", list(epilogues(CASES[0])))
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_forward_epilogues(case, epilogue):
    x, weight, weight_index = operands(case)
    options = epilogues(case)[epilogue]
    if options.pop("shared", False):
        x = x[:1].contiguous()
    check_forward(emulated_conv(x, weight, weight_index, **options), x, weight, weight_index, options)


@pytest.mark.parametrize("epilogue", list(gradient_epilogues(CASES[0])))
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_data_gradient(case, epilogue):
    d, weight, weight_index = operands(case)
    options = gradient_epilogues(case)[epilogue]
    check_gradient(emulated_gradient(d, weight, weight_index, **options), d, weight, weight_index, options)


@pytest.mark.parametrize(("name", "columns"), [("16-odd-four-groups", 64), ("48-channels", 32), ("160-to-160", 128)])
def test_blocks_wider_than_what_is_left(name, columns):
    """The table never asks for it: channels past the last are neither read nor written."""
    case = by_name[name]
    x, weight, weight_index = operands(case)
    options = epilogues(case)["everything"]
    check_forward(emulated_conv(x, weight, weight_index, **options, columns=columns), x, weight, weight_index, options)
    options = gradient_epilogues(case)["residual-first-mask-sums"]
    check_gradient(
        emulated_gradient(x, weight, weight_index, **options, columns=columns), x, weight, weight_index, options
    )


def test_nan_is_passed_on():
    """A ReLU that turns NaN into 0 would hide a diverged network."""
    x, weight, weight_index = operands(CASES[0])
    x[0, 0, 2, 3, 5] = float("nan")
    rows = torch.ones(1, 16)
    out = emulated_conv(x, weight, weight_index, relu=True, next_scale=rows, next_shift=rows)
    for value in (out.z, out.activated):
        assert untyped(value)[0, 0, 1:4, 2:5].isnan().all()
        assert untyped(value).isnan().sum() == 9 * 16


def needs(tile: halo.HaloTile, channels: int) -> tuple[int, int, int]:
    """Bytes of shared memory and threads of a block, and the blocks for which registers are kept free."""
    found = (ctypes.c_int64 * 3)()
    library().halo_needs((ctypes.c_int64 * 4)(*tile), ctypes.c_int64(channels), found)
    return tuple(found)


# network's layer → blocks on a multiprocessor of an H100 or H200 (228 KB of shared memory, 1 KB of it a block's own)
RESIDENT = {
    (32, 32, 16, 16): 4,
    (32, 32, 16, 64): 2,
    (16, 16, 32, 32): 3,
    (8, 8, 64, 64): 2,
    (32, 32, 64, 64): 2,
    (16, 16, 128, 128): 1,
    (8, 8, 256, 256): 1,
    (32, 32, 160, 160): 3,
    (16, 16, 320, 320): 2,
    (8, 8, 640, 640): 1,
}


@pytest.mark.parametrize("layer", RESIDENT, ids=str)
def test_blocks_that_fit_a_multiprocessor(layer):
    height, width, channels, out_channels = layer
    shared, _, blocks = needs(halo.halo_tile(128, height, width, out_channels), channels)
    assert min(blocks, 228 * 1024 // (shared + 1024)) == RESIDENT[layer]
    assert shared <= halo.SHARED


def test_every_block_fits_the_shared_memory_that_is_asked_for():
    worst = [needs(halo.HaloTile(5, 7, 7, channels), 640)[0] for channels in halo.CHANNELS]
    assert max(worst) <= halo.SHARED


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_warps_at_the_same_time(sanitizer, tmp_path):
    """Every barrier that is needed is there, and no buffer is read or written past its end."""
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
    command += [
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests/kernels'}",
        str(ROOT / "tests/kernels/halo_races.cpp"),
        "-o",
        str(program),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"no library for -fsanitize={sanitizer} on this machine")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address randomisation")
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr[-3000:]


def instructions(fatbin: Path) -> dict[tuple[str, str], Counter]:
    """(channels, epilogue) → how often each machine instruction occurs."""
    triton = pytest.importorskip("triton")
    text = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", str(fatbin)], check=True, capture_output=True, text=True
    ).stdout
    found = {}
    for function in text.split("Function : ")[1:]:
        name = untyped(re.search)(r"HaloShapeILi(\d+)E.*(HaloForward|HaloGradient)E", function.split()[0])
        words = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", function)
        found[(name[1], name[2])] = Counter(words)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
def test_compiled_without_spills_into_tensor_core_instructions(architecture, tmp_path, capsys):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("no nvcc on this machine")
    fatbin = tmp_path / "halo.fatbin"
    command = [nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v"]
    command += ["-fatbin", str(ROOT / "csrc/halo_conv.cu"), "-o", str(fatbin)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "warning" not in report, report
    entry = re.compile(
        r"Compiling entry function '\w*HaloShapeILi(\d+)E\w*(HaloForward|HaloGradient)E\w*'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores.*?Used (\d+) registers", re.S
    )  # fmt: skip
    rows, code = entry.findall(report), instructions(fatbin)
    assert len(rows) == len(code) == 2 * len(halo.CHANNELS)
    for channels, epilogue, stack, spilt, registers in rows:
        _, threads, blocks = needs(halo.HaloTile(1, 8, 32, int(channels)), 64)
        used = code[(channels, epilogue)]
        with capsys.disabled():
            print(f"\nsm_{architecture} {channels:>3} {epilogue:12} {registers} registers, {used['HMMA']} HMMA, "
                  f"{used['LDSM']} LDSM, {used['LDGSTS']} LDGSTS", end="")  # fmt: skip
        assert stack == spilt == "0"
        assert -(-int(registers) // 8) * 8 * threads * blocks <= 65536
        assert used["LDL"] == used["STL"] == 0
        assert min(used["HMMA"], used["LDSM"], used["LDGSTS"]) > 0
