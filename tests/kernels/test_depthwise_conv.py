"""The depthwise convolution: its kernel against its reference, that against PyTorch's layer in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastensdistill.errors import InputError
from fastensdistill.kernels.activation import activation
from fastensdistill.kernels.depthwise_conv import depthwise_conv
from tests.compare import check_close, relative_error
from tests.kernels.both import DEVICE, TOLERANCE, check_op, run_kernel, values
from tests.kernels.depthwise import BF16, CASES, F16, F32, SLOTS, Case, each_depthwise, operands
from tests.untyped import present, untyped

TOLERANCES = TOLERANCE | {BF16: 4e-2}  # Triton's interpreter cuts bits off instead of rounding to bfloat16


@each_depthwise
def test_the_kernel_is_the_reference(case):
    check_op(depthwise_conv, *operands(case), **case.window, tolerance=TOLERANCES[case.dtype])


@pytest.mark.parametrize("rows", [1, SLOTS], ids=["shared", "by slot"])
@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=lambda case: case.name)
def test_bias_and_statistics(case, rows):
    options = {"bias": values(rows, case.channels), "center": values(rows, case.channels, seed=1)}
    check_op(depthwise_conv, *operands(case), **case.window, **options, tolerance=TOLERANCES[case.dtype])


@pytest.mark.parametrize("kind", ["relu", "hardswish", "leaky_relu(0.2)"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=lambda case: case.name)
def test_an_activation_behind_the_bias(case, kind):
    options: dict[str, Any] = {"bias": values(SLOTS, case.channels), "center": values(1, case.channels, seed=1)}
    check_op(
        depthwise_conv, *operands(case), **case.window, **options, activation=kind, tolerance=TOLERANCES[case.dtype]
    )
    x, weight, weight_index = (t.double() if t.is_floating_point() else t for t in operands(case))
    plain = depthwise_conv(x, weight, weight_index, **case.window, bias=options["bias"]).z
    found = depthwise_conv(x, weight, weight_index, **case.window, **options, activation=kind)
    assert torch.equal(found.z, activation(plain, kind=kind))
    rest = found.z - options["center"]
    check_close("statistics", present(found.statistics).sum(1)[:, 0], rest.sum((1, 2, 3)), 1e-12)


def test_one_input_for_all_groups():
    case = CASES[0]
    x, weight, weight_index = operands(case)
    out = check_op(depthwise_conv, x[:1].clone(), weight.half(), weight_index, **case.window, tolerance=2e-3)
    assert out.z.dtype == torch.float16


@each_depthwise
def test_the_reference_is_pytorchs_convolution(case):
    x, weight, weight_index = (t.double() if t.is_floating_point() else t for t in operands(case))
    bias, center = (values(SLOTS, case.channels, seed=s).double() for s in range(2))
    out = depthwise_conv(x, weight, weight_index, **case.window, bias=bias, center=center)
    for g, slot in enumerate(weight_index.tolist()):
        kernel = weight[slot, :, 0].T.reshape(-1, 1, *case.kernel)
        y = F.conv2d(x[g].permute(0, 3, 1, 2), kernel, bias[slot], case.stride, case.padding, case.dilation,
                     case.channels).permute(0, 2, 3, 1)  # fmt: skip
        check_close("y", out.z[g], y, 1e-12)
        rest = (y - center[slot]).flatten(0, 2)
        sums = torch.stack([rest.sum(0), rest.square().sum(0)])
        check_close("statistics", present(out.statistics)[g].sum(0), sums, 1e-12)


@pytest.mark.parametrize("name", ["round", "7x7", "odd-s2", "dilated"])
@pytest.mark.parametrize("dtype", [F16, *([BF16] if DEVICE == "cuda" else [])], ids=str)  # interpreted: see above
def test_half_precision_errs_no_more_than_twice_pytorchs(name, dtype):
    case = next(c for c in CASES if c.name == name)._replace(groups=1, dtype=dtype)
    x, weight, weight_index = (t.to(DEVICE) for t in operands(case))
    exact = depthwise_conv(x.double(), weight.double(), weight_index, **case.window).z
    ours = run_kernel(depthwise_conv, x, weight, weight_index, **case.window).z
    kernel = weight[2, :, 0].T.reshape(-1, 1, *case.kernel)
    rest = case.stride, case.padding, case.dilation, case.channels
    theirs = F.conv2d(x[0].permute(0, 3, 1, 2), kernel, None, *rest).permute(0, 2, 3, 1)[None]
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weight of another window": ({"kernel": (3, 1)}, r"weight has shape \(3, 9, 1, 16\), expected \(slots, 3, 1, 16\)"),
    "slots in int64": ({"weight_index": torch.zeros(2, dtype=torch.int64)}, "expected int32"),
    "groups that disagree": ({"weight_index": torch.zeros(4, dtype=torch.int32)}, "x has 2 groups, expected 4 or 1"),
    "another dtype": ({"x": values(2, 3, 8, 6, 16).half()}, "x is torch.float16"),
    "a bias of another width": ({"bias": torch.ones(1, 3)}, r"bias has shape \(1, 3\)"),
    "a stride of 0": ({"stride": (1, 0)}, r"stride is \(1, 0\), expected a pair of at least 1"),
    "a kernel that is no pair": ({"kernel": (3, 3, 3)}, "expected a pair"),
    "a window that does not fit": ({"dilation": (5, 1), "padding": (0, 0)}, "no window"),
    "not contiguous": ({"x": values(2, 3, 8, 6, 16).transpose(2, 3)}, "not contiguous"),
    "another activation": ({"activation": "swish"}, "unknown activation 'swish'"),
    "another precision": ({"precision": "fast"}, "unknown precision"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    change, message = REFUSED[name]
    case = CASES[0]
    x, weight, weight_index = operands(case)
    call = {"x": x, "weight": weight, "weight_index": weight_index, **case.window} | change
    with pytest.raises(InputError, match=message):
        untyped(depthwise_conv)(**call)


def test_a_groups_base_is_a_64_bit_offset():
    """Group 2 starts at element 2^31. Memory that is never touched costs nothing: one position per group is read."""
    x = torch.empty(3, 1, 2**13, 2**13, 16, dtype=torch.float16, device=DEVICE)
    weight = values(1, 1, 1, 16).to(DEVICE, torch.float16)
    x[:, 0, 0, 0] = values(3, 16).to(x)
    index = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    y = run_kernel(depthwise_conv, x, weight, index, kernel=(1, 1), stride=(2**13, 2**13)).z
    check_close("y", y[:, 0, 0, 0], x[:, 0, 0, 0].float() * weight[0, 0].float(), TOLERANCE[torch.float16])


def test_nan_is_passed_on():
    x, weight, weight_index = (t.to(DEVICE) for t in operands(Case("nan", 1, 1, (6, 6), 16, (3, 3), dtype=F32)))
    x[0, 0, 2, 3, 4] = float("nan")
    nan = torch.isnan(run_kernel(depthwise_conv, x, weight, weight_index, kernel=(3, 3)).z)
    assert nan[0, 0, :3, 1:4, 4].all()
    assert nan.sum() == 9
