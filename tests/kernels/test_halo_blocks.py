"""The halo convolution's blocks on the CPU, instruction by instruction, against the references; what nvcc makes of it.

``halo_driver.cpp`` runs what a GPU would: blocks, threads, shared memory (NaN before a block starts), ldmatrix, mma and
asynchronous copies. Every case runs twice, forwards with copies as late as allowed and backwards with copies at once.
``halo_races.cpp`` runs the warps of a block at the same time.
"""

from __future__ import annotations

import ctypes
import os
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
from fastensdistill.kernels.grouped_conv import ConvOutput
from fastensdistill.kernels.launch import row_stride
from tests.kernels.test_cuda_blocks import both_ways, call
from tests.kernels.test_halo_conv import (
    CASES,
    FEW,
    by_name,
    check_forward,
    check_gradient,
    epilogues,
    gradient_epilogues,
    operands,
)

ROOT = Path(__file__).parents[2]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert found, "the emulation needs a C++ compiler"
    return found


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("driver") / "halo.so"
    source = ROOT / "tests/kernels/halo_driver.cpp"
    command = [
        compiler(),
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        f"-I{ROOT / 'csrc'}",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def sizes_of(
    x: Tensor, slots: Tensor, out_channels: int, residual: Tensor | None, stride: int, columns: int | None
) -> Tensor:
    N, H, W, Ci = x.shape[1:]
    tile = halo.halo_tile(N, H, W, columns or out_channels)
    of_residual = residual.shape[2:] if residual is not None else (0, 0, 0)
    step = 0 if x.shape[0] == 1 else N * H * W * Ci
    return torch.tensor([len(slots), N, H, W, Ci, out_channels, *of_residual, stride, *tile, step])


def emulated_conv(
    driver, x, weight, slots, *, inputs=None, in_scale=None, in_shift=None, in_relu=False, bias=None, residual=None,
    residual_stride=1, relu=False, next_scale=None, next_shift=None, center=None, mask=False, columns=None,
):  # fmt: skip
    sizes = sizes_of(x, slots, weight.shape[3], residual, residual_stride, columns)
    empty = halo._fake(x, weight, slots, inputs, in_scale, in_shift, in_relu, bias, residual, residual_stride, relu,
                       next_scale, next_shift, center, mask, sizes[10:14].tolist())  # fmt: skip
    strides = torch.tensor([row_stride(rows) for rows in (in_scale, bias, next_scale, center)])
    outputs = [t if t.numel() else None for t in empty]
    results = iter(both_ways(
        lambda backwards: call(
            driver.halo_forward, x, weight, slots, inputs, in_scale, in_shift, bias, residual, next_scale, next_shift,
            center, *outputs, sizes, strides, in_relu, relu, backwards
        ),
        [t for t in outputs if t is not None],
    ))  # fmt: skip
    return ConvOutput(*(None if t is None else next(results) for t in outputs))


def emulated_gradient(
    driver, d, weight, slots, *, residual=None, residual_stride=1, residual_first=False, mask=None, scale=None,
    z=None, mean=None, inv_std=None, columns=None,
):  # fmt: skip
    sizes = sizes_of(d, slots, weight.shape[3], residual, residual_stride, columns)
    out, statistics = halo._fake_gradient(d, weight, slots, residual, residual_stride, residual_first, mask, scale, z,
                                          mean, inv_std, sizes[10:14].tolist())  # fmt: skip
    strides = torch.tensor([row_stride(scale), row_stride(mean)])
    outputs = [out, statistics if z is not None else None]
    results = both_ways(
        lambda backwards: call(
            driver.halo_gradient, d, weight, slots, residual, mask, scale, z, mean, inv_std, *outputs, sizes, strides,
            residual_first, backwards
        ),
        [t for t in outputs if t is not None],
    )  # fmt: skip
    return DataGradient(results[0], results[1] if z is not None else None)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward(driver, case):
    x, weight, slots = operands(case)
    check_forward(emulated_conv(driver, x, weight, slots), x, weight, slots, {})


@pytest.mark.parametrize("epilogue", list(epilogues(CASES[0])))
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_forward_epilogues(driver, case, epilogue):
    x, weight, slots = operands(case)
    options = epilogues(case)[epilogue]
    if options.pop("shared", False):
        x = x[:1].contiguous()
    check_forward(emulated_conv(driver, x, weight, slots, **options), x, weight, slots, options)


@pytest.mark.parametrize("epilogue", list(gradient_epilogues(CASES[0])))
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_data_gradient(driver, case, epilogue):
    d, weight, slots = operands(case)
    options = gradient_epilogues(case)[epilogue]
    check_gradient(emulated_gradient(driver, d, weight, slots, **options), d, weight, slots, options)


@pytest.mark.parametrize(("name", "columns"), [("16-odd-four-groups", 64), ("48-channels", 32), ("160-to-160", 128)])
def test_blocks_wider_than_what_is_left(driver, name, columns):
    """The table never asks for it: channels past the last are neither read nor written."""
    case = by_name[name]
    x, weight, slots = operands(case)
    options = epilogues(case)["everything"]
    check_forward(emulated_conv(driver, x, weight, slots, **options, columns=columns), x, weight, slots, options)
    options = gradient_epilogues(case)["residual-first-mask-sums"]
    check_gradient(emulated_gradient(driver, x, weight, slots, **options, columns=columns), x, weight, slots, options)


def test_nan_is_passed_on(driver):
    """A ReLU that turns NaN into 0 would hide a diverged network."""
    x, weight, slots = operands(CASES[0])
    x[0, 0, 2, 3, 5] = float("nan")
    rows = torch.ones(1, 16)
    out = emulated_conv(driver, x, weight, slots, relu=True, next_scale=rows, next_shift=rows)
    for value in (out.z, out.activated):
        assert value[0, 0, 1:4, 2:5].isnan().all()
        assert value.isnan().sum() == 9 * 16


def needs(driver, tile: halo.HaloTile, channels: int) -> tuple[int, int, int]:
    """Bytes of shared memory and threads of a block, and the blocks for which registers are kept free."""
    found = torch.empty(3, dtype=torch.int64)
    call(driver.halo_needs, torch.tensor(tile), channels, found)
    return tuple(found.tolist())


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
def test_blocks_that_fit_a_multiprocessor(driver, layer):
    height, width, channels, out_channels = layer
    shared, _, blocks = needs(driver, halo.halo_tile(128, height, width, out_channels), channels)
    assert min(blocks, 228 * 1024 // (shared + 1024)) == RESIDENT[layer]
    assert shared <= halo.SHARED


def test_every_block_fits_the_shared_memory_that_is_asked_for(driver):
    worst = [needs(driver, halo.HaloTile(5, 7, 7, channels), 640)[0] for channels in halo.CHANNELS]
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
    command += [f"-I{ROOT / 'csrc'}", str(ROOT / "tests/kernels/halo_races.cpp"), "-o", str(program)]
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
        name = re.search(r"HaloShapeILi(\d+)E.*(HaloForward|HaloGradient)E", function.split()[0])
        words = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", function)
        found[(name[1], name[2])] = Counter(words)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
def test_compiled_without_spills_into_tensor_core_instructions(driver, architecture, tmp_path, capsys):
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
        _, threads, blocks = needs(driver, halo.HaloTile(1, 8, 32, int(channels)), 64)
        used = code[(channels, epilogue)]
        with capsys.disabled():
            print(f"\nsm_{architecture} {channels:>3} {epilogue:12} {registers} registers, {used['HMMA']} HMMA, "
                  f"{used['LDSM']} LDSM, {used['LDGSTS']} LDGSTS", end="")  # fmt: skip
        assert stack == spilt == "0"
        assert -(-int(registers) // 8) * 8 * threads * blocks <= 65536
        assert used["LDL"] == used["STL"] == 0
        assert min(used["HMMA"], used["LDSM"], used["LDGSTS"]) > 0
