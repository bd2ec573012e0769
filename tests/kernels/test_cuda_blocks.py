"""The CUDA kernels' bodies, run on the CPU block by block and thread by thread, against the references in float64.

``block_driver.cpp`` executes what a GPU would: the same grids, blocks, threads, shared memory and reductions. Every
case runs with threads and blocks forwards and backwards; the two must agree bit by bit, or threads race in a phase.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastensdistill.kernels.distillation_loss import distill_and_diversify_reference
from fastensdistill.kernels.diversity_seed import (
    diversity_seed_reference,
    ods_seed_reference,
    teacher_diversity_seed_reference,
)
from fastensdistill.kernels.operands import accumulator
from fastensdistill.kernels.pack import PackOperands, pack_weights_reference
from fastensdistill.kernels.perturb_step import perturb_step_reference
from tests.compare import check_close
from tests.kernels import layouts
from tests.kernels import test_diversity_seed as seed_tests
from tests.kernels import test_perturb_step as step_tests
from tests.kernels.rounding import rounding
from tests.kernels.test_distillation_loss import CASES, logits

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "the block driver needs a C++ compiler"
    library = tmp_path_factory.mktemp("driver") / "driver.so"
    source = ROOT / "tests/kernels/block_driver.cpp"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def call(function, *arguments) -> None:
    """Tensors as pointers, integers as int64 (the sizes C and K fit an int's register too), bools and doubles."""
    converted = []
    for value in arguments:
        if value is None or isinstance(value, Tensor):
            assert value is None or value.is_contiguous()
            converted.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        elif isinstance(value, bool):
            converted.append(ctypes.c_bool(value))
        else:
            converted.append(ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value))
    function.restype = None
    function(*converted)


def both_ways(run, outputs: list[Tensor]) -> list[Tensor]:
    """Runs with threads forwards, then backwards; outputs start as NaN (0xff bytes) and must come out the same."""
    forwards: list[Tensor] = []
    for backwards in (False, True):
        for output in outputs:
            output.view(torch.uint8).fill_(255)
        run(backwards)
        if backwards:
            for output, first in zip(outputs, forwards, strict=True):
                assert torch.equal(output.view(torch.uint8), first.view(torch.uint8)), "threads of a phase race"
        forwards = [output.clone() for output in outputs]
    return forwards


def check(names: str, actual, expected, dtype: torch.dtype) -> None:
    for name, a, e in zip(names.split(), actual, expected, strict=True):
        check_close(name, a, e, rounding(e, a.dtype) if a.dtype == dtype else rounding(e, accumulator(dtype)))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name in CASES if name != "imagenet21k"] + ["imagenet21k"])
@pytest.mark.parametrize("mean", [False, True], ids=["one-to-one", "mean"])
def test_loss_and_diversity(driver, case, dtype, mean):
    M, K, B, C = CASES[case]
    teacher, branch, labels = logits(CASES[case], dtype)
    pair = torch.tensor([min(M, K) - 1, 0])
    scalars = torch.empty(5, dtype=accumulator(dtype))
    outputs = [torch.empty_like(branch), torch.empty_like(branch[0]), torch.empty_like(branch[0]), scalars]
    function = getattr(driver, f"loss_{name_of(dtype)}")
    gradient, grad_t, grad_s, scalars = both_ways(
        lambda backwards: call(
            function, teacher, branch, labels, pair, *outputs, M, K, B, C, mean, 4.0, 0.7, backwards
        ),
        outputs,
    )
    expected = distill_and_diversify_reference(teacher.double(), branch.double(), labels, pair, 4.0, 0.7, mean)
    loss, kd, ce, tdiv, sdiv = scalars
    names = "loss kd ce gradient tdiv sdiv grad_teacher_a grad_branch_a"
    check(names, (loss, kd, ce, gradient, tdiv, sdiv, grad_t, grad_s), expected, dtype)


def test_loss_alone_with_bad_labels_and_pair(driver):
    M, K, B, C = 3, 2, 4, 10
    teacher, branch, labels = logits((M, K, B, C), torch.float64)
    labels[1] = C
    scalars = torch.empty(5, dtype=torch.float64)
    outputs = [torch.empty_like(branch), torch.empty_like(branch[0]), torch.empty_like(branch[0]), scalars]
    for pair in (None, torch.tensor([2, 0])):
        gradient, grad_t, _, values = both_ways(
            lambda backwards, pair=pair: call(
                driver.loss_float64, teacher, branch, labels, pair, *outputs, M, K, B, C, False, 4.0, 0.5, backwards
            ),
            outputs,
        )
        assert values[[0, 2, 3, 4]].isnan().all()
        assert values[1].isfinite()
        assert gradient[:, 1].isnan().all()
        assert gradient[:, [0, 2, 3]].isfinite().all()
        assert grad_t.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", seed_tests.CASES)
def test_pairs_and_ods(driver, case, dtype):
    B, C = seed_tests.CASES[case]
    teacher, branch = seed_tests.pairs((B, C), dtype)
    wide = accumulator(dtype)
    outputs = [torch.empty_like(teacher[0]), torch.empty_like(teacher[0]), torch.empty(2, dtype=wide)]
    function = getattr(driver, f"pairs_{name_of(dtype)}")
    grad_t, grad_s, (tdiv, sdiv) = both_ways(
        lambda backwards: call(function, teacher, branch, *outputs, B, C, backwards), outputs
    )
    expected = diversity_seed_reference(teacher.double(), branch.double())
    check("tdiv sdiv grad_teacher_a grad_branch_a", (tdiv, sdiv, grad_t, grad_s), expected, dtype)
    grad_t, _, (tdiv, unwritten) = both_ways(
        lambda backwards: call(function, teacher, None, *outputs, B, C, backwards), outputs
    )
    check("tdiv grad_teacher_a", (tdiv, grad_t), teacher_diversity_seed_reference(teacher.double()), dtype)
    assert unwritten.isnan()
    outputs = [torch.empty_like(teacher[0]), torch.empty(B, dtype=wide)]
    function = getattr(driver, f"ods_{name_of(dtype)}")
    actual = both_ways(lambda backwards: call(function, teacher[0], branch[0], *outputs, B, C, 2.0, backwards), outputs)
    expected = ods_seed_reference(teacher[0].double(), branch[0].double(), 2.0)
    check("gradient confidence", actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", step_tests.CASES)
def test_step(driver, case, dtype):
    images, gradients, confidence = step_tests.operands(case, dtype)
    confidence = confidence.to(accumulator(dtype))
    if len(images) > 1:
        gradients[:, 1] = 0
        images[1, 0] = 2.0  # stays: no gradient
    outputs = [torch.empty_like(images)]
    sizes = (len(gradients), len(images), images[0].numel())
    function = getattr(driver, f"step_{name_of(dtype)}")
    actual = both_ways(
        lambda backwards: call(function, images, gradients, confidence, *outputs, *sizes, 0.5, 0.1, 0.9, backwards),
        outputs,
    )
    expected = perturb_step_reference(images.double(), gradients.double(), confidence.double(), 0.5, 0.1, 0.9)
    check("images", actual, [expected], dtype)
    if len(images) > 1:
        assert torch.equal(actual[0][1], images[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", layouts.CASES)
def test_packing(driver, case, dtype):
    """Bit by bit, in slots 1 … K; the others stay as they were."""
    K = layouts.CASES[case][0]
    layout, t = layouts.problem(case, dtype, slots=K + 2)
    packed = torch.empty(2, layout.packed_size, dtype=torch.bfloat16)
    fields = torch.tensor(layout.fields)
    both = (t["parameters"], t["deviations"])
    function = getattr(driver, f"pack_{name_of(dtype)}")
    (written,) = both_ways(
        lambda backwards: call(
            function, *both, packed[0], packed[1], fields, len(fields), layout.factors, K, 1, backwards
        ),
        [packed],
    )
    reference = torch.empty_like(packed)
    reference.view(torch.uint8).fill_(255)
    pack_weights_reference(PackOperands(*both, *reference, layout.fields, 1, K))
    assert torch.equal(written.view(torch.int16), reference.view(torch.int16))
