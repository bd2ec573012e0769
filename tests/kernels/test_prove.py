"""The proof of the wgmma kernels on a device, with stand-ins on a CPU: right ones pass, every fault is named."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastensdistill.errors import InputError
from fastensdistill.kernels import prove, wgmma
from fastensdistill.kernels.conv_data_gradient import DataGradientOperands, conv_data_gradient
from fastensdistill.kernels.conv_weight_gradient import WeightGradientOperands, conv_weight_gradient
from fastensdistill.kernels.elementwise_gradient import GradientEpilogue
from fastensdistill.kernels.grouped_conv import ConvOperands, ConvOutput, grouped_conv
from fastensdistill.kernels.operands import Window
from tests.untyped import untyped

S1, S2 = Window(3, 1, 1), Window(3, 2, 1)
SHAPE = (64, 64, 3, 12, 20)
FEW = [
    prove.Case(grouped_conv, S1, SHAPE, ("bias", "residual", "next_scale", "next_shift", "mask")),
    prove.Case(grouped_conv, S2, (16, 64, 2, 16, 16), ("residual", "center")),
    prove.Case(conv_data_gradient, S2, SHAPE, ("mask", "z", "mean", "inv_std")),
    prove.Case(conv_weight_gradient, S1, (48, 32, 2, 8, 8), ("in_scale", "in_shift")),
]


def itself(op):
    """The op, which on a CPU computes by its reference."""
    return op


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(prove, "cases", lambda: iter(FEW))


def outcome(monkeypatch, capsys, kernel) -> tuple[int, list[str]]:
    monkeypatch.setattr(wgmma, "kernel", kernel)
    try:
        status = prove.main(["--device", "cpu"])
    finally:
        torch.use_deterministic_algorithms(False)
    return status, capsys.readouterr().out.splitlines()


def test_every_kind_of_kernel_is_proven(monkeypatch, capsys):
    """Every op, window and width; what an op can fuse is taken from its operands, so that nothing new is left out."""
    every = list(prove.cases())
    assert {(case.op, case.window) for case in every} == set(itertools.product(wgmma.KERNELS, wgmma.WINDOWS))
    assert {case.shape[:2] for case in every} >= {(16, 16), (32, 32), (64, 64), (128, 128), (256, 256)}
    assert all(wgmma.covers(*case.shape[:2], case.window, torch.bfloat16) for case in every)
    for kind in (ConvOperands, WeightGradientOperands, DataGradientOperands, GradientEpilogue):
        options = {name for name in kind._field_defaults if not name.startswith("residual_")}
        assert options <= {name for case in every for name in case.fused}, "a new operand is to be proven"
    some = every[::7]  # an odd number: of every op, window and shape
    monkeypatch.setattr(prove, "cases", lambda: iter(some))
    status, lines = outcome(monkeypatch, capsys, itself)
    assert status == 0
    assert lines[-1] == "all right"
    assert len(lines) == len(some) + 1
    assert all(line.startswith("right  wgmma_") for line in lines[:-1])


def spoilt(op, change):
    """``op`` with its first result changed."""

    def kernel(*arguments, **options):
        found = op(*arguments, **options)
        if isinstance(found, torch.Tensor):
            return change(found)
        return found._replace(**{found._fields[0]: change(found[0])})

    return kernel


def at(place, value):
    def change(x):
        x = x.clone()
        x[place] = value
        return x

    return change


@pytest.mark.parametrize("number", range(len(FEW)), ids=lambda i: FEW[i].title.replace(" ", "-"))
@pytest.mark.parametrize("value", [float("nan"), 50.0])
def test_one_wrong_element_is_named(monkeypatch, capsys, few, number, value):
    """An element that was never written, in memory that starts as NaN, among the last of all; and one that is off."""
    place = (-1,) * (4 if FEW[number].op is conv_weight_gradient else 5)
    monkeypatch.setattr(prove, "cases", lambda: iter(FEW[number : number + 1]))
    status, lines = outcome(monkeypatch, capsys, lambda op: spoilt(op, at(place, value)))
    assert status == 1
    assert lines[-1] == "1 wrong"
    assert lines[0].startswith(f"WRONG  {FEW[number].title}: ")
    assert f"is {value:.6g}, expected " in lines[0]


@pytest.mark.parametrize("side", [0, 1])
def test_joint_launches_are_proven_on_both_sides(monkeypatch, capsys, side):
    """Every window, and a kernel of few channels; a fault of either side is named."""
    joint = [case for case in prove.cases() if case.training is not None]
    assert {case.window for case in joint} == set(wgmma.WINDOWS)
    assert {case.shape[:2] for case in joint} == {(64, 64), (16, 16)}
    right, case = prove.wgmma_joint_conv, joint[-3]

    def wrong(*sides):
        found = [*right(*sides)]
        found[side] = found[side]._replace(z=at((-1,) * 5, 50.0)(found[side].z))
        return found

    monkeypatch.setattr(prove, "cases", lambda: iter([case]))
    assert outcome(monkeypatch, capsys, itself) == (0, [f"right  {case.title}", "all right"])
    monkeypatch.setattr(prove, "wgmma_joint_conv", wrong)
    wrong.__name__ = right.__name__
    status, lines = outcome(monkeypatch, capsys, itself)
    assert status == 1
    assert lines[0].startswith(f"WRONG  {case.title}: {'side 1: ' if side else ''}z[1, 1, 15, 15, 15] is 50, expected ")


def test_bits_and_sums_are_looked_at(monkeypatch, capsys, few):
    def flipped(op):
        def kernel(*arguments, **options):
            found = op(*arguments, **options)
            if isinstance(found, ConvOutput) and found.mask is not None:
                return found._replace(mask=found.mask ^ 1)
            if not isinstance(found, torch.Tensor) and found.statistics is not None:
                return found._replace(statistics=found.statistics * torch.tensor([1.0, 1.02])[:, None])
            return found

        return kernel

    status, lines = outcome(monkeypatch, capsys, flipped)
    assert status == 1
    assert [line.split(": ")[-1].split("[")[0] for line in lines[:3]] == ["mask", "statistics", "statistics"]
    assert lines[3].startswith("right")


def test_what_moves_is_wrong(monkeypatch, capsys, few):
    count = itertools.count()
    kernel = lambda op: spoilt(op, lambda x: x * (1 + 2**-8 * (next(count) % 2)))  # noqa: E731
    status, lines = outcome(monkeypatch, capsys, kernel)
    assert status == 1
    assert all("is not the same twice" in line for line in lines[:-1])


def test_what_a_kernel_does_not_cover_is_left_out_and_none_at_all_is_said(monkeypatch, capsys, few):
    def refusing(op):
        def kernel(*arguments, **options):
            if "center" in options:
                raise InputError("does not cover sums")
            return op(*arguments, **options)

        return kernel

    status, lines = outcome(monkeypatch, capsys, refusing)
    assert status == 0
    assert [line.split()[0] for line in lines] == ["right", "left", "right", "right", "all"]
    assert outcome(monkeypatch, capsys, lambda op: None) == (2, ["there are no wgmma kernels for this device"])


def test_what_is_covered():
    bf16 = torch.bfloat16
    unsupported = untyped(wgmma.unsupported)
    assert unsupported(16, 640, Window(1, 2, 0), bf16, 90) == ""
    assert "compute capability 10.0, expected 9.0" in unsupported(64, 64, S1, bf16, 100)
    assert "padding 0, expected" in unsupported(64, 64, Window(3, 1, 0), bf16)
    assert "24 to 64 channels" in unsupported(24, 64, S1, bf16)
    assert "64 to 656 channels" in unsupported(64, 656, S1, bf16)
    assert "torch.float32" in unsupported(64, 64, S1, torch.float32)
