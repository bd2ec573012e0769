"""A joint launch gives, bit for bit, what two give: convolutions with every pair of epilogues, and the head."""

from typing import Any

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels.grouped_conv import grouped_conv
from fastensdistill.kernels.head import head
from fastensdistill.kernels.joint_conv import joint_conv, joint_conv_kernel
from fastensdistill.kernels.joint_head import joint_head, joint_head_kernel
from fastensdistill.kernels.launch import KernelLaunch, record_launches, references_only
from fastensdistill.kernels.tiles import assume_arch
from tests.kernels.both import run_kernel, values
from tests.kernels.convs import CASES, SLOTS, Case

BF16 = torch.bfloat16


def side(case: Case, groups: int, seed: int, *fused: str) -> dict:
    """The arguments of ``grouped_conv`` for one side, with what is ``fused``."""
    n, out = case.out_channels, (groups, case.images, *case.out)
    scale = (case.kernel**2 * case.channels) ** -0.5
    rows = {"bias": n, "center": n, "next_scale": n, "next_shift": n, "in_scale": case.channels,
            "in_shift": case.channels}  # fmt: skip
    options: dict[str, Any] = {
        name: values(SLOTS, rows[name], seed=seed + i) for i, name in enumerate(fused) if name in rows
    }
    if "residual" in fused:
        options["residual"] = values(*out, n, dtype=case.dtype, seed=seed)
    if "shortcut" in fused:
        options["residual"] = values(*out[:2], 2 * out[2] - 1, 2 * out[3], n // 2, dtype=case.dtype, seed=seed)
        options["residual_stride"] = 2
    x = values(groups, case.images, case.height, case.width, case.channels, dtype=case.dtype, seed=seed)
    if "shared" in fused:
        x = values(1, *x.shape[1:], seed=seed)
    return {
        "x": x,
        "weight": values(SLOTS, case.kernel**2, case.channels, n, dtype=case.dtype, scale=scale, seed=seed),
        "weight_index": torch.tensor([(2 * g + seed) % SLOTS for g in range(groups)], dtype=torch.int32),
        **case.shape,
        **options,
        **{name: True for name in ("relu", "mask", "in_relu") if name in fused},
    }


NEXT, LOADED = ("next_scale", "next_shift"), ("in_scale", "in_shift")
# What the plans of networks fuse: evaluation side, training side
PAIRS = {
    "BatchNorm in the weights": (("bias", "relu"), ("center",)),
    "block's end": (("residual", *NEXT), ("residual", "center")),
    "block's end, BatchNorm in the weights": (("bias", "residual", "relu"), ("center",)),
    "padded shortcut": (("shortcut", "relu", "mask"), ("shortcut", "center")),
    "nothing": ((), ()),
    "image": ((*LOADED, *NEXT, "mask", "shared"), (*LOADED, "center", "shared")),
    "image, one side": (("shared", "bias"), (*LOADED, "center", "shared")),
    "BatchNorm on load, one side": (("bias", "relu"), (*LOADED, "in_relu", "center")),
}


def same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other), "unwritten memory is NaN, which equals nothing"


ODD = Case("odd", 0, 1, 3, 5, 10, 21, 3, 1, 1, torch.float32)  # masks in positions, channels and results


@pytest.mark.parametrize(
    ("pair", "case"),
    [*((pair, ODD) for pair in PAIRS), ("block's end", ODD._replace(dtype=BF16, stride=2)),
     ("image", ODD._replace(dtype=BF16, channels=3))],
)  # fmt: skip
def test_convolution(pair, case):
    sides = side(case, 2, 1, *PAIRS[pair][0]), side(case, 1, 5, *PAIRS[pair][1])
    both = run_kernel(joint_conv, *sides)
    for given, result in zip(sides, both, strict=True):
        same(result, run_kernel(grouped_conv, **given))
    by_reference = joint_conv(*sides)
    for given, result in zip(sides, by_reference, strict=True):
        same(result, grouped_conv(**given))


@pytest.mark.parametrize("groups", [(1, 1), (1, 3), (3, 1)], ids=str)
def test_single_groups(groups):
    """The input of one group is told from one that all share by nothing; neither side is special."""
    case = CASES[9]._replace(dtype=BF16)
    sides = side(case, groups[0], 1), side(case, groups[1], 2)
    both = run_kernel(joint_conv, *sides)
    for given, result in zip(sides, both, strict=True):
        same(result, run_kernel(grouped_conv, **given))


def launches(*sides: dict, arch: int = 90) -> list[KernelLaunch]:
    with assume_arch(arch), record_launches() as found:
        joint_conv(*sides)
    return found


def wide(channels: int) -> Case:
    return Case("", 2, 1, 4, 4, channels, channels, 3, 1, 1, BF16)


def test_one_launch():
    (one,) = launches(side(CASES[0], 2, 1, "bias"), side(CASES[0], 3, 1, "center"), arch=0)
    assert one.kernel is joint_conv_kernel
    assert one.grid[1] == 5
    assert not one.arguments["BARE"]
    (bare,) = launches(side(CASES[0], 2, 1), side(CASES[0], 1, 1), arch=0)
    assert bare.arguments["BARE"]
    (not_alike,) = launches(side(CASES[0], 2, 1, "shared"), side(CASES[0], 3, 1), arch=0)
    assert not not_alike.arguments["BARE"]


@pytest.mark.parametrize(
    ("channels", "fused", "registers"),
    [(128, ("bias", "relu"), [128]), (64, ("bias", "relu"), [128]), (64, ("bias", "residual"), [168]),
     (128, ("bias", "residual"), [None, 128]), (16, ("bias", "residual"), [None])],
)  # fmt: skip
def test_registers(channels, fused, registers):
    """What a side with sums may have; where the other would spill within that, they are launched apart."""
    case = wide(channels)
    found = launches(side(case, 2, 1, *fused), side(case, 3, 1, "center"))
    assert [one.maxnreg for one in found] == registers
    groups = [one.grid[1] for one in found]
    assert groups == ([5] if len(registers) == 1 else [2, 3])


def test_the_ops_reference_is_the_joint_launchs_too():
    sides = side(CASES[0], 2, 1), side(CASES[0], 3, 1)
    with record_launches() as found, references_only("grouped_conv"):
        joint_conv(*sides)
    assert found == []


def test_refusals():
    one, other = side(CASES[0], 2, 1), side(CASES[0], 3, 1)
    with pytest.raises(InputError, match="expected the same"):
        joint_conv(one, other | {"padding": 0})
    with pytest.raises(InputError, match="expected the same"):
        joint_conv(one, other | {"precision": "tf32"})
    with pytest.raises(InputError, match=r"x is .*expected both alike but for the first size"):
        joint_conv(one, other | {"x": values(3, 3, 8, 8, 16)})
    with pytest.raises(InputError, match=r"weight is .*expected both alike"):
        joint_conv(one, other | {"weight": values(SLOTS, 9, 16, 24)})
    with pytest.raises(InputError, match="unknown precision"):
        joint_conv(one, other | {"precision": "half"})


def classifier(groups: int, seed: int, dtype: torch.dtype, slots: int = 3, shared: bool = False) -> dict:
    return {
        "z": values(groups, 19, 3, 5, 20, dtype=dtype, seed=seed),
        "weight": values(slots, 20, 11, dtype=dtype, seed=seed),
        "bias": values(slots, 11, seed=seed),
        "weight_index": torch.tensor([(2 * g + seed) % slots for g in range(groups)], dtype=torch.int32),
        "scale": values(1 if shared else slots, 20, seed=seed),
        "shift": values(1 if shared else slots, 20, seed=seed + 1),
    }


@pytest.mark.parametrize("without", [(), ("bias", "scale", "shift")], ids=["all", "bare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_head(dtype, without):
    sides = [classifier(2, 1, dtype), classifier(3, 2, dtype, slots=4, shared=True)]
    sides = [given | dict.fromkeys(without) for given in sides]
    both = run_kernel(joint_head, *sides)
    for given, result in zip(sides, both, strict=True):
        same(result, run_kernel(head, **given))
    by_reference = joint_head(*sides)
    for given, result in zip(sides, by_reference, strict=True):
        same(result, head(**given))
    with record_launches() as found:
        joint_head(*sides)
    assert [(one.kernel, one.grid[2]) for one in found] == [(joint_head_kernel, 5)]


def test_head_refusals():
    one, other = classifier(2, 1, torch.float32), classifier(3, 2, torch.float32)
    with pytest.raises(InputError, match="the other has not"):
        joint_head(one, other | {"bias": None})
    with pytest.raises(InputError, match="the other has not"):
        joint_head(one, other | {"relu": False})
    with pytest.raises(InputError, match=r"z is .*expected both alike"):
        joint_head(one, other | {"z": values(3, 18, 3, 5, 20)})
