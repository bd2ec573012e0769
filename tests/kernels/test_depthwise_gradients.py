"""Both gradients of the depthwise convolution: kernels against references, those against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastensdistill.errors import InputError
from fastensdistill.kernels.conv_data_gradient import flip_weight
from fastensdistill.kernels.depthwise_conv import depthwise_conv_reference, depthwise_operands
from fastensdistill.kernels.depthwise_data_gradient import depthwise_data_gradient
from fastensdistill.kernels.depthwise_weight_gradient import (
    FEW,
    DepthwiseWeightShape,
    depthwise_gradient_partials,
    depthwise_weight_gradient,
)
from fastensdistill.kernels.launch import record_launches
from fastensdistill.kernels.operands import rectangle
from fastensdistill.kernels.reference import pack_mask
from fastensdistill.kernels.tiles import assume_arch
from tests.compare import check_close
from tests.kernels.both import DEVICE, TOLERANCE, check_op, run_kernel, values
from tests.kernels.depthwise import BF16, CASES, SLOTS, Case, each_depthwise, operands
from tests.untyped import untyped

TOLERANCES = TOLERANCE | {BF16: 4e-2}  # Triton's interpreter cuts bits off instead of rounding to bfloat16


def output_gradient(case: Case) -> Tensor:
    return values(case.groups, case.images, *case.out, case.channels, dtype=case.dtype, seed=7)


def _data(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    _, weight, weight_index = operands(case)
    return output_gradient(case), flip_weight(weight), weight_index


def _size(case: Case) -> dict[str, Any]:
    return {"in_size": case.size, **case.window}


@each_depthwise
def test_data_gradient(case):
    check_op(depthwise_data_gradient, *_data(case), **_size(case), tolerance=TOLERANCES[case.dtype])


@each_depthwise
def test_weight_gradient(case):
    check_op(depthwise_weight_gradient, operands(case)[0], output_gradient(case), **case.window, tolerance=1e-5)


def _epilogues(case: Case) -> dict[str, dict[str, Any]]:
    shape, n = (case.groups, case.images, *case.size), case.channels
    mask = {"mask": pack_mask(values(*shape, n, seed=1) > 0)}
    residual = {"residual": values(*shape, n, dtype=case.dtype, seed=2)}
    small = (*shape[:2], *(-(-size // 2) for size in case.size), n + 5)
    z = {"z": values(*shape, n, dtype=case.dtype, seed=3)}
    rows = {"mean": values(SLOTS, n, seed=4), "inv_std": values(SLOTS, n, seed=5).abs()}
    of_z = {"mask_scale": values(SLOTS, n, seed=6), "mask_shift": values(SLOTS, n, seed=8)}
    return {
        "mask, scale, residual": {**mask, "scale": values(SLOTS, n), **residual},
        "padded shortcut": {"residual": values(*small, dtype=case.dtype), "residual_stride": 2, "residual_first": True},
        "mask, sums": {**mask, **z, **{name: row[:1].clone() for name, row in rows.items()}},
        "everything by slot": {**residual, "residual_first": True, **z, **rows, **of_z, "out_dtype": torch.float32},
    }


@pytest.mark.parametrize("epilogue", list(_epilogues(CASES[0])))
@pytest.mark.parametrize("name", ["odd-s2", "unpadded"])
def test_epilogues(name, epilogue):
    case = next(case for case in CASES if case.name == name)
    check_op(depthwise_data_gradient, *_data(case), **_size(case), **_epilogues(case)[epilogue], tolerance=1e-5)


@each_depthwise
def test_references_are_the_adjoints_of_the_forward_reference(case):
    x, weight, weight_index = (t.double() if t.is_floating_point() else t for t in operands(case))
    x.requires_grad_()
    weight.requires_grad_()
    y = depthwise_conv_reference(*depthwise_operands(x, weight, weight_index, **untyped(case.window)))[0]
    d = output_gradient(case).double()
    dx, dw = torch.autograd.grad(y, (x, weight), d)
    weight = weight.detach()
    check_close("dx", depthwise_data_gradient(d, flip_weight(weight), weight_index, **_size(case)).d, dx, 1e-12)
    per_group = depthwise_weight_gradient(x.detach(), d, **case.window)
    check_close("dW", torch.zeros_like(weight).index_add(0, weight_index.long(), per_group), dw, 1e-12)


def test_one_input_of_another_dtype_for_all_groups():
    case = CASES[0]
    x, d = operands(case)[0][:1].clone(), output_gradient(case).half()
    check_op(depthwise_weight_gradient, x, d, **case.window, tolerance=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("call", [run_kernel, lambda op, *args, **kw: op(*args, **kw)], ids=["kernel", "reference"])
def test_memory_that_is_given(call, count):
    """The result, or so many partial results; what is added goes on top of the first."""
    case = Case("small", 1, 5, (4, 5), 9, (2, 2))  # 20 columns of strips: two programs
    x, d = (t.to(DEVICE) for t in (operands(case)[0], output_gradient(case)))
    exact = depthwise_weight_gradient(x.double(), d.double(), **case.window)
    shape = (*([count] if count else []), *exact.shape)
    out = torch.full(shape, float("nan"), device=DEVICE)
    assert call(depthwise_weight_gradient, x, d, **case.window, out=out) is out
    check_close("sum", out.double().sum(0) if count else out, exact, 2e-6)
    before = values(*shape, seed=3).to(DEVICE)
    there = before.clone()
    call(depthwise_weight_gradient, x, d, **case.window, out=there, add=True)
    one, other = (t[0] if count else t for t in (there, before))
    check_close("on top", one, other.double() + exact, 2e-6)
    assert torch.equal(there[1:], before[1:]) or not count
    check_close("on top of nothing", call(depthwise_weight_gradient, x, d, **case.window, add=True), exact, 2e-6)


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], Case("large", 4, 128, (32, 32), 64, (3, 3), padding=(1, 1)),
                                  Case("passes", 2, 4, (30, 30), 16, (31, 31), padding=(15, 15))],
                         ids=lambda case: case.name)  # fmt: skip
def test_how_many_partial_results_there_will_be(case, arch):
    """What a launch makes is what is said beforehand; more than a few are added up in two launches."""
    window = rectangle(**untyped(case.window))
    x = torch.empty(case.groups, case.images, *case.size, case.channels, device="meta" if arch else "cpu")
    d = x.new_empty(case.groups, case.images, *case.out, case.channels)
    shape = DepthwiseWeightShape(tuple(x.shape), case.groups, window, x.dtype, x.device)
    with record_launches() as launches, assume_arch(arch):
        said = depthwise_gradient_partials(shape)
        depthwise_weight_gradient(torch.empty_like(x, device="cpu"), torch.empty_like(d, device="cpu"), **case.window)
    assert launches[0].grid[1] == said
    assert len(launches) == 1 + (said > 1) + (said > FEW)
    assert depthwise_gradient_partials(shape._replace(dtype=torch.float64)) == 1
    assert depthwise_gradient_partials(shape._replace(device=torch.device("cpu"))) == 1, "the reference has one"
    steps, places = launches[0].arguments["steps"], case.images * case.out[1] * -(-case.out[0] // 4)
    assert steps * said * launches[0].arguments["BLOCK_M"] >= places * 4 // launches[0].arguments["BLOCK_K"]


def test_refusals():
    case = CASES[0]
    d, weight, weight_index = _data(case)
    size = {"in_size": (8, 6), **case.window}
    with pytest.raises(InputError, match=r"d has size \(8, 6\), expected \(9, 9\)"):
        untyped(depthwise_data_gradient)(d, weight, weight_index, **size | {"in_size": (9, 9)})
    with pytest.raises(InputError, match=r"weight_flipped has shape \(3, 9, 16, 1\), expected \(slots, 15, 16, 1\)"):
        untyped(depthwise_data_gradient)(d, weight, weight_index, **size | {"kernel": (3, 5)})
    with pytest.raises(InputError, match="z, mean and inv_std"):
        untyped(depthwise_data_gradient)(d, weight, weight_index, **size, z=d)
    with pytest.raises(InputError, match=r"d is torch.float16, expected the weight's torch.float32"):
        untyped(depthwise_data_gradient)(d.half(), weight, weight_index, **size)
    with pytest.raises(InputError, match="d has 1 groups, expected 2"):
        untyped(depthwise_data_gradient)(d[:1], weight, weight_index, **size)
    x = values(*d.shape)
    with pytest.raises(InputError, match=r"d has shape \(2, 3, 8, 6, 16\), expected size \(6, 4\) and 16 channels"):
        depthwise_weight_gradient(x, d, kernel=(3, 3))
    with pytest.raises(InputError, match="expected float32 or d's"):
        depthwise_weight_gradient(x.half(), d, **case.window)
    with pytest.raises(InputError, match=r"out is .* expected torch.float32 \(2, 9, 1, 16\)"):
        depthwise_weight_gradient(x, d, **case.window, out=torch.empty(2, 9, 16))
    with pytest.raises(InputError, match="expected 2 or 1 groups of 3 images"):
        depthwise_weight_gradient(x[:, :1].contiguous(), d, **case.window)
    with pytest.raises(InputError, match="unknown out_dtype"):
        untyped(depthwise_data_gradient)(d, weight, weight_index, **size, out_dtype=torch.int32)
