"""Two sides of a layer as one launch of the wgmma kernels, which run on the CPU here; and its operands."""

from __future__ import annotations

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels import wgmma_joint_conv as joint
from fastensdistill.kernels.wgmma_conv import wgmma_conv
from tests.compare import check_close
from tests.kernels import wgmma_convs as convs
from tests.kernels.emulation import both_ways, call
from tests.kernels.wgmma_convs import MULTIPROCESSORS, Case, check_results
from tests.untyped import present, untyped

LAST = ("residual", "bias", "relu", "mask")
# a case of the evaluation side, other groups of the training side, the parts of both
CASES = {
    "64, weights stay": (Case(2, 3, 8, 8, 64, 64, 3, 1), 3, LAST, ("prologue", "in-relu", "sums")),
    "a second source of one side": (Case(2, 1, 9, 7, 48, 64, 1, 1), 1, ("second", "relu"), ("sums",)),
    "a second source of the other": (Case(1, 3, 7, 7, 64, 128, 3, 2), 2, ("bias", "next"), ("second", "sums")),
    "128, pairs": (Case(1, 5, 4, 9, 128, 128, 3, 1), 2, ("one-input", "next", "mask"), ("prologue", "sums")),
    "16, the narrow kernel": (Case(2, 3, 9, 9, 16, 16, 3, 1), 1, LAST, ("prologue", "in-relu", "sums")),
}


@pytest.mark.parametrize("name", list(CASES))
def test_two_sides(name):
    case, groups, first, second = CASES[name]
    sides = convs.conv(case, *first), convs.conv(case._replace(groups=groups), *second)
    options = (*case.window, MULTIPROCESSORS, False)
    found = both_ways("wgmma_joint_conv", *sides[0], *sides[1], *options)
    expected = joint.wgmma_joint_conv_reference(*sides, case.window, MULTIPROCESSORS, False)
    rows = joint.joint_rows(*sides, case.window, MULTIPROCESSORS)
    for i, o in enumerate(sides):
        check_results(found[4 * i : 4 * i + 4], expected[4 * i : 4 * i + 4], o, rows)


CASE = CASES["64, weights stay"][0]
ONE, OTHER = convs.conv(CASE, "relu"), convs.conv(CASE, "sums")
WINDOW = CASE.window._asdict()


def test_same_as_two_launches():
    arguments = [untyped({**o._asdict(), **WINDOW}) for o in (ONE, OTHER)]
    found, apart = joint.wgmma_joint_conv(*arguments), [wgmma_conv(**side) for side in arguments]
    for mine, theirs in zip(found, apart, strict=True):
        assert torch.equal(mine.z, theirs.z)
    check_close("sums", present(found[1].statistics).sum(1), present(apart[1].statistics).sum(1), 1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stride": 2}, "expected the same"),
        ({"x": convs.bf16(2, 3, 8, 9, 64)}, "x is .* expected both alike"),
        ({"residual": convs.bf16(2, 3, 8, 8, 4)}, "does not cover a residual of 4 channels"),
    ],
)
def test_refusals(changed, message):
    arguments = [untyped({**o._asdict(), **WINDOW}) for o in (ONE, OTHER)]
    with pytest.raises(InputError, match=message):
        joint.wgmma_joint_conv(arguments[0], {**arguments[1], **changed})


def test_the_op_refuses_sides_of_different_layers():
    wide = convs.conv(CASE._replace(channels=80), "sums")
    with pytest.raises(RuntimeError, match=r"the second x is .*; expected"):
        call("wgmma_joint_conv", *ONE, *wide, *CASE.window, 3, False)
    one, other = (convs.conv(CASE, name) for name in ("second", "second-for-all"))
    with pytest.raises(RuntimeError, match="as many channels as the first's has"):
        call("wgmma_joint_conv", *one, *other, *CASE.window, 3, False)


def test_opcheck():
    torch.library.opcheck(torch.ops.fastensdistill.wgmma_joint_conv.default, (*ONE, *OTHER, *CASE.window, 3, False))
